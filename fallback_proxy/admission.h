// SPDX-License-Identifier: BSD-2-Clause
//
// How many connections and UDP flows there may be: derived from the limit of file descriptors, so that none of them
// ever meets EMFILE.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace userspace {

class Admission {
 public:
  /// `descriptors` are for all; at most `flows` of them for UDP flows.
  Admission(std::int64_t descriptors, std::int64_t flows)
      : total_(descriptors), descriptors_(descriptors), flows_(flows) {}

  /// Connections, while there are no flows.
  std::int64_t limit() const {
    return std::max<std::int64_t>(total_.load(std::memory_order_relaxed), 0) / per_connection;
  }

  /// A listener takes a descriptor that connections would have, whether there is room or not.
  void listener_opened() {
    give_back(total_, -1);
    give_back(descriptors_, -1);
  }
  void listener_closed() {
    give_back(total_, 1);
    give_back(descriptors_, 1);
  }

  /// A place for a connection.
  bool take() { return take(descriptors_, per_connection); }
  void give_back() { give_back(descriptors_, per_connection); }

  /// A place for a UDP flow.
  bool take_flow() {
    if (!take(flows_, 1)) return false;
    if (take(descriptors_, 1)) return true;
    give_back(flows_, 1);
    return false;
  }
  void give_back_flow() {
    give_back(descriptors_, 1);
    give_back(flows_, 1);
  }

 private:
  static constexpr std::int64_t per_connection = 2;

  static bool take(std::atomic<std::int64_t>& free, std::int64_t count) {
    if (free.fetch_sub(count, std::memory_order_relaxed) >= count) return true;
    give_back(free, count);
    return false;
  }
  static void give_back(std::atomic<std::int64_t>& free, std::int64_t count) {
    free.fetch_add(count, std::memory_order_relaxed);
  }

  std::atomic<std::int64_t> total_;
  std::atomic<std::int64_t> descriptors_;
  std::atomic<std::int64_t> flows_;
};

}  // namespace userspace
