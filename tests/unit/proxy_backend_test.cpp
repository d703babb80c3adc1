// SPDX-License-Identifier: BSD-2-Clause
//
// What the userspace engine knows of backends and clients: who is dead, who was where, who may come.
#include <gtest/gtest.h>

#include <atomic>
#include <boost/asio/ip/address.hpp>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "fallback_proxy/affinity.h"
#include "fallback_proxy/allowed.h"
#include "fallback_proxy/backend.h"

namespace {

using namespace std::chrono_literals;
using boost::asio::ip::make_address;
using userspace::Affinity;
using userspace::Allowed;
using userspace::Backend;
using userspace::Clock;
using userspace::SocketAddress;

const Clock::time_point start = Clock::now();

class Marking : public testing::Test {
 protected:
  Backend backend_{make_address("10.0.0.1"), 80};
};

TEST_F(Marking, ABackendThatNeverFailedAdmits) {
  EXPECT_TRUE(backend_.admits(start));
  EXPECT_FALSE(backend_.is_marked(start));
}

TEST_F(Marking, AFailureKeepsItFreeForASecond) {
  backend_.failed(start);
  EXPECT_TRUE(backend_.is_marked(start));
  EXPECT_FALSE(backend_.admits(start));
  EXPECT_FALSE(backend_.admits(start + 999ms));
  EXPECT_FALSE(backend_.is_marked(start + 1s));
  EXPECT_TRUE(backend_.admits(start + 1s));
}

TEST_F(Marking, IsToldOnceUntilItIsReachedAgain) {
  EXPECT_FALSE(backend_.connected());
  EXPECT_EQ(backend_.failed(start), 1s);
  EXPECT_EQ(backend_.failed(start + 1s), std::nullopt);
  EXPECT_EQ(backend_.failed(start + 3s), std::nullopt);
  EXPECT_TRUE(backend_.connected());
  EXPECT_FALSE(backend_.connected());
  EXPECT_EQ(backend_.failed(start + 4s), 1s);
}

TEST_F(Marking, IsToldOnceASecondWhereFailuresAndSuccessesAlternate) {
  int told = 0;
  for (int i = 0; i < 3000; ++i) {
    told += backend_.failed(start + i * 1ms).has_value();
    backend_.connected();
  }
  EXPECT_EQ(told, 3);
}

TEST_F(Marking, OneTriesItAgainAndTheOthersWait) {
  backend_.failed(start);
  EXPECT_TRUE(backend_.admits(start + 1s));
  EXPECT_FALSE(backend_.admits(start + 1s));
  // Should it never tell how it went, another one tries.
  EXPECT_TRUE(backend_.admits(start + 2s));
}

TEST_F(Marking, OneOfManyThreadsTriesItAgain) {
  backend_.failed(start);
  std::atomic<int> admitted = 0;
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) threads.emplace_back([&] { admitted += backend_.admits(start + 1s); });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(admitted, 1);
}

TEST_F(Marking, ThePauseDoublesUpTo32Seconds) {
  auto now = start;
  for (const auto pause : {1s, 2s, 4s, 8s, 16s, 32s, 32s, 32s}) {
    backend_.failed(now);
    EXPECT_FALSE(backend_.admits(now + pause - 1ms)) << pause.count();
    now += pause;
    EXPECT_TRUE(backend_.admits(now)) << pause.count();
  }
}

TEST_F(Marking, ASuccessForgetsAllFailures) {
  for (int i = 0; i < 5; ++i) backend_.failed(start);
  backend_.connected();
  EXPECT_TRUE(backend_.admits(start));
  EXPECT_TRUE(backend_.admits(start));
  backend_.failed(start);
  EXPECT_TRUE(backend_.admits(start + 1s));
}

TEST_F(Marking, CountsWhatCameOfIt) {
  backend_.failed(start);
  backend_.failed(start);
  backend_.connected();
  EXPECT_EQ(backend_.failures, 2U);
  EXPECT_EQ(backend_.connects, 1U);
}

class ClientAffinity : public testing::Test {
 protected:
  static std::shared_ptr<Backend> make(const char* address) {
    return std::make_shared<Backend>(make_address(address), std::uint16_t{80});
  }

  const std::shared_ptr<Backend> one_ = make("10.0.0.1");
  const std::shared_ptr<Backend> two_ = make("10.0.0.2");
  Affinity affinity_;
};

TEST_F(ClientAffinity, FindsWhoWasReachedLast) {
  EXPECT_EQ(affinity_.find(1, start), nullptr);
  affinity_.remember(1, one_, start, 1h, 10);
  affinity_.remember(2, two_, start, 1h, 10);
  EXPECT_EQ(affinity_.find(1, start), one_);
  EXPECT_EQ(affinity_.find(2, start), two_);
  affinity_.remember(1, two_, start, 1h, 10);
  EXPECT_EQ(affinity_.find(1, start), two_);
}

