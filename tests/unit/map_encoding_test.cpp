// SPDX-License-Identifier: BSD-2-Clause
#include "plugin/map_encoding.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "balance/hash.h"

namespace {

using boost::asio::ip::make_address;
using config::BackendState;
using plugin::encode_key;

config::Backend backend(const char* address, std::uint32_t weight, BackendState state = BackendState::active) {
  return {.address = make_address(address), .port = 8080, .weight = weight, .state = state, .position = {}};
}

TEST(MapEncoding, WritesIpv4KeysAsMappedAddressesInNetworkOrder) {
  const auto key = encode_key(make_address("10.96.0.10"), 80, config::Protocol::tcp);
  const std::array<std::uint8_t, 20> expected = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 96, 0, 10, 0, 80, 6, 0};
  EXPECT_EQ(std::memcmp(&key, expected.data(), expected.size()), 0);
}

TEST(MapEncoding, WritesIpv6KeysInNetworkOrder) {
  const auto key = encode_key(make_address("fd00::1:2"), 53, config::Protocol::udp);
  const std::array<std::uint8_t, 20> expected = {0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 2, 0, 53, 17, 0};
  EXPECT_EQ(std::memcmp(&key, expected.data(), expected.size()), 0);
}

TEST(MapEncoding, TellsProtocolsAndPortsOfOneVipApartButNotTheirMarker) {
  const auto vip = make_address("10.96.0.10");
  const auto tcp = encode_key(vip, 53, config::Protocol::tcp);
  const auto udp = encode_key(vip, 53, config::Protocol::udp);
  EXPECT_FALSE(tcp == udp);
  EXPECT_FALSE(tcp == encode_key(vip, 54, config::Protocol::tcp));
  EXPECT_TRUE(plugin::marker_of(tcp) == plugin::marker_of(udp));
  EXPECT_TRUE(plugin::is_marker(plugin::marker_of(tcp)));
  EXPECT_FALSE(plugin::is_marker(tcp));
}

TEST(MapEncoding, ReadsBackWhatItWrites) {
  config::Service service;
  service.name = std::string(config::max_name_length, 'n');
  service.vip = make_address("192.10.100.100");
  service.port = 5201;
  service_record record{};
  record.word = 42;
  plugin::encode_record(service, record);
  const auto read = plugin::decode_service(record);
  EXPECT_EQ(read.name, service.name);
  EXPECT_EQ(read.vip, service.vip);
  EXPECT_EQ(read.port, 5201);
  EXPECT_EQ(read.protocol, config::Protocol::tcp);
  EXPECT_EQ(record.word, 42u) << "the word belongs to the publication";

  const auto drained = plugin::decode_backend(plugin::encode_backend(backend("10.0.0.7", 9, BackendState::drain), 3));
  EXPECT_EQ(drained.address, make_address("10.0.0.7"));
  EXPECT_EQ(drained.port, 8080);
  EXPECT_EQ(drained.weight, 9u);
  EXPECT_EQ(drained.state, BackendState::drain);
}

TEST(MapEncoding, GivesSlotsToActiveBackendsOnly) {
  config::Service service;
  service.no_backend = config::NoBackend::unreachable;
  service.backends = {backend("10.0.0.1", 1), backend("10.0.0.2", 5, BackendState::drain), backend("10.0.0.3", 3)};
  ASSERT_EQ(plugin::block_size(service), 3u);
  const std::vector<std::uint32_t> indices = {100, 200, 300};
  std::vector<block_entry> block(3);
  plugin::encode_block(service, 7, indices, false, block);

  EXPECT_EQ(block[0].header.record, 7u);
  EXPECT_EQ(block[0].header.no_backend, NO_BACKEND_UNREACHABLE);
  double first = 0;
  double third = 0;
  for (const auto& entry : {block[1].slot, block[2].slot}) {
    const double own = entry.threshold / 4294967296.0 / 2;
    (entry.backend == 100 ? first : third) += own;
    (entry.alias == 100 ? first : third) += 0.5 - own;
    EXPECT_TRUE(entry.backend == 100 || entry.backend == 300) << entry.backend;
    EXPECT_TRUE(entry.alias == 100 || entry.alias == 300) << entry.alias;
  }
  EXPECT_NEAR(first, 0.25, 1e-9);
  EXPECT_NEAR(third, 0.75, 1e-9);
}

TEST(MapEncoding, MakesABlockOfOneHeaderForAServiceWithoutBackends) {
  config::Service service;
  service.no_backend = config::NoBackend::pass;
  ASSERT_EQ(plugin::block_size(service), 1u);
  std::vector<block_entry> block(1);
  plugin::encode_block(service, 1, {}, false, block);
  EXPECT_EQ(block[0].header.no_backend, NO_BACKEND_PASS);
}

