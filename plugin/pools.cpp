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

ExtentPool::ExtentPool(std::uint32_t first, std::uint32_t capacity) : capacity_(capacity) { add(first, capacity); }

std::optional<std::uint32_t> ExtentPool::take(std::uint32_t size) {
  const auto best = by_size_.lower_bound({size, 0});
  if (best == by_size_.end()) {
    return std::nullopt;
  }
  const auto [found_size, offset] = *best;
  const auto extent = by_offset_.find(offset);
  if (found_size > size) {
    change(extent, offset + size, found_size - size);
  } else {
    remove(extent);
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
  const std::uint32_t rest = start + length - (offset + size);
  if (rest > 0 && offset > start) {
    add(offset + size, rest);
    change(extent, start, offset - start);
  } else if (rest > 0) {
    change(extent, offset + size, rest);
  } else if (offset > start) {
    change(extent, start, offset - start);
  } else {
    remove(extent);
  }
  return true;
}

void ExtentPool::give_back(std::uint32_t offset, std::uint32_t size) {
  const auto after = by_offset_.find(offset + size);
  auto before = by_offset_.lower_bound(offset);
  before = before != by_offset_.begin() ? std::prev(before) : by_offset_.end();
  const bool joins_before = before != by_offset_.end() && before->first + before->second == offset;
  if (after != by_offset_.end()) {
    size += after->second;
    if (joins_before) {
      remove(after);
    } else {
      change(after, offset, size);
    }
  }
  if (joins_before) {
    change(before, before->first, before->second + size);
  } else if (after == by_offset_.end()) {
    add(offset, size);
  }
}

void ExtentPool::retire(std::uint32_t offset, std::uint32_t size) {
  retired_.emplace_back(offset, size);
  retired_size_ += size;
}

void ExtentPool::reclaim() {
  while (!retired_.empty()) {
    const auto [offset, size] = retired_.back();
    give_back(offset, size);
    retired_.pop_back();
    retired_size_ -= size;
  }
}

void ExtentPool::add(std::uint32_t offset, std::uint32_t size) {
  const auto extent = by_offset_.emplace(offset, size).first;
  try {
    by_size_.emplace(size, offset);
  } catch (...) {
    by_offset_.erase(extent);
    throw;
  }
}

/// Without allocating: the nodes are used again.
void ExtentPool::change(Extent extent, std::uint32_t offset, std::uint32_t size) {
  auto size_node = by_size_.extract({extent->second, extent->first});
  auto offset_node = by_offset_.extract(extent);
  size_node.value() = {size, offset};
  offset_node.key() = offset;
  offset_node.mapped() = size;
  by_size_.insert(std::move(size_node));
  by_offset_.insert(std::move(offset_node));
}

void ExtentPool::remove(Extent extent) {
  by_size_.erase({extent->second, extent->first});
  by_offset_.erase(extent);
}

}  // namespace plugin
