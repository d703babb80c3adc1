// SPDX-License-Identifier: BSD-2-Clause
//
// How many connections there may be: derived from the limit of file descriptors, so that none of them ever meets
// EMFILE.
#pragma once

#include <atomic>
#include <cstdint>

namespace userspace {

class Admission {
 public:
  explicit Admission(std::int64_t connections) : limit_(connections), free_(connections) {}

  std::int64_t limit() const { return limit_.load(std::memory_order_relaxed); }

  bool take() {
    if (free_.fetch_sub(1, std::memory_order_relaxed) > 0) return true;
    give_back();
    return false;
  }
  void give_back() { free_.fetch_add(1, std::memory_order_relaxed); }
  /// After a reload, which may have changed the number of listeners.
  void change(std::int64_t by) {
    limit_.fetch_add(by, std::memory_order_relaxed);
    free_.fetch_add(by, std::memory_order_relaxed);
  }

 private:
  std::atomic<std::int64_t> limit_;
  std::atomic<std::int64_t> free_;
};

}  // namespace userspace
