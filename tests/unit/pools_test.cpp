// SPDX-License-Identifier: BSD-2-Clause
#include "plugin/pools.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <map>
#include <random>
#include <set>
#include <utility>
#include <vector>

namespace {

using plugin::ExtentPool;
using plugin::IndexPool;

TEST(IndexPool, HandsOutEachIndexOnce) {
  IndexPool pool(5, {});
  std::set<std::uint32_t> taken;
  for (int i = 0; i < 5; ++i) {
    const auto index = pool.take();
    ASSERT_TRUE(index);
    EXPECT_LT(*index, 5u);
    EXPECT_TRUE(taken.insert(*index).second) << *index << " was handed out twice";
  }
  EXPECT_FALSE(pool.take());
}

TEST(IndexPool, LeavesOutWhatIsUsed) {
  IndexPool pool(4, {true, false, true});
  EXPECT_EQ(pool.take(), 1u);
  EXPECT_EQ(pool.take(), 3u);
  EXPECT_FALSE(pool.take());
}

TEST(IndexPool, KeepsRetiredIndicesUntilTheyAreReclaimed) {
  IndexPool pool(1, {});
  const auto index = pool.take();
  pool.retire(*index);
  EXPECT_FALSE(pool.take());
  EXPECT_EQ(pool.retired(), 1u);
  pool.reclaim([](std::uint32_t) { return false; });
  EXPECT_EQ(pool.take(), index);
}

TEST(IndexPool, HoldsIndicesThatAreNotOver) {
  IndexPool pool(2, {});
  const auto first = pool.take();
  const auto second = pool.take();
  pool.retire(*first);
  pool.retire(*second);
  pool.reclaim([&](std::uint32_t index) { return index == *first; });
  EXPECT_EQ(pool.retired(), 0u) << "a grace period would not free it";
  EXPECT_EQ(pool.take(), second);
  EXPECT_FALSE(pool.take());
  ASSERT_EQ(pool.held().size(), 1u);
  pool.reclaim([](std::uint32_t) { return false; });
  EXPECT_TRUE(pool.held().empty());
  EXPECT_EQ(pool.take(), first);
}

TEST(ExtentPool, KeepsRetiredExtentsUntilTheyAreReclaimed) {
  ExtentPool pool(1, 10);
  const auto offset = pool.take(10);
  ASSERT_EQ(offset, 1u);
  pool.retire(*offset, 10);
  EXPECT_FALSE(pool.take(1));
  EXPECT_EQ(pool.retired(), 10u);
  pool.reclaim();
  EXPECT_EQ(pool.retired(), 0u);
  EXPECT_EQ(pool.take(10), 1u);
}

TEST(ExtentPool, JoinsFreeNeighbours) {
  ExtentPool pool(1, 9);
  const auto a = pool.take(3);
  const auto b = pool.take(3);
  const auto c = pool.take(3);
  ASSERT_TRUE(a && b && c);
  pool.give_back(*a, 3);
  pool.give_back(*c, 3);
  EXPECT_FALSE(pool.take(4));
  pool.give_back(*b, 3);
  EXPECT_EQ(pool.take(9), 1u);
}

TEST(ExtentPool, TakesTheSmallestExtentThatFits) {
  ExtentPool pool(1, 20);
  const auto a = pool.take(8);
  const auto b = pool.take(1);
  const auto c = pool.take(4);
  const auto d = pool.take(7);
  ASSERT_TRUE(a && b && c && d);
  pool.give_back(*a, 8);
  pool.give_back(*c, 4);
  EXPECT_EQ(pool.take(3), *c);
}

TEST(ExtentPool, TakesAGivenExtentOnlyWhenItIsFree) {
  ExtentPool pool(1, 10);
  EXPECT_TRUE(pool.take_at(4, 3));
  EXPECT_FALSE(pool.take_at(6, 1));
  EXPECT_FALSE(pool.take_at(3, 2));
  EXPECT_FALSE(pool.take_at(10, 2));
  EXPECT_FALSE(pool.take_at(0, 1));
  EXPECT_TRUE(pool.take_at(1, 3));
  EXPECT_TRUE(pool.take_at(7, 4));
  EXPECT_FALSE(pool.take(1));
}

TEST(ExtentPool, NeverHandsOutAnEntryTwice) {
  std::mt19937 random(3);
  constexpr std::uint32_t capacity = 400;
  ExtentPool pool(1, capacity);
  std::vector<bool> used(capacity + 1);
  std::vector<std::pair<std::uint32_t, std::uint32_t>> taken;
  for (int round = 0; round < 20000; ++round) {
    const auto size = static_cast<std::uint32_t>(random() % 9 + 1);
    if (const auto offset = random() % 2 == 0 ? pool.take(size) : std::nullopt; offset) {
      for (std::uint32_t i = *offset; i < *offset + size; ++i) {
        ASSERT_LE(i, capacity);
        ASSERT_FALSE(used[i]);
        used[i] = true;
      }
      taken.emplace_back(*offset, size);
    } else if (!taken.empty()) {
      std::swap(taken[random() % taken.size()], taken.back());
      const auto [at, length] = taken.back();
      taken.pop_back();
      for (std::uint32_t i = at; i < at + length; ++i) {
        used[i] = false;
      }
      pool.give_back(at, length);
    }
  }
  for (const auto& [at, length] : taken) {
    pool.give_back(at, length);
  }
  EXPECT_EQ(pool.take(capacity), 1u) << "everything given back is one extent again";
}

}  // namespace
