// SPDX-License-Identifier: BSD-2-Clause
//
// Weighted round robin, worked out beforehand. Pure: both engines go round this ring.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace balance {

/// How long the ring of so many entries may be. Weights that add up to no more, once divided by their greatest common
/// divisor, are kept exactly: percentages always are. Others are rounded to a ring of this length, by largest
/// remainder: that is to the nearest shares, except that whoever would have no visit gets one. The kernel spends 16
/// bytes for each slot of each such service, so that longer rings would cost more than the last promille is worth.
constexpr std::size_t max_ring(std::size_t entries) { return std::max(std::size_t{1024}, 16 * entries); }

/// The entries (as indices of `weights`) in the order in which a weighted round robin visits them; after the last, it
/// begins again. Each is visited at least once, in proportion to its weight, and spread so evenly that after t visits
/// each has had its share of t to within 1 - 1 / (2 * entries - 2), the least that can be promised. Entries of equal
/// weight take turns in their order. The same weights give the same ring.
///
/// Each weight is from 1 to 65535. Takes O(ring * log entries), for equal weights O(entries).
std::vector<std::uint32_t> ring_order(std::span<const std::uint32_t> weights);

}  // namespace balance
