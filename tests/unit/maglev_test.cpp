// SPDX-License-Identifier: BSD-2-Clause
#include "balance/maglev.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "balance/hash.h"

namespace {

using balance::maglev_size;
using balance::maglev_table;
using balance::MaglevEntry;
using Entries = std::vector<MaglevEntry>;

Entries equal_entries(std::size_t count, std::uint64_t seed = 0) {
  Entries entries(count);
  for (std::size_t i = 0; i < count; ++i) entries[i].hash = balance::hash_pair(seed, i);
  return entries;
}

std::vector<std::uint32_t> slots_of(const Entries& entries) {
  std::vector<std::uint32_t> slots(entries.size());
  for (const std::uint32_t entry : maglev_table(entries)) ++slots.at(entry);
  return slots;
}

/// What a client would reach: the hash of its entry.
std::uint64_t reached(const Entries& entries, const std::vector<std::uint32_t>& table, std::uint64_t client) {
  return entries[table[balance::hash_slot(balance::hash_mix(client), static_cast<std::uint32_t>(table.size()))]].hash;
}

TEST(Hash, MixesAsSplitMix64Does) {
  // The first outputs of splitmix64.c for the seeds 0 and 1234567.
  constexpr std::uint64_t step = 0x9e3779b97f4a7c15;
  EXPECT_EQ(balance::hash_mix(0), 0xe220a8397b1dcdaf);
  EXPECT_EQ(balance::hash_mix(step), 0x6e789e6aa1b965f4);
  EXPECT_EQ(balance::hash_mix(1234567), 6457827717110365317u);
  EXPECT_EQ(balance::hash_mix(1234567 + step), 3203168211198807973u);
}

TEST(Hash, TellsTheOrderOfAPair) { EXPECT_NE(balance::hash_pair(1, 2), balance::hash_pair(2, 1)); }

TEST(Hash, FallsIntoEachSlotAndNoOther) {
  for (const std::uint32_t slots : {1u, 2u, 2039u, 1048573u}) {
    EXPECT_EQ(balance::hash_slot(0, slots), 0u);
    EXPECT_EQ(balance::hash_slot(~std::uint64_t{0}, slots), slots - 1);
  }
  EXPECT_EQ(balance::hash_slot(0x7fffffffffffffff, 2), 0u);
  EXPECT_EQ(balance::hash_slot(0x8000000000000000, 2), 1u);
}

TEST(Maglev, HasAPrimeNumberOfSlotsAndEnoughOfThem) {
  for (const std::size_t entries : {2u, 16u, 17u, 128u, 129u, 1024u, 1025u, 65535u}) {
    const std::uint32_t size = maglev_size(entries);
    for (std::uint32_t divisor = 2; divisor * divisor <= size; ++divisor) {
      ASSERT_NE(size % divisor, 0u) << size << " is a multiple of " << divisor;
    }
    EXPECT_GE(size, entries * (entries <= 1024 ? 127 : 16));
  }
}

TEST(Maglev, NeedsNoTableForOneEntryAndHasNoneForNone) {
  EXPECT_TRUE(maglev_table({}).empty());
  EXPECT_EQ(maglev_table(equal_entries(1)), std::vector<std::uint32_t>{0});
}

TEST(Maglev, LetsEntriesTakeTurns) {
  // Two permutations worked out by hand: the skip of an entry is hash_mix(hash) % 2038 + 1. Entry 0 begins at slot 5,
  // entry 1 also, and must go on by its skip.
  const Entries entries = {{.hash = 5}, {.hash = 5 + 2039}};
  const auto table = maglev_table(entries);
  EXPECT_EQ(table[5], 0u);
  EXPECT_EQ(table[(5 + balance::hash_mix(5 + 2039) % 2038 + 1) % 2039], 1u);
}

TEST(Maglev, SharesEquallyToOneSlot) {
  for (const std::size_t entries : {2u, 3u, 10u, 16u, 17u, 100u, 1000u}) {
    const auto slots = slots_of(equal_entries(entries));
    const auto [least, most] = std::ranges::minmax(slots);
    EXPECT_LE(most - least, 1u) << entries << " entries";
  }
}

TEST(Maglev, SharesByWeight) {
  std::mt19937 random(3);
  for (int round = 0; round < 50; ++round) {
    Entries entries = equal_entries(random() % 60 + 2, random());
    std::uint64_t total = 0;
    for (auto& entry : entries) total += entry.weight = static_cast<std::uint32_t>(random() % 1000 + 1);
    const auto slots = slots_of(entries);
    for (std::size_t i = 0; i < entries.size(); ++i) {
      const double share = static_cast<double>(entries[i].weight) / static_cast<double>(total);
      ASSERT_GE(slots[i], 1u);
      ASSERT_NEAR(slots[i], share * maglev_size(entries.size()), 1.5) << "weight " << entries[i].weight;
    }
  }
  EXPECT_EQ(slots_of({{.hash = 1, .weight = 1}, {.hash = 2, .weight = 65535}}), (std::vector<std::uint32_t>{1, 2038}));
}

TEST(Maglev, DependsOnRatiosOnly) {
  Entries entries = equal_entries(7);
  const auto table = maglev_table(entries);
  for (auto& entry : entries) entry.weight = 60;
  EXPECT_EQ(maglev_table(entries), table);
  for (std::uint32_t i = 0; i < entries.size(); ++i) entries[i].weight = i + 1;
  const auto weighted = maglev_table(entries);
  for (std::uint32_t i = 0; i < entries.size(); ++i) entries[i].weight = (i + 1) * 9000;
  EXPECT_EQ(maglev_table(entries), weighted);
}

TEST(Maglev, DependsOnTheSetNotOnTheOrder) {
  Entries entries = equal_entries(10);
  entries[3].weight = 5;
  Entries shuffled = entries;
  std::ranges::shuffle(shuffled, std::mt19937(4));
  const auto table = maglev_table(entries);
  const auto other = maglev_table(shuffled);
  for (std::size_t slot = 0; slot < table.size(); ++slot) {
    ASSERT_EQ(entries[table[slot]].hash, shuffled[other[slot]].hash);
  }
}

TEST(Maglev, SpreadsClientsWithConsecutiveIds) {
  const Entries entries = equal_entries(10);
  const auto table = maglev_table(entries);
  std::map<std::uint64_t, int> clients;
  for (std::uint64_t client = 5000; client < 105000; ++client) ++clients[reached(entries, table, client)];
  EXPECT_EQ(clients.size(), 10u);
  for (const auto& [entry, count] : clients) EXPECT_NEAR(count, 10000, 500);  // five standard deviations
}

/// The share of 100,000 clients that have another entry in `after`. `must`: of those that have to, since theirs left.
struct Moved {
  double all = 0;
  double must = 0;
};

Moved moved(const Entries& before, const Entries& after) {
  const auto old_table = maglev_table(before);
  const auto new_table = maglev_table(after);
  constexpr std::uint64_t clients = 100000;
  std::uint64_t all = 0;
  std::uint64_t must = 0;
  for (std::uint64_t client = 0; client < clients; ++client) {
    const std::uint64_t old_entry = reached(before, old_table, client);
    all += old_entry != reached(after, new_table, client);
    must += std::ranges::find(after, old_entry, &MaglevEntry::hash) == after.end();
  }
  return {.all = static_cast<double>(all) / clients, .must = static_cast<double>(must) / clients};
}

TEST(Maglev, MovesFewClientsWhenOneOfTenLeaves) {
  double worst = 0;
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    const Entries before = equal_entries(10, seed);
    for (std::ptrdiff_t leaver = 0; leaver < 10; ++leaver) {
      Entries after = before;
      after.erase(after.begin() + leaver);
      worst = std::max(worst, moved(before, after).all);
    }
  }
  RecordProperty("moved_percent_at_worst", std::to_string(100 * worst));
  EXPECT_LE(worst, 0.15);
}

