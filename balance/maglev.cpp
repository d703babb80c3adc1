// SPDX-License-Identifier: BSD-2-Clause
#include "balance/maglev.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <queue>
#include <utility>

#include "balance/hash.h"

namespace balance {
namespace {

constexpr std::uint32_t vacant = 0xffffffff;

/// An entry's permutation of the slots, and how far the entry has come in it. The size is a prime, so that any skip
/// leads through all of them.
struct Walk {
  std::uint32_t slot;
  std::uint32_t skip;
};

Walk begin_walk(std::uint64_t hash, std::uint32_t size) {
  return {.slot = static_cast<std::uint32_t>(hash % size),
          .skip = static_cast<std::uint32_t>(hash_mix(hash) % (size - 1) + 1)};
}

/// Takes the first vacant slot of the permutation.
void take_slot(Walk& walk, std::uint32_t entry, std::vector<std::uint32_t>& table) {
  const auto size = static_cast<std::uint32_t>(table.size());
  while (table[walk.slot] != vacant) {
    walk.slot += walk.skip;
    if (walk.slot >= size) walk.slot -= size;
  }
  table[walk.slot] = entry;
}

/// When an entry takes its n-th slot (from 0), in units of 2^-32: the first at once, so that none is left without, then
/// at (n + 1/2) / weight, so that at any time it has as many as its weight says, rounded. This depends on no other
/// entry: whoever comes or goes, the others keep their order.
std::uint64_t time_of(std::uint64_t n, std::uint32_t weight) { return n == 0 ? 0 : ((2 * n + 1) << 31) / weight; }

}  // namespace

std::vector<std::uint32_t> maglev_table(std::span<const MaglevEntry> entries) {
  const std::uint32_t size = maglev_size(entries.size());
  if (size < 2) return std::vector<std::uint32_t>(size, 0);

  // Entries take turns in the order of their hashes.
  std::vector<std::uint32_t> turns(entries.size());
  std::iota(turns.begin(), turns.end(), 0u);
  std::ranges::sort(turns, {}, [&](std::uint32_t entry) { return std::pair(entries[entry].hash, entry); });
  std::vector<Walk> walks(entries.size());
  std::ranges::transform(turns, walks.begin(),
                         [&](std::uint32_t entry) { return begin_walk(entries[entry].hash, size); });

  std::vector<std::uint32_t> table(size, vacant);
  const bool equal = std::ranges::adjacent_find(entries, std::not_equal_to{}, &MaglevEntry::weight) == entries.end();
  if (equal) {
    for (std::uint32_t taken = 0, turn = 0; taken < size; ++taken) {
      take_slot(walks[turn], turns[turn], table);
      if (++turn == turns.size()) turn = 0;
    }
    return table;
  }

  struct Turn {
    std::uint64_t time;
    std::uint32_t turn;
    std::uint32_t taken;
    auto operator<=>(const Turn&) const = default;
  };
  std::vector<Turn> first(turns.size());
  for (std::uint32_t turn = 0; turn < turns.size(); ++turn) {
    first[turn] = {.time = 0, .turn = turn, .taken = 0};
  }
  std::priority_queue queue(std::greater<Turn>{}, std::move(first));
  for (std::uint32_t taken = 0; taken < size; ++taken) {
    Turn turn = queue.top();
    queue.pop();
    const std::uint32_t entry = turns[turn.turn];
    take_slot(walks[turn.turn], entry, table);
    turn.time = time_of(++turn.taken, entries[entry].weight);
    queue.push(turn);
  }
  return table;
}

}  // namespace balance
