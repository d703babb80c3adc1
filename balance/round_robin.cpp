// SPDX-License-Identifier: BSD-2-Clause
#include "balance/round_robin.h"

#include <functional>
#include <numeric>
#include <queue>

namespace balance {
namespace {

void divide_by_gcd(std::vector<std::uint32_t>& visits) {
  std::uint32_t divisor = 0;
  for (const std::uint32_t one : visits) {
    divisor = std::gcd(divisor, one);
    if (divisor == 1) return;
  }
  for (std::uint32_t& one : visits) {
    one /= divisor;
  }
}

/// Shares `slots` out by largest remainder, at least one to each. `total` is the sum of the weights, and more than
/// that.
std::vector<std::uint32_t> nearest(std::span<const std::uint32_t> weights, std::uint64_t total, std::uint64_t slots) {
  // Whoever deserves less than one slot gets one. That leaves less for the others, so that more of them may deserve
  // less than one: again, until all of the rest deserve one.
  std::vector<std::uint32_t> visits(weights.size());
  for (bool again = true; again;) {
    again = false;
    for (std::size_t i = 0; i < weights.size(); ++i) {
      if (visits[i] == 0 && weights[i] * slots < total) {
        visits[i] = 1;
        slots -= 1;
        total -= weights[i];
        again = true;
      }
    }
  }

  struct Remainder {
    std::uint64_t size;
    std::uint32_t entry;
  };
  std::vector<Remainder> remainders;
  std::uint64_t left = slots;
  for (std::uint32_t i = 0; i < weights.size(); ++i) {
    if (visits[i] != 0) continue;
    const std::uint64_t share = weights[i] * slots;
    visits[i] = static_cast<std::uint32_t>(share / total);
    left -= visits[i];
    remainders.push_back({.size = share % total, .entry = i});
  }
  const auto behind = remainders.begin() + static_cast<std::ptrdiff_t>(left);  // less than one each is left
  std::nth_element(remainders.begin(), behind, remainders.end(), [](const Remainder& a, const Remainder& b) {
    return a.size != b.size ? a.size > b.size : a.entry < b.entry;
  });
  for (auto one = remainders.begin(); one != behind; ++one) {
    ++visits[one->entry];
  }
  return visits;
}

/// How often the ring visits each entry.
std::vector<std::uint32_t> visits_of(std::span<const std::uint32_t> weights) {
  std::vector<std::uint32_t> visits(weights.begin(), weights.end());
  divide_by_gcd(visits);
  const std::uint64_t total = std::accumulate(visits.begin(), visits.end(), std::uint64_t{0});
  if (total > max_ring(visits.size())) {
    visits = nearest(visits, total, max_ring(visits.size()));
    divide_by_gcd(visits);
  }
  return visits;
}

}  // namespace

std::vector<std::uint32_t> ring_order(std::span<const std::uint32_t> weights) {
  const std::vector<std::uint32_t> visits = visits_of(weights);
  const std::uint64_t entries = visits.size();
  const std::uint64_t ring = std::accumulate(visits.begin(), visits.end(), std::uint64_t{0});
  std::vector<std::uint32_t> order(ring);
  if (ring == entries) {
    std::iota(order.begin(), order.end(), 0u);
    return order;
  }

  // The chairman assignment problem (Tijdeman, Discrete Math. 32(3), 1980): within that distance of its share, an
  // entry's visit has a first and a last slot where it can be. There always is an order that meets all of these, and
  // the earliest last slot first finds it, as it does for any jobs of equal length. Slots count from 1, visits from 0:
  //   slot * share - visit >= 1 / steps       for the first slot, or the entry would be ahead by too much,
  //   slot * share - visit >  1 - 1 / steps   for the last, or it would be behind by too much.
  // The products stay below 2^58: a ring is no longer than 2^20, and neither is visit * share; steps are below 2^17.
  const std::uint64_t steps = 2 * entries - 2;
  const auto first_slot = [&](std::uint64_t entry, std::uint64_t visit) {
    const std::uint64_t divisor = visits[entry] * steps;
    return (ring * (visit * steps + 1) + divisor - 1) / divisor;
  };
  const auto last_slot = [&](std::uint64_t entry, std::uint64_t visit) {
    return ring * ((visit + 1) * steps - 1) / (visits[entry] * steps) + 1;
  };

  // The entries whose next visit can be in a slot for the first time, as a list for each slot.
  constexpr std::uint32_t none = 0xffffffff;
  std::vector<std::uint32_t> head(ring + 1, none);
  std::vector<std::uint32_t> next(entries);
  const auto wait_for = [&](std::uint64_t slot, std::uint32_t entry) {
    next[entry] = head[slot];
    head[slot] = entry;
  };
  for (std::uint32_t entry = 0; entry < entries; ++entry) {
    wait_for(first_slot(entry, 0), entry);
  }

  // Those whose next visit can be now: last slot in the high half, entry in the low half.
  std::priority_queue<std::uint64_t, std::vector<std::uint64_t>, std::greater<>> due;
  std::vector<std::uint32_t> made(entries);
  for (std::uint64_t slot = 1; slot <= ring; ++slot) {
    for (std::uint32_t entry = head[slot]; entry != none; entry = next[entry]) {
      due.push(last_slot(entry, made[entry]) << 32 | entry);
    }
    const auto entry = static_cast<std::uint32_t>(due.top());
    due.pop();
    order[slot - 1] = entry;
    if (++made[entry] < visits[entry]) {
      wait_for(std::max(slot + 1, first_slot(entry, made[entry])), entry);
    }
  }
  return order;
}

}  // namespace balance
