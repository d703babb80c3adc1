// SPDX-License-Identifier: BSD-2-Clause
//
// Which backend a service of the userspace engine chooses: `eject`, `panic`, what is down, least_conn by weight.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <boost/asio/ip/address.hpp>
#include <cerrno>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "fallback_proxy/service.h"

namespace {

using namespace std::chrono_literals;
using boost::asio::ip::make_address;
using config::BackendState;
using testing::ElementsAre;
using testing::IsEmpty;
using userspace::Backend;
using userspace::BackendPointer;
using userspace::Clock;
using userspace::Random;
using userspace::Service;
using userspace::ServiceState;
using userspace::SocketAddress;

const Clock::time_point start = Clock::now();

/// A service whose backends are 10.0.0.1:80, 10.0.0.2:80, ...; more than one of them has the same backends and state,
/// as after reloads.
class Choosing : public testing::Test {
 protected:
  Choosing() {
    state_->report = [this](spdlog::level::level_enum, const std::string& line) {
      const std::scoped_lock lock(mutex_);  // of what several threads report
      log_.push_back(line);
    };
  }

  config::Service settings(std::size_t count) {
    config::Service settings;
    settings.name = "web";
    for (std::size_t i = 0; i < count; ++i) {
      const auto address = make_address("10.0.0." + std::to_string(i + 1));
      settings.backends.push_back({.address = address, .port = 80, .position = {}});
      if (i == backends_.size()) backends_.push_back(std::make_shared<Backend>(address, std::uint16_t{80}));
    }
    return settings;
  }
  config::Service ejecting(std::size_t count, std::uint32_t failures = 3, std::chrono::milliseconds time = 1h) {
    config::Service result = settings(count);
    result.eject = config::Eject{.failures = failures, .time = time};
    return result;
  }
  Service service(const config::Service& settings) {
    return {settings, {backends_.begin(), backends_.begin() + static_cast<long>(settings.backends.size())}, state_};
  }

  /// Those that 200 connections are given, by their last number.
  std::set<int> chosen(const Service& service) {
    std::set<int> seen;
    for (int i = 0; i < 200; ++i) {
      const BackendPointer backend = service.choose(client_, {}, random_);
      if (backend) seen.insert(backend->address.address().to_v4().to_bytes()[3]);
    }
    return seen;
  }
  void fail(const Service& service, std::size_t backend, int times = 1, Clock::time_point now = Clock::now()) {
    for (int i = 0; i < times; ++i) service.failed(*backends_[backend], ECONNREFUSED, now);
  }

  const SocketAddress client_{make_address("127.0.0.1"), 50000};
  const std::shared_ptr<ServiceState> state_ = std::make_shared<ServiceState>();
  std::vector<BackendPointer> backends_;
  std::mutex mutex_;
  std::vector<std::string> log_;
  Random random_{1};
};

TEST_F(Choosing, EjectsAfterSoManyFailuresInARowAndNotBefore) {
  const Service web = service(ejecting(2));
  fail(web, 0, 2);
  EXPECT_THAT(chosen(web), ElementsAre(1, 2)) << "two failures are not three";
  EXPECT_THAT(log_, IsEmpty());
  fail(web, 0);
  EXPECT_THAT(chosen(web), ElementsAre(2));
  EXPECT_THAT(log_, ElementsAre("service web: backend 10.0.0.1:80 does not answer: Connection refused; "
                                "ejected for 3600 s"));
}

TEST_F(Choosing, EjectionTellsItsTimeInMilliseconds) {
  const Service web = service(ejecting(2, 1, 1500ms));
  fail(web, 0);
  EXPECT_THAT(log_, ElementsAre(testing::HasSubstr("; ejected for 1500 ms")));
}

TEST_F(Choosing, ASuccessBeginsTheRowAnew) {
  const Service web = service(ejecting(2));
  for (int i = 0; i < 5; ++i) {
    fail(web, 0, 2);
    web.reached(*backends_[0]);
  }
  EXPECT_THAT(chosen(web), ElementsAre(1, 2));
  EXPECT_EQ(backends_[0]->failures, 10U);
  EXPECT_EQ(backends_[0]->connects, 5U);
  EXPECT_THAT(log_, IsEmpty()) << "nothing was ejected";
}

TEST_F(Choosing, WithoutEjectOneFailureMarks) {
  const Service web = service(settings(2));
  fail(web, 0);
  EXPECT_THAT(chosen(web), ElementsAre(2));
  EXPECT_EQ(backends_[0]->mark_left(start).has_value(), true);
}

TEST_F(Choosing, EjectsAtMostHalfOfTheBackends) {
  const Service web = service(ejecting(5));
  for (std::size_t i = 0; i < 5; ++i) fail(web, i, 10);
  EXPECT_THAT(chosen(web), ElementsAre(3, 4, 5)) << "two of five";
}

TEST_F(Choosing, ManyThreadsEjectAtMostHalf) {
  const Service web = service(ejecting(8, 1));
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < 8; ++i) threads.emplace_back([&, i] { fail(web, i, 100); });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(chosen(web).size(), 4U);
}

