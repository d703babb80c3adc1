// SPDX-License-Identifier: BSD-2-Clause
#include "plugin/carry_counts.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

#include "plugin/ejection.h"
#include "plugin/grace_period.h"

namespace plugin {

namespace {

/// A process that is killed between the two steps takes this one count with it; in the other order it would be counted
/// twice.
template <class T>
void move_count(T& from, T& to) {
  if (const T count = std::atomic_ref(from).exchange(0, std::memory_order_relaxed); count != 0) {
    std::atomic_ref(to).fetch_add(count, std::memory_order_relaxed);
  }
}

void move_counters(const Maps& from, std::uint32_t from_index, const Maps& to, std::uint32_t to_index) {
  for (std::uint32_t shard = 0; shard < from.capacity().shards; ++shard) {
    counters& before = from.counters_at(shard, from_index);
    counters& now = to.counters_at(shard % to.capacity().shards, to_index);
    move_count(before.connects, now.connects);
    move_count(before.refused, now.refused);
    move_count(before.reversed, now.reversed);
    move_count(before.failures, now.failures);
  }
}

// What both maps have is at one index in both. An index that is free in the old ones may be anybody's in the new ones.

bool is_same(const service_record& one, const service_record& other) {
  const auto has_word = [](const service_record& record) {
    return std::atomic_ref(const_cast<__u64&>(record.word)).load(std::memory_order_relaxed) != 0;
  };
  return has_word(one) && has_word(other) && std::memcmp(&one.key, &other.key, sizeof one.key) == 0;
}

bool is_same(const backend_record& one, const backend_record& other) {
  return one.state != BACKEND_UNUSED && other.state != BACKEND_UNUSED && one.record == other.record &&
         one.port == other.port && std::ranges::equal(one.address, other.address);
}

}  // namespace

void carry_counts(const Maps& from, const Maps& to) {
  // Nothing counts in the old maps any more once the programs that run now have ended.
  if (const auto grace = GracePeriod::create(); !grace || !grace->wait()) {
    return;
  }
  const std::uint64_t time = monotonic_now();
  move_count(from.meta().lost_events, to.meta().lost_events);
  for (std::uint32_t i = 0; i < std::min(from.records().size(), to.records().size()); ++i) {
    if (is_same(from.records()[i], to.records()[i])) {
      move_counters(from, i, to, i);
    }
  }
  for (std::uint32_t i = 0; i < std::min(from.backends().size(), to.backends().size()); ++i) {
    backend_record& before = from.backends()[i];
    backend_record& now = to.backends()[i];
    if (is_same(before, now)) {
      move_counters(from, from.backend_stats(i), to, to.backend_stats(i));
      carry_ejection(before, now, time);
    }
    move_count(before.live, now.live);  // also at backends that have left, whose connections end one day
  }
  for (service_record& record : to.records()) {
    const auto block = find_block(std::atomic_ref(record.word).load(std::memory_order_acquire), to.slots());
    if (block && (to.slots()[block->header].header.flags & BLOCK_EJECT) != 0) {
      limit_ejections(to, *block);
    }
  }
}

}  // namespace plugin
