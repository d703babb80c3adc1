// SPDX-License-Identifier: BSD-2-Clause
#include "balance/round_robin.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

namespace {

using balance::max_ring;
using balance::ring_order;
using testing::ElementsAre;
using Weights = std::vector<std::uint32_t>;

Weights visits(const std::vector<std::uint32_t>& ring, std::size_t entries) {
  Weights visits(entries);
  for (const std::uint32_t entry : ring) ++visits.at(entry);
  return visits;
}

/// At each slot, the visits so far of each entry against its share of the ring. In integers: a deviation is in units
/// of 1 / (ring * steps).
void expect_smooth(const Weights& weights) {
  const auto ring = ring_order(weights);
  const auto per_entry = visits(ring, weights.size());
  const auto size = static_cast<std::int64_t>(ring.size());
  const std::int64_t steps = std::max<std::int64_t>(2 * static_cast<std::int64_t>(weights.size()) - 2, 1);
  Weights so_far(weights.size());
  for (std::int64_t slot = 1; slot <= size; ++slot) {
    ++so_far[ring[static_cast<std::size_t>(slot - 1)]];
    for (std::size_t i = 0; i < weights.size(); ++i) {
      const std::int64_t deviation = (slot * per_entry[i] - size * so_far[i]) * steps;
      ASSERT_LE(std::abs(deviation), size * (steps - 1)) << "entry " << i << " at slot " << slot << " of " << size;
    }
  }
}

TEST(RoundRobin, VisitsEntriesOfEqualWeightInTheirOrder) {
  EXPECT_THAT(ring_order(Weights{}), ElementsAre());
  EXPECT_THAT(ring_order(Weights{1}), ElementsAre(0));
  EXPECT_THAT(ring_order(Weights{65535}), ElementsAre(0));
  EXPECT_THAT(ring_order(Weights{1, 1, 1}), ElementsAre(0, 1, 2));
  EXPECT_THAT(ring_order(Weights{300, 300}), ElementsAre(0, 1));
}

TEST(RoundRobin, SpreadsVisitsAsWorkedOutByHand) {
  EXPECT_THAT(ring_order(Weights{1, 2}), ElementsAre(1, 0, 1));
  EXPECT_THAT(ring_order(Weights{30, 60}), ElementsAre(1, 0, 1));
  EXPECT_THAT(ring_order(Weights{3, 1}), ElementsAre(0, 0, 1, 0));
  EXPECT_THAT(ring_order(Weights{5, 1, 1}), ElementsAre(0, 0, 1, 0, 0, 2, 0));
}

TEST(RoundRobin, KeepsWeightsExactlyUpToTheBound) {
  EXPECT_EQ(visits(ring_order(Weights{3, 5, 2}), 3), (Weights{3, 5, 2}));
  EXPECT_EQ(visits(ring_order(Weights{999, 1}), 2), (Weights{999, 1}));
  EXPECT_EQ(visits(ring_order(Weights{1023, 1}), 2), (Weights{1023, 1}));  // exactly the bound
  EXPECT_EQ(visits(ring_order(Weights{65534, 32767, 32767}), 3), (Weights{2, 1, 1}));
}

TEST(RoundRobin, RoundsToTheNearestSharesBeyondTheBound) {
  EXPECT_EQ(visits(ring_order(Weights{65535, 1}), 2), (Weights{1023, 1}));
  EXPECT_EQ(visits(ring_order(Weights{1024, 1}), 2), (Weights{1023, 1}));
  // 20 and 13107 of 13127: 1.56 and 1022.44 of 1024 slots, that is 2 and 1022.
  EXPECT_EQ(visits(ring_order(Weights{100, 65535}), 2), (Weights{1, 511}));
  // 341.16, 341.33 and 341.51: the one slot left goes to the last.
  EXPECT_EQ(visits(ring_order(Weights{1999, 2000, 2001}), 3), (Weights{341, 341, 342}));
}

TEST(RoundRobin, RoundsByLessThanASlotAndLeavesNobodyOut) {
  std::mt19937 random(11);
  for (int round = 0; round < 200; ++round) {
    Weights weights(random() % 300 + 2);
    for (auto& weight : weights) weight = static_cast<std::uint32_t>(random() % 65535 + 1);
    weights[0] = 1;
    weights[1] = 65535;
    const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
    const auto ring = ring_order(weights);
    const auto per_entry = visits(ring, weights.size());
    ASSERT_LE(ring.size(), max_ring(weights.size()));
    ASSERT_GT(ring.size(), max_ring(weights.size()) / 2);
    // Those lifted to one slot take it from all others together.
    const auto lifted = static_cast<double>(std::ranges::count(per_entry, 1u));
    for (std::size_t i = 0; i < weights.size(); ++i) {
      const double share = weights[i] / total;
      ASSERT_GE(per_entry[i], 1u);
      ASSERT_NEAR(per_entry[i], share * static_cast<double>(ring.size()), 1 + lifted * share)
          << "weight " << weights[i];
    }
  }
}

TEST(RoundRobin, KeepsEachEntryNearItsShareAtEachSlot) {
  expect_smooth({1});
  expect_smooth({1, 1});
  expect_smooth({5, 1, 1});
  expect_smooth({1, 2, 3, 4, 5, 6, 7});
  expect_smooth({1, 1000});
  Weights one_heavy(100, 1);
  one_heavy.push_back(100);
  expect_smooth(one_heavy);  // every other visit is the heavy one's
  std::mt19937 random(12);
  for (int round = 0; round < 300; ++round) {
    Weights weights(random() % 40 + 1);
    const auto highest = std::uniform_int_distribution<std::uint32_t>(1, 65535)(random);
    for (auto& weight : weights) weight = static_cast<std::uint32_t>(random() % (round % 2 ? highest : 5) + 1);
    expect_smooth(weights);
  }
}

TEST(RoundRobin, HoldsTheLargestService) {
  Weights weights(65535);
  for (std::uint32_t i = 0; i < weights.size(); ++i) weights[i] = i + 1;
  const auto ring = ring_order(weights);
  const auto per_entry = visits(ring, weights.size());
  EXPECT_LE(ring.size(), max_ring(weights.size()));
  EXPECT_GE(*std::ranges::min_element(per_entry), 1u);
  EXPECT_TRUE(std::ranges::is_sorted(per_entry));
  EXPECT_NEAR(per_entry.back(), 32, 1);  // of 16 slots each on average
  EXPECT_EQ(ring_order(Weights(65535, 65535)).size(), 65535u);
}

}  // namespace