TEST(MapEncoding, PacksABlockIntoOneWord) {
  std::vector<block_entry> map(10);
  const auto word = plugin::encode_word({.header = 3, .slots = 6, .more = 0});
  const auto block = plugin::find_block(word, map);
  ASSERT_TRUE(block);
  EXPECT_EQ(block->header, 3u);
  EXPECT_EQ(block->slots, 6u);
  EXPECT_EQ(block->size(), 7u);
  EXPECT_NE(plugin::encode_word({.header = 1, .slots = 0, .more = 0}), 0u) << "0 means that there is no service";
}

TEST(MapEncoding, BlockThatDoesNotLieWithinTheMapIsNone) {
  std::vector<block_entry> map(10);
  for (const auto word : {std::uint64_t{0}, std::uint64_t{7} << 32 | 3, std::uint64_t{0xffffffff} << 32 | 1,
                          std::uint64_t{0xffffffff}, ~std::uint64_t{0}})
    EXPECT_FALSE(plugin::find_block(word, map)) << word;

  // With BLOCK_EJECT, an entry after the slots says how many more there are.
  const std::uint64_t word = std::uint64_t{2} << 32 | 3;
  map[3].header.flags = BLOCK_EJECT;
  struct {
    std::uint32_t members;
    std::uint32_t first;
    std::uint32_t size;  // 0: damaged
  } const rows[] = {{2, 1, 4}, {3, 4, 7}, {0, 4, 4}, {4, 4, 0}, {3, 1, 0}, {2, 5, 0}, {0xffffffff, 4, 0}, {2, 0, 0}};
  for (const auto& [members, first, size] : rows) {
    map[6].eject = {.time = 1, .failures = 1, .zero = 0, .members = members, .first = first};
    const auto block = plugin::find_block(word, map);
    EXPECT_EQ(block ? block->size() : 0, size) << members << " members from " << first;
  }
  EXPECT_FALSE(plugin::find_block(std::uint64_t{6} << 32 | 3, map)) << "the entry itself lies outside";
}

config::Service ejecting(config::Policy policy) {
  config::Service service;
  service.policy = policy;
  service.eject = {.failures = 5, .time = std::chrono::milliseconds(1500)};
  service.panic = true;
  service.health.emplace();
  service.backends = {backend("10.0.0.1", 2), backend("10.0.0.2", 5, BackendState::drain), backend("10.0.0.3", 4),
                      backend("10.0.0.4", 1, BackendState::down)};
  return service;
}

TEST(MapEncoding, MembersOfAnEjectingServiceAreEachBackendOnce) {
  const std::vector<std::uint32_t> indices = {100, 200, 300, 400};
  for (const auto policy :
       {config::Policy::random, config::Policy::round_robin, config::Policy::least_conn, config::Policy::maglev}) {
    const config::Service service = ejecting(policy);
    const plugin::Block plan = plugin::plan_block(service);
    std::vector<block_entry> map(1 + plan.size());  // slot 0 is not used
    plugin::encode_block(service, 7, indices, false, std::span(map).subspan(1));
    const auto block = plugin::find_block(plugin::encode_word({.header = 1, .slots = plan.slots, .more = 0}), map);
    ASSERT_TRUE(block);
    EXPECT_EQ(block->size(), plan.size());
    const auto members = plugin::members_of(*block, map);
    ASSERT_EQ(members.size(), 2u);
    EXPECT_EQ(members[0].slot.backend, 100u);
    EXPECT_EQ(members[1].slot.backend, 300u);
    EXPECT_EQ(map[2].slot.choices, 2u);

    config::Service read;
    plugin::decode_block(*block, map, read);
    EXPECT_EQ(read.policy, policy);
    ASSERT_TRUE(read.eject);
    EXPECT_EQ(read.eject->failures, 5u);
    EXPECT_EQ(read.eject->time, std::chrono::milliseconds(1500));
    EXPECT_TRUE(read.panic);
    EXPECT_TRUE(read.health);
  }
}

TEST(MapEncoding, EjectingServiceWithoutBackendsKeepsWhatItAsksFor) {
  config::Service service;
  service.eject.emplace();
  service.policy = config::Policy::maglev;
  ASSERT_EQ(plugin::block_size(service), 2u);
  std::vector<block_entry> map(3);
  plugin::encode_block(service, 7, {}, false, std::span(map).subspan(1));
  const auto block = plugin::find_block(plugin::encode_word({.header = 1, .slots = 0, .more = 0}), map);
  ASSERT_TRUE(block);
  EXPECT_TRUE(plugin::members_of(*block, map).empty());
  config::Service read;
  plugin::decode_block(*block, map, read);
  EXPECT_TRUE(read.eject);
}

