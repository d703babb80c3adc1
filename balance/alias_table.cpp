// SPDX-License-Identifier: BSD-2-Clause
#include "balance/alias_table.h"

#include <numeric>

namespace balance {

std::vector<Column> alias_table(std::span<const std::uint32_t> weights) {
  const std::uint64_t sum = std::accumulate(weights.begin(), weights.end(), std::uint64_t{0});
  std::vector<Column> columns(weights.size());

  // Scaled by the number of columns, a column holds exactly `sum`, and the entries fill all columns exactly.
  std::vector<std::uint64_t> left(weights.size());
  std::vector<std::uint32_t> small;
  std::vector<std::uint32_t> large;
  for (std::uint32_t i = 0; i < weights.size(); ++i) {
    left[i] = std::uint64_t{weights[i]} * weights.size();
    (left[i] < sum ? small : large).push_back(i);
  }

  // A small entry leaves room in its column; a large one fills it and has that much less left. In integers nothing is
  // lost: when the small ones are used up, each large one has exactly one column left, and the other way round never
  // is.
  while (!small.empty()) {
    const std::uint32_t lender = large.back();
    const std::uint32_t borrower = small.back();
    small.pop_back();
    columns[borrower] = {.threshold = static_cast<std::uint32_t>((left[borrower] << 32) / sum), .alias = lender};
    left[lender] -= sum - left[borrower];
    if (left[lender] < sum) {
      large.pop_back();
      small.push_back(lender);
    }
  }
  for (const std::uint32_t i : large) {
    columns[i] = {.threshold = 0, .alias = i};  // the whole column, whichever side is drawn
  }
  return columns;
}

}  // namespace balance
