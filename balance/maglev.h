// SPDX-License-Identifier: BSD-2-Clause
//
// Maglev consistent hashing (Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016,
// section 3.4), with weights. Pure: both engines choose from this table, by hash_slot() of balance/hash.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace balance {

struct MaglevEntry {
  std::uint64_t hash = 0;    // well mixed, of what makes the entry what it is: the backend's address and port
  std::uint32_t weight = 1;  // from 1 to 65535
};

/// The size of the table for so many entries. A table of another size is another table, in which nearly every client
/// has another entry; so there are few sizes, a factor of eight apart, and which one it is depends on the number of
/// entries alone. Each is the largest prime below a power of two. Up to 1024 entries, each has at least 127 slots on
/// average; beyond, the table grows no more (the kernel spends 16 bytes for each slot), down to 16 slots for 65535
/// entries. Nothing needs to be chosen for one entry, and nothing can be for none.
constexpr std::uint32_t maglev_size(std::size_t entries) {
  if (entries < 2) return static_cast<std::uint32_t>(entries);
  if (entries <= 16) return 2039;
  if (entries <= 128) return 16381;
  if (entries <= 1024) return 131071;
  return 1048573;
}

/// The table: for each slot, the index of its entry. Each entry has at least one slot, and as many as its weight
/// says to within about one. Depends on the set of entries, not on their order. When an entry leaves, its slots go to
/// the others in proportion; few of the other slots change, and all change back when it returns.
///
/// At most 65535 entries, each with a hash of its own.
std::vector<std::uint32_t> maglev_table(std::span<const MaglevEntry> entries);

}  // namespace balance
