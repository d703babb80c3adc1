// SPDX-License-Identifier: BSD-2-Clause
//
// Which backend a client had last. One table per service; used from any thread: it has a lock, which is taken once for
// each new connection of a service with affinity and never otherwise.
#pragma once

#include <chrono>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "fallback_proxy/backend.h"

namespace userspace {

class Affinity {
 public:
  /// Null when the client has none, or its time is over.
  std::shared_ptr<Backend> find(std::uint64_t client, Clock::time_point now);

  /// `backend` is the client's for `time` from `now` on. Beyond `limit` clients, the one that came longest ago is
  /// forgotten.
  void remember(std::uint64_t client, std::shared_ptr<Backend> backend, Clock::time_point now, Clock::duration time,
                std::size_t limit);

 private:
  struct Entry {
    std::uint64_t client;
    std::shared_ptr<Backend> backend;
    Clock::time_point until;
  };

  std::mutex mutex_;
  std::list<Entry> entries_;  // the one that came last is at the end
  std::unordered_map<std::uint64_t, std::list<Entry>::iterator> by_client_;
};

}  // namespace userspace