TEST(MapEncoding, PanicGivesSlotsToBackendsThatAreDownWhenNobodyIsActive) {
  config::Service service;
  service.panic = true;
  service.backends = {backend("10.0.0.1", 1, BackendState::down), backend("10.0.0.2", 1, BackendState::drain),
                      backend("10.0.0.3", 1, BackendState::down)};
  EXPECT_EQ(plugin::block_size(service), 3u);
  EXPECT_EQ(plugin::places_of(service), (std::vector<std::uint32_t>{0, NO_PLACE, 1}));
  auto record = plugin::encode_backend(service.backends[0], 1);
  plugin::update_backend(service.backends[0], service, 0, record);
  EXPECT_EQ(record.state, BACKEND_TRIED);
  EXPECT_EQ(plugin::decode_backend(record).state, BackendState::down);

  service.backends.push_back(backend("10.0.0.4", 1));
  EXPECT_EQ(plugin::places_of(service), (std::vector<std::uint32_t>{NO_PLACE, NO_PLACE, NO_PLACE, 0}));
  plugin::update_backend(service.backends[0], service, NO_PLACE, record);
  EXPECT_EQ(record.state, BACKEND_DOWN);
  service.panic = false;
  service.backends.pop_back();
  EXPECT_EQ(plugin::block_size(service), 1u);
}

TEST(MapEncoding, GroupsOfMembersAreDisjointAndNoLargerThanTheirBound) {
  for (std::uint32_t members = 1; members <= 200; ++members) {
    std::uint32_t next = 0;
    std::uint32_t may_be_ejected = 0;
    while (next < members) {
      const eject_group group = eject_group_of(next, members);
      ASSERT_EQ(group.first, next);
      ASSERT_GE(group.size, 1u);
      ASSERT_LE(group.size, std::uint32_t{EJECT_GROUP});
      ASSERT_TRUE(group.size >= EJECT_GROUP / 2 || members < EJECT_GROUP) << members;
      for (std::uint32_t place = next; place < next + group.size; ++place)
        ASSERT_EQ(eject_group_of(place, members).first, group.first) << place << " of " << members;
      next += group.size;
      may_be_ejected += group.size / 2;
    }
    ASSERT_EQ(next, members);
    ASSERT_LE(may_be_ejected, members / 2);
  }
  const eject_group last = eject_group_of(65534, 65535);
  EXPECT_EQ(last.first + last.size, 65535u);
}

TEST(MapEncoding, BackendOfAServiceWithoutEjectIsNotEjected) {
  config::Service service = ejecting(config::Policy::random);
  auto record = plugin::encode_backend(service.backends[0], 1);
  record.ejected_until = 42;
  record.failures = 3;
  record.ejections = 2;
  plugin::update_backend(service.backends[0], service, 5, record);
  EXPECT_EQ(record.ejected_until, 42u);
  EXPECT_EQ(record.failures, 3u);
  EXPECT_EQ(record.place, 5u);
  service.eject.reset();
  plugin::update_backend(service.backends[0], service, 5, record);
  EXPECT_EQ(record.ejected_until, 0u);
  EXPECT_EQ(record.failures, 0u);
  EXPECT_EQ(record.ejections, 0u);
  EXPECT_EQ(record.place, NO_PLACE);
}

/// The backend (as its Backend_Map index) that each of a thousand cgroups reaches, by the rule of the kernel's side.
std::vector<std::uint32_t> reached_by_cgroups(const config::Service& service,
                                              const std::vector<std::uint32_t>& indices) {
  std::vector<block_entry> block(plugin::block_size(service));
  plugin::encode_block(service, 0, indices, true, block);
  const auto slots = static_cast<std::uint32_t>(block.size() - 1);
  std::vector<std::uint32_t> reached;
  for (std::uint64_t id = 7000; id < 8000; ++id)  // ids of cgroups are given out in sequence
    reached.push_back(block[1 + balance::hash_slot(balance::hash_mix(id), slots)].slot.backend);
  return reached;
}

TEST(MapEncoding, MaglevMovesFewOfAThousandCgroupsAndNobodyTwice) {
  constexpr std::size_t backends = 10;
  config::Service service;
  service.policy = config::Policy::maglev;
  std::vector<std::uint32_t> indices;
  for (std::uint32_t i = 0; i < backends; ++i) {
    service.backends.push_back(backend(("10.244.0." + std::to_string(i + 1)).c_str(), 1));
    indices.push_back(100 + i);
  }
  const auto before = reached_by_cgroups(service, indices);
  int worst = 0;
  for (std::uint32_t leaver = 0; leaver < backends; ++leaver) {
    config::Service changed = service;
    changed.backends[leaver].state = BackendState::drain;
    const auto drained = reached_by_cgroups(changed, indices);
    auto left = indices;
    changed.backends.erase(changed.backends.begin() + leaver);
    left.erase(left.begin() + leaver);
    const auto after = reached_by_cgroups(changed, left);
    int moved = 0;
    for (std::size_t i = 0; i < before.size(); ++i) {
      moved += before[i] != after[i];
      ASSERT_NE(after[i], 100 + leaver);
      ASSERT_EQ(drained[i], after[i]) << "cgroup " << i << " moves a second time";
    }
    worst = std::max(worst, moved);
  }
  std::printf("when 1 of 10 backends leaves, at most %.1f %% of 1,000 cgroups move\n", worst / 10.0);
  EXPECT_GT(worst, 0);
  EXPECT_LE(worst, 150);
}

}  // namespace