TEST_F(ClientAffinity, EndsWithItsTime) {
  affinity_.remember(1, one_, start, 1h, 10);
  EXPECT_EQ(affinity_.find(1, start + 1h - 1ms), one_);
  EXPECT_EQ(affinity_.find(1, start + 1h), nullptr);
}

TEST_F(ClientAffinity, BeginsAnewWithEachConnection) {
  affinity_.remember(1, one_, start, 1h, 10);
  affinity_.remember(1, one_, start + 50min, 1h, 10);
  EXPECT_EQ(affinity_.find(1, start + 100min), one_);
}

TEST_F(ClientAffinity, ForgetsWhoCameLongestAgoAtTheLimit) {
  for (std::uint64_t client = 0; client < 10; ++client) affinity_.remember(client, one_, start, 1h, 10);
  affinity_.remember(0, one_, start, 1h, 10);
  affinity_.remember(10, one_, start, 1h, 10);
  EXPECT_EQ(affinity_.find(0, start), one_);
  EXPECT_EQ(affinity_.find(1, start), nullptr);
  EXPECT_EQ(affinity_.find(2, start), one_);
  EXPECT_EQ(affinity_.find(10, start), one_);
}

TEST_F(ClientAffinity, LetsGoOfBackendsWhoseTimeIsOver) {
  affinity_.remember(1, one_, start, 1min, 10);
  affinity_.remember(2, two_, start, 1h, 10);
  EXPECT_EQ(one_.use_count(), 2);
  affinity_.remember(3, two_, start + 1min, 1h, 10);
  EXPECT_EQ(one_.use_count(), 1);
}

TEST_F(ClientAffinity, TakesALowerLimitOfALaterConfiguration) {
  for (std::uint64_t client = 0; client < 10; ++client) affinity_.remember(client, one_, start, 1h, 10);
  affinity_.remember(10, two_, start, 1h, 2);
  EXPECT_EQ(affinity_.find(9, start), one_);
  EXPECT_EQ(affinity_.find(10, start), two_);
  EXPECT_EQ(affinity_.find(8, start), nullptr);
}

bool contains(const Allowed& allowed, const char* client) {
  return allowed.contains(SocketAddress(make_address(client), 50000));
}

TEST(AllowedClients, AreLoopbackAndOwnAddressesByDefault) {
  const std::vector<config::Address> own = {make_address("192.0.2.1"), make_address("2001:db8::1")};
  const Allowed allowed({}, own);
  for (const char* client : {"127.0.0.1", "127.9.9.9", "::1", "192.0.2.1", "2001:db8::1"})
    EXPECT_TRUE(contains(allowed, client)) << client;
  for (const char* client : {"192.0.2.2", "128.0.0.1", "2001:db8::2", "::2", "10.0.0.1"})
    EXPECT_FALSE(contains(allowed, client)) << client;
}

TEST(AllowedClients, AreThoseOfTheNetworksGiven) {
  const std::vector<std::string> networks = {"10.244.0.0/16", "192.0.2.7/32", "2001:db8:1::/48"};
  const Allowed allowed(networks, {});
  for (const char* client : {"10.244.0.0", "10.244.255.255", "192.0.2.7", "2001:db8:1:ffff::1"})
    EXPECT_TRUE(contains(allowed, client)) << client;
  for (const char* client : {"10.243.255.255", "10.245.0.0", "192.0.2.6", "192.0.2.8", "2001:db8:2::"})
    EXPECT_FALSE(contains(allowed, client)) << client;
}

TEST(AllowedClients, AreAllOfOneFamilyWithItsWidestNetwork) {
  const std::vector<std::string> v4 = {"0.0.0.0/0"};
  EXPECT_TRUE(contains(Allowed(v4, {}), "8.8.8.8"));
  EXPECT_FALSE(contains(Allowed(v4, {}), "2001:db8::1"));
  const std::vector<std::string> v6 = {"::/0"};
  EXPECT_TRUE(contains(Allowed(v6, {}), "2001:db8::1"));
  EXPECT_FALSE(contains(Allowed(v6, {}), "8.8.8.8"));
}

TEST(AllowedClients, OfALinkLocalAddressAreKnownWithoutTheirDevice) {
  const std::vector<config::Address> own = {make_address("fe80::1%1")};
  EXPECT_TRUE(contains(Allowed({}, own), "fe80::1"));
}

}  // namespace
