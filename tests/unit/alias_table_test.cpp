// SPDX-License-Identifier: BSD-2-Clause
#include "balance/alias_table.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

namespace {

/// The share of each entry, summed over the columns in units of 2^-32 of one column.
std::vector<double> shares(const std::vector<std::uint32_t>& weights) {
  const auto columns = balance::alias_table(weights);
  std::vector<double> share(weights.size());
  constexpr double whole = 4294967296.0;
  for (std::size_t i = 0; i < columns.size(); ++i) {
    share[i] += columns[i].threshold / whole;
    share[columns[i].alias] += (whole - columns[i].threshold) / whole;
  }
  for (double& one : share) {
    one /= static_cast<double>(columns.size());
  }
  return share;
}

void expect_exact(const std::vector<std::uint32_t>& weights) {
  const double sum = static_cast<double>(std::accumulate(weights.begin(), weights.end(), std::uint64_t{0}));
  const auto share = shares(weights);
  for (std::size_t i = 0; i < weights.size(); ++i) {
    EXPECT_NEAR(share[i], weights[i] / sum, std::ldexp(1.0, -31)) << "entry " << i << " of " << weights.size();
  }
}

TEST(AliasTable, GivesEachEntryItsShare) {
  expect_exact({1});
  expect_exact({7});
  expect_exact({1, 1});
  expect_exact({1, 2, 5});
  expect_exact({65535, 1});
  expect_exact({1, 65535, 1, 65535, 1});
}

TEST(AliasTable, GivesEachOfRandomWeightsItsShare) {
  std::mt19937 random(7);
  for (int round = 0; round < 200; ++round) {
    std::vector<std::uint32_t> weights(random() % 300 + 1);
    for (auto& weight : weights) {
      weight = static_cast<std::uint32_t>(random() % 65535 + 1);
    }
    expect_exact(weights);
  }
}

TEST(AliasTable, HoldsTheLargestService) {
  const std::vector<std::uint32_t> weights(65535, 65535);
  expect_exact(weights);
}

TEST(AliasTable, PlacesDrawsInEveryColumnAndNoOther) {
  for (const std::uint32_t columns : {1u, 2u, 3u, 65535u}) {
    EXPECT_EQ(balance::place(0, columns).column, 0u);
    EXPECT_EQ(balance::place(0xffffffffu, columns).column, columns - 1);
  }
  EXPECT_EQ(balance::place(0x80000000u, 2).column, 1u);
  EXPECT_EQ(balance::place(0x7fffffffu, 2).column, 0u);
  EXPECT_EQ(balance::place(0x40000000u, 2).position, 0x80000000u);
}

}  // namespace
