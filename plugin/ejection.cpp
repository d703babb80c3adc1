// SPDX-License-Identifier: BSD-2-Clause
#include "plugin/ejection.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <ctime>
#include <span>

namespace plugin {

namespace {

template <class T>
T load(const T& value) {
  return std::atomic_ref(const_cast<T&>(value)).load(std::memory_order_relaxed);
}

}  // namespace

std::uint64_t monotonic_now() {
  constexpr std::uint64_t second = 1'000'000'000;
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * second + static_cast<std::uint64_t>(now.tv_nsec);
}

bool is_ejected(const backend_record& backend, std::uint64_t now) { return load(backend.ejected_until) > now; }

void limit_ejections(const Maps& maps, const Block& block) {
  // The kernel stores an ejection, then looks whether the word is still the one that it went by: one of us sees the
  // other's store.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  const auto members = members_of(block, maps.slots());
  const auto backends = maps.backends();
  const std::uint64_t now = monotonic_now();
  // A publication allocates nothing once it has begun. The times are copies: the kernel changes them meanwhile.
  std::array<std::pair<std::uint64_t, backend_record*>, EJECT_GROUP> ejected{};
  for (std::uint32_t place = 0; place < members.size();) {
    const eject_group group = eject_group_of(place, static_cast<std::uint32_t>(members.size()));
    std::size_t count = 0;
    for (const auto& member : members.subspan(group.first, group.size)) {
      if (member.slot.backend >= backends.size()) {
        continue;
      }
      backend_record& backend = backends[member.slot.backend];
      if (const std::uint64_t until = load(backend.ejected_until); until > now) {
        ejected[count++] = {until, &backend};
      }
    }
    std::ranges::sort(std::span(ejected).first(count));
    for (std::size_t i = 0; i + group.size / 2 < count; ++i) {
      std::atomic_ref(ejected[i].second->ejected_until).store(0, std::memory_order_relaxed);
    }
    place = group.first + group.size;
  }
}

void copy_ejection(const backend_record& from, backend_record& to) {
  to.ejected_until = load(from.ejected_until);
  to.failures = load(from.failures);
  to.ejections = load(from.ejections);
}

void carry_ejection(const backend_record& from, backend_record& to, std::uint64_t now) {
  const std::uint64_t until = load(from.ejected_until);
  if (until <= now || until <= load(to.ejected_until) || load(to.place) == NO_PLACE) {
    return;
  }
  std::atomic_ref(to.ejected_until).store(until, std::memory_order_relaxed);
  std::atomic_ref(to.failures).store(load(from.failures), std::memory_order_relaxed);
  std::atomic_ref(to.ejections).store(load(from.ejections), std::memory_order_relaxed);
}

}  // namespace plugin
