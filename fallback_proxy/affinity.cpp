// SPDX-License-Identifier: BSD-2-Clause
#include "fallback_proxy/affinity.h"

#include <utility>

namespace userspace {

std::shared_ptr<Backend> Affinity::find(std::uint64_t client, Clock::time_point now) {
  const std::lock_guard lock(mutex_);
  const auto found = by_client_.find(client);
  if (found == by_client_.end() || found->second->until <= now) return {};
  return found->second->backend;
}

void Affinity::remember(std::uint64_t client, std::shared_ptr<Backend> backend, Clock::time_point now,
                        Clock::duration time, std::size_t limit) {
  const std::lock_guard lock(mutex_);
  const auto [place, is_new] = by_client_.try_emplace(client, entries_.end());
  if (is_new) {
    place->second = entries_.insert(entries_.end(), {client, {}, {}});
  } else {
    entries_.splice(entries_.end(), entries_, place->second);
  }
  place->second->backend = std::move(backend);
  place->second->until = now + time;
  // A reload may have changed the time, so the first is not always the next to expire: it goes at the limit.
  while (!entries_.empty() && (entries_.size() > limit || entries_.front().until <= now)) {
    by_client_.erase(entries_.front().client);
    entries_.pop_front();
  }
}

}  // namespace userspace
