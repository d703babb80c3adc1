// SPDX-License-Identifier: BSD-2-Clause
//
// Which records, backends and blocks of the maps are free. What the kernel may still be reading is *retired*, and
// becomes free by reclaim(), which the owner calls after a grace period: one serves everything retired before it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <utility>
#include <vector>

namespace plugin {

/// reserve() alone grows by no more than asked for, which would copy everything each time.
template <class T>
void reserve_more(std::vector<T>& vector, std::size_t more) {
  if (vector.size() + more > vector.capacity()) {
    vector.reserve(std::max(vector.size() + more, 2 * vector.capacity()));
  }
}

/// Indices of equal elements: records, backends.
class IndexPool {
 public:
  /// Hands out [0, capacity) except those that `used` names (it may be shorter).
  IndexPool(std::uint32_t capacity, const std::vector<bool>& used);

  std::optional<std::uint32_t> take();
  void give_back(std::uint32_t index) { free_.push_back(index); }  // nobody has seen it
  void retire(std::uint32_t index) { retired_.push_back(index); }
  /// Makes room, so that `more` calls of retire() need no memory.
  void reserve_retired(std::size_t more) { reserve_more(retired_, more); }
  /// Those that `is_held` is true for wait on: what they stand for is not over.
  template <class IsHeld>
  void reclaim(IsHeld is_held) {
    held_.insert(held_.end(), retired_.begin(), retired_.end());
    retired_.clear();
    std::erase_if(held_, [&](std::uint32_t index) {
      if (is_held(index)) {
        return false;
      }
      free_.push_back(index);
      return true;
    });
  }
  std::uint64_t retired() const { return retired_.size(); }
  std::span<const std::uint32_t> held() const { return held_; }
  std::uint64_t capacity() const { return capacity_; }

 private:
  std::uint32_t capacity_;
  std::vector<std::uint32_t> free_;
  std::vector<std::uint32_t> retired_;
  std::vector<std::uint32_t> held_;
};

/// Contiguous extents of one array: blocks of slots. Best fit; neighbours that are free become one. When memory runs
/// out, a call throws and has done nothing.
class ExtentPool {
 public:
  /// Everything in [first, first + capacity) is free.
  ExtentPool(std::uint32_t first, std::uint32_t capacity);

  std::optional<std::uint32_t> take(std::uint32_t size);
  /// Takes exactly this extent: adoption. False when it is not free.
  bool take_at(std::uint32_t offset, std::uint32_t size);
  void give_back(std::uint32_t offset, std::uint32_t size);
  void retire(std::uint32_t offset, std::uint32_t size);
  void reserve_retired(std::size_t more) { reserve_more(retired_, more); }
  void reclaim();
  std::uint64_t retired() const { return retired_size_; }
  std::uint64_t capacity() const { return capacity_; }

 private:
  using Extent = std::map<std::uint32_t, std::uint32_t>::iterator;
  void add(std::uint32_t offset, std::uint32_t size);
  void change(Extent extent, std::uint32_t offset, std::uint32_t size);
  void remove(Extent extent);

  std::uint32_t capacity_;
  std::map<std::uint32_t, std::uint32_t> by_offset_;           // offset -> size
  std::set<std::pair<std::uint32_t, std::uint32_t>> by_size_;  // {size, offset}
  std::vector<std::pair<std::uint32_t, std::uint32_t>> retired_;
  std::uint64_t retired_size_ = 0;
};

}  // namespace plugin