TEST_F(Choosing, ALoneBackendIsNeverEjected) {
  const Service web = service(ejecting(1));
  fail(web, 0, 100);
  EXPECT_THAT(chosen(web), ElementsAre(1));
  EXPECT_FALSE(backends_[0]->is_marked(start));
}

TEST_F(Choosing, EjectedOnesThatAreDownOrDrainLeaveRoomForOthers) {
  config::Service four = ejecting(4);
  const Service before = service(four);
  fail(before, 0, 3);
  fail(before, 1, 3);
  fail(before, 2, 3);
  EXPECT_THAT(chosen(before), ElementsAre(3, 4));
  // Of the two that are left to choose from, one may be ejected.
  four.backends[0].state = BackendState::down;
  four.backends[1].state = BackendState::drain;
  const Service after = service(four);
  fail(after, 2);
  EXPECT_THAT(chosen(after), ElementsAre(4));
}

TEST_F(Choosing, AnEjectionEndsWithItsTimeAndDoublesUpToSixteenTimes) {
  const Service web = service(ejecting(2, 3, 10s));
  Backend& backend = *backends_[0];
  auto now = start;
  fail(web, 0, 2, now);
  for (const auto time : {10s, 20s, 40s, 80s, 160s, 160s, 160s}) {
    // The row goes on beyond the ejection: one failure more is enough.
    fail(web, 0, 1, now);
    EXPECT_EQ(backend.mark_left(now), Clock::duration(time));
    EXPECT_TRUE(backend.is_marked(now + time - 1ms));
    now += time;
    EXPECT_FALSE(backend.is_marked(now));
  }
}

TEST_F(Choosing, ASuccessAfterAnEjectionForgetsTheDoubling) {
  const Service web = service(ejecting(2, 3, 10ms));
  fail(web, 0, 3, start - 2s);
  fail(web, 0, 1, start - 1s);
  EXPECT_EQ(backends_[0]->mark_left(start - 1s), Clock::duration(20ms));
  web.reached(*backends_[0]);
  EXPECT_THAT(log_, ElementsAre(testing::HasSubstr("ejected for 10 ms"), testing::HasSubstr("answers again")));
  fail(web, 0, 2, start);
  EXPECT_FALSE(backends_[0]->is_marked(start));
  fail(web, 0, 1, start);
  EXPECT_EQ(backends_[0]->mark_left(start), Clock::duration(10ms));
}

TEST_F(Choosing, WhatBeganBeforeAnEjectionNeitherEndsNorProlongsIt) {
  const Service web = service(ejecting(2, 3, 1h));
  fail(web, 0, 3);
  const auto left = backends_[0]->mark_left(start);
  fail(web, 0, 10);
  web.reached(*backends_[0]);
  EXPECT_EQ(backends_[0]->mark_left(start), left);
  EXPECT_THAT(chosen(web), ElementsAre(2));
}

TEST_F(Choosing, AnEjectedBackendIsTriedWhenNoOtherIsLeft) {
  const Service web = service(ejecting(2));
  fail(web, 0, 3);
  const std::vector<BackendPointer> tried = {backends_[1]};
  EXPECT_EQ(web.choose(client_, tried, random_), backends_[0]);
}

