// SPDX-License-Identifier: BSD-2-Clause
//
// Weighted random choice in constant time. Pure: both engines choose from these columns.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace balance {

/// A column of an alias table: the share `threshold` / 2^32 of it belongs to the entry of its own index, the rest to
/// `alias`.
struct Column {
  std::uint32_t threshold = 0;
  std::uint32_t alias = 0;
};

/// An alias table for the given weights, by Vose's method (IEEE Trans. Softw. Eng. 17(9), 1991) in integers: an entry's
/// share differs from weight / sum by less than 2^-31. Each weight is 1 or more, their sum below 2^32; the result has
/// as many columns.
std::vector<Column> alias_table(std::span<const std::uint32_t> weights);

/// Where a draw falls: a column, and a position in it in units of 2^-32.
struct Place {
  std::uint32_t column = 0;
  std::uint32_t position = 0;
};

/// Splits one uniform 32-bit draw into both: the high word of draw * columns is the column, the low word the position.
/// choose_backend() of clusterip.bpf.c does the same.
constexpr Place place(std::uint32_t draw, std::uint32_t columns) {
  const std::uint64_t product = std::uint64_t{draw} * columns;
  return {.column = static_cast<std::uint32_t>(product >> 32), .position = static_cast<std::uint32_t>(product)};
}

}  // namespace balance
