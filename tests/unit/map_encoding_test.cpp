// SPDX-License-Identifier: BSD-2-Clause
#include "plugin/map_encoding.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>
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
  const auto word = plugin::encode_word({.header = 0xfffffff0u, .slots = 65535});
  EXPECT_EQ(plugin::decode_word(word).header, 0xfffffff0u);
  EXPECT_EQ(plugin::decode_word(word).slots, 65535u);
  EXPECT_NE(plugin::encode_word({.header = 1, .slots = 0}), 0u) << "0 means that there is no service";
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
