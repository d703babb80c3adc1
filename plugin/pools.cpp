// SPDX-License-Identifier: BSD-2-Clause
#include "plugin/pools.h"

#include <iterator>

namespace plugin {

IndexPool::IndexPool(std::uint32_t capacity, const std::vector<bool>& used) : capacity_(capacity) {
  free_.reserve(capacity);
  for (std::uint32_t index = capacity; index-- > 0;) {  // the lowest comes out first
    if (index >= used.size() || !used[index]) {
      free_.push_back(index);
    }
  }
}

std::optional<std::uint32_t> IndexPool::take() {
  if (free_.empty()) {
    return std::nullopt;
  }
  const std::uint32_t index = free_.back();
  free_.pop_back();
  return index;
}

void IndexPool::reclaim() {
  free_.insert(free_.end(), retired_.begin(), retired_.end());
  retired_.clear();
}

ExtentPool::ExtentPool(std::uint32_t first, std::uint32_t capacity) : capacity_(capacity) { add(first, capacity); }

std::optional<std::uint32_t> ExtentPool::take(std::uint32_t size) {
  const auto best = by_size_.lower_bound({size, 0});
  if (best == by_size_.end()) {
    return std::nullopt;
  }
  const auto [found_size, offset] = *best;
  remove(by_offset_.find(offset));
  if (found_size > size) {
    add(offset + size, found_size - size);
  }
  return offset;
}

bool ExtentPool::take_at(std::uint32_t offset, std::uint32_t size) {
  auto extent = by_offset_.upper_bound(offset);
  if (extent == by_offset_.begin()) {
    return false;
  }
  --extent;
  const auto [start, length] = *extent;
  if (std::uint64_t{offset} + size > std::uint64_t{start} + length) {
    return false;
  }
  remove(extent);
  if (offset > start) {
    add(start, offset - start);
  }
  if (const std::uint32_t rest = start + length - (offset + size); rest > 0) {
    add(offset + size, rest);
  }
  return true;
}

void ExtentPool::give_back(std::uint32_t offset, std::uint32_t size) {
  const auto after = by_offset_.find(offset + size);
  if (after != by_offset_.end()) {
    size += after->second;
    remove(after);
  }
  auto before = by_offset_.lower_bound(offset);
  if (before != by_offset_.begin()) {
    --before;
    if (before->first + before->second == offset) {
      offset = before->first;
      size += before->second;
      remove(before);
    }
  }
  add(offset, size);
}

void ExtentPool::retire(std::uint32_t offset, std::uint32_t size) {
  retired_.emplace_back(offset, size);
  retired_size_ += size;
}

void ExtentPool::reclaim() {
  for (const auto& [offset, size] : retired_) {
    give_back(offset, size);
  }
  retired_.clear();
  retired_size_ = 0;
}

void ExtentPool::add(std::uint32_t offset, std::uint32_t size) {
  by_offset_.emplace(offset, size);
  by_size_.emplace(size, offset);
}

void ExtentPool::remove(std::map<std::uint32_t, std::uint32_t>::iterator extent) {
  by_size_.erase({extent->second, extent->first});
  by_offset_.erase(extent);
}

}  // namespace plugin