TEST(Maglev, MovesFewClientsWhenAWeightedEntryLeavesOrItsWeightChanges) {
  Entries before = equal_entries(10);
  for (std::uint32_t i = 0; i < before.size(); ++i) before[i].weight = i + 1;
  double worst = 0;
  for (std::ptrdiff_t leaver = 0; leaver < 10; ++leaver) {
    Entries after = before;
    after.erase(after.begin() + leaver);
    const Moved share = moved(before, after);
    worst = std::max(worst, share.all - share.must);
  }
  RecordProperty("moved_without_need_percent_at_worst", std::to_string(100 * worst));
  EXPECT_LE(worst, 0.05);

  Entries heavier = before;
  heavier[4].weight = 6;  // from 5 of 55 to 6 of 56: 1.6 % must move
  EXPECT_LE(moved(before, heavier).all, 0.05);
}

TEST(Maglev, ChangesBackWhenAnEntryReturns) {
  const Entries before = equal_entries(10);
  Entries after = before;
  after.erase(after.begin() + 3);
  const auto without = maglev_table(after);
  after.push_back(before[3]);
  const auto table = maglev_table(before);
  const auto again = maglev_table(after);
  for (std::size_t slot = 0; slot < table.size(); ++slot) {
    ASSERT_EQ(before[table[slot]].hash, after[again[slot]].hash);
  }
}

TEST(Maglev, HoldsTheLargestService) {
  Entries entries = equal_entries(65535);
  for (std::uint32_t i = 0; i < entries.size(); ++i) entries[i].weight = i + 1;
  const auto slots = slots_of(entries);
  EXPECT_GE(*std::ranges::min_element(slots), 1u);
  EXPECT_NEAR(slots.back(), 32, 1);  // of 16 each on average
}

}  // namespace