TEST_F(Choosing, AffinityLetsGoOfAnEjectedBackend) {
  config::Service sticky = ejecting(2);
  sticky.affinity = 1h;
  const Service web = service(sticky);
  web.remember(client_, backends_[0], 10);
  EXPECT_THAT(chosen(web), ElementsAre(1));
  fail(web, 0, 3);
  EXPECT_THAT(chosen(web), ElementsAre(2));
}

TEST_F(Choosing, WhatIsDownIsNotChosen) {
  for (const auto policy :
       {config::Policy::random, config::Policy::round_robin, config::Policy::least_conn, config::Policy::maglev}) {
    config::Service three = settings(3);
    three.policy = policy;
    three.client = config::Client::socket;
    three.backends[1].state = BackendState::down;
    three.backends[2].state = BackendState::drain;
    EXPECT_THAT(chosen(service(three)), ElementsAre(1));
  }
}

TEST_F(Choosing, WithoutPanicNothingIsChosenWhileAllAreDown) {
  config::Service two = settings(2);
  for (auto& backend : two.backends) backend.state = BackendState::down;
  const Service web = service(two);
  EXPECT_TRUE(web.is_empty());
  EXPECT_THAT(chosen(web), IsEmpty());
}

TEST_F(Choosing, WithPanicThoseThatAreDownAreChosenFromButNoneThatDrains) {
  config::Service three = settings(3);
  three.panic = true;
  for (auto& backend : three.backends) backend.state = BackendState::down;
  three.backends[2].state = BackendState::drain;
  const Service web = service(three);
  EXPECT_FALSE(web.is_empty());
  EXPECT_THAT(chosen(web), ElementsAre(1, 2));
  EXPECT_TRUE(web.is_active(*backends_[0]));
  EXPECT_FALSE(web.is_active(*backends_[2]));
}

TEST_F(Choosing, PanicDoesNothingWhileABackendIsUp) {
  config::Service three = settings(3);
  three.panic = true;
  three.backends[0].state = BackendState::down;
  three.backends[1].state = BackendState::down;
  EXPECT_THAT(chosen(service(three)), ElementsAre(3));
}

TEST_F(Choosing, PanicOverDrainingBackendsIsNone) {
  config::Service two = settings(2);
  two.panic = true;
  for (auto& backend : two.backends) backend.state = BackendState::drain;
  EXPECT_TRUE(service(two).is_empty());
}

TEST_F(Choosing, LeastConnKeepsLiveConnectionsInProportionToWeights) {
  config::Service three = settings(3);
  three.policy = config::Policy::least_conn;
  const std::vector<std::uint32_t> weights = {1, 2, 5};
  for (std::size_t i = 0; i < 3; ++i) three.backends[i].weight = weights[i];
  const Service web = service(three);
  for (int i = 0; i < 8000; ++i) ++web.choose(client_, {}, random_)->live;
  for (std::size_t i = 0; i < 3; ++i) EXPECT_NEAR(backends_[i]->live, 1000.0 * weights[i], 15) << weights[i];
}

TEST_F(Choosing, LeastConnOfTwoAlwaysTakesTheLessLoadedForItsWeight) {
  config::Service two = settings(2);
  two.policy = config::Policy::least_conn;
  two.backends[0].weight = 10;
  const Service web = service(two);
  backends_[0]->live = 100;
  backends_[1]->live = 9;
  EXPECT_THAT(chosen(web), ElementsAre(2));
  backends_[1]->live = 11;
  EXPECT_THAT(chosen(web), ElementsAre(1));
}

TEST_F(Choosing, LeastConnDrawsIdleBackendsByWeight) {
  config::Service two = settings(2);
  two.policy = config::Policy::least_conn;
  two.backends[0].weight = 9;
  const Service web = service(two);
  int first = 0;
  for (int i = 0; i < 10000; ++i) first += web.choose(client_, {}, random_) == backends_[0];
  EXPECT_NEAR(first, 9000, 150) << "a standard deviation is 30";
}

}  // namespace
