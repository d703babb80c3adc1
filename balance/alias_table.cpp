// SPDX-License-Identifier: BSD-2-Clause
#include "balance/alias_table.h"

#include <numeric>

namespace balance {

std::vector<Column> alias_table(std::span<const std::uint32_t> weights) {
  const std::uint64_t sum = std::accumulate(weights.begin(), weights.end(), std::uint64_t{0});
  std::vector<Column> columns(weights.size());

  // Scaled by the number of columns, a column holds exactly `sum`, and the entries fill all columns exactly. One array
  // holds both stacks: small entries grow from its front, large ones from its back.
  std::vector<std::uint64_t> left(weights.size());
  std::vector<std::uint32_t> stacks(weights.size());
  std::size_t small = 0;               // stacks[0, small)
  std::size_t large = weights.size();  // stacks[large, size)
  for (std::uint32_t i = 0; i < weights.size(); ++i) {
    left[i] = std::uint64_t{weights[i]} * weights.size();
    stacks[left[i] < sum ? small++ : --large] = i;
  }

  // A small entry leaves room in its column; a large one fills it and has that much less left. In integers nothing is
  // lost: when the small ones are used up, each large one has exactly one column left, and the other way round never
  // is.
  while (small > 0) {
    const std::uint32_t borrower = stacks[--small];
    const std::uint32_t lender = stacks[large];
    columns[borrower] = {.threshold = static_cast<std::uint32_t>((left[borrower] << 32) / sum), .alias = lender};
    left[lender] -= sum - left[borrower];
    if (left[lender] < sum) {
      ++large;
      stacks[small++] = lender;
    }
  }
  for (; large < stacks.size(); ++large) {
    columns[stacks[large]] = {.threshold = 0, .alias = stacks[large]};  // the whole column, whichever side is drawn
  }
  return columns;
}

}  // namespace balance
