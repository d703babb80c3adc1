// SPDX-License-Identifier: BSD-2-Clause
//
// Health checks, towards listeners on loopback. Whatever a test waits for, it waits for in the event loop.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/steady_timer.hpp>
#include <chrono>
#include <filesystem>
#include <functional>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "config/fd.h"
#include "health/checker.h"

namespace {

using namespace std::chrono_literals;
using boost::asio::io_context;
using boost::asio::ip::tcp;
using config::BackendState;
using health::Change;
using health::Checker;
using testing::ElementsAre;
using testing::IsEmpty;

const config::Address loopback = boost::asio::ip::make_address("127.0.0.1");

constexpr config::Health fast{.interval = 5ms, .timeout = 1s, .rise = 2, .fall = 3};

/// Runs what is asked of `io` until `is_done`. False when that takes too long.
bool run_until(io_context& io, const std::function<bool()>& is_done, std::chrono::milliseconds most = 20s) {
  const auto deadline = std::chrono::steady_clock::now() + most;
  while (!is_done()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    io.restart();
    io.run_one_for(100ms);
  }
  return true;
}

/// Accepts and closes. What it has accepted is counted.
class Server {
 public:
  explicit Server(io_context& io, const config::Address& address = loopback, std::uint16_t port = 0)
      : io_(io), endpoint_(address, port), port_(io, endpoint_.protocol()) {
    port_.set_option(tcp::acceptor::reuse_address(true));
    port_.bind(endpoint_);
    endpoint_ = port_.local_endpoint();
    listen();
  }

  void listen() {
    acceptor_ = std::make_shared<tcp::acceptor>(io_, endpoint_);
    accept(acceptor_);
  }
  void stop() { acceptor_->close(); }
  std::uint16_t port() const { return endpoint_.port(); }
  int accepted() const { return *accepted_; }

 private:
  void accept(const std::shared_ptr<tcp::acceptor>& acceptor) {
    acceptor->async_accept(
        [this, acceptor, accepted = accepted_](const boost::system::error_code& error, const tcp::socket&) {
          if (!acceptor->is_open()) return;
          if (!error) ++*accepted;
          accept(acceptor);
        });
  }

  io_context& io_;
  tcp::endpoint endpoint_;
  tcp::acceptor port_;  // keeps it: a check could be given it while nobody listens
  std::shared_ptr<tcp::acceptor> acceptor_;
  const std::shared_ptr<int> accepted_ = std::make_shared<int>(0);
};

config::Backend backend(std::uint16_t port, BackendState state = BackendState::active) {
  return {.address = loopback, .port = port, .state = state, .position = {}};
}

config::Service service(const std::string& name, std::vector<config::Backend> backends,
                        std::optional<config::Health> health = fast) {
  config::Service service;
  service.name = name;
  service.health = health;
  service.backends = std::move(backends);
  return service;
}

/// A checker, and what it has told.
struct Health : testing::Test {
  io_context io;
  std::vector<Change> changes;
  std::function<void()> when_changed;
  std::optional<Checker> checker{std::in_place, io, [this](std::span<const Change> news) {
                                   changes.insert(changes.end(), news.begin(), news.end());
                                   if (when_changed) when_changed();
                                 }};

  void apply(const std::vector<config::Service>& services) { checker->apply(services); }
  bool run_until_changed() {
    return run_until(io, [this, before = changes.size()] { return changes.size() > before; });
  }
  /// For as long as a check that should not be there would have had ample time.
  void run_for(std::chrono::milliseconds time) {
    boost::asio::steady_timer timer(io, time);
    bool is_over = false;
    timer.async_wait([&](const boost::system::error_code&) { is_over = true; });
    ASSERT_TRUE(run_until(io, [&] { return is_over; }));
  }
};

// NOLINTNEXTLINE(readability-identifier-naming): a matcher
MATCHER_P3(Says, name, is_up, reason, "") {
  *result_listener << "service " << arg.service << (arg.is_up ? " up" : " down") << " \"" << arg.reason << '"';
  return arg.service == name && arg.is_up == is_up && arg.reason == reason;
}

TEST_F(Health, FallsAfterSoManyFailuresAndRisesAfterSoManySuccesses) {
  Server server(io);
  apply({service("web", {backend(server.port())})});
  ASSERT_TRUE(run_until(io, [&] { return server.accepted() >= 5; }));
  EXPECT_THAT(changes, IsEmpty()) << "it is up from the beginning";

  server.stop();
  ASSERT_TRUE(run_until_changed());
  EXPECT_THAT(changes, ElementsAre(Says("web", false, "connection refused, 3 times in a row")));
  EXPECT_EQ(changes[0].address, loopback);
  EXPECT_EQ(changes[0].port, server.port());
  EXPECT_TRUE(checker->is_down("web", loopback, server.port()));

  server.listen();
  const int before = server.accepted();
  ASSERT_TRUE(run_until_changed());
  EXPECT_THAT(changes[1], Says("web", true, ""));
  EXPECT_FALSE(checker->is_down("web", loopback, server.port()));
  ASSERT_TRUE(run_until(io, [&] { return server.accepted() >= before + 2; })) << "two successes make it up";
}

TEST_F(Health, OneFailureIsEnoughWhereFallIsOne) {
  Server server(io);
  server.stop();
  apply({service("web", {backend(server.port())}, config::Health{.interval = 1h, .fall = 1})});
  ASSERT_TRUE(run_until_changed()) << "the first check comes within a second, whatever the interval";
  EXPECT_THAT(changes, ElementsAre(Says("web", false, "connection refused")));
}

TEST_F(Health, FewerFailuresInARowChangeNothing) {
  Server server(io);
  apply({service("web", {backend(server.port())},
                 config::Health{.interval = 5ms, .timeout = 1s, .rise = 1, .fall = 1000})});
  for (int i = 0; i < 3; ++i) {
    const int before = server.accepted();
    ASSERT_TRUE(run_until(io, [&] { return server.accepted() > before; }));
    server.stop();
    run_for(50ms);
    server.listen();
  }
  EXPECT_THAT(changes, IsEmpty());
}

TEST_F(Health, ABackendThatNeverAnswersFallsByItsTimeout) {
  // A queue of one, which is full: the kernel answers no further SYN.
  tcp::acceptor full(io);
  full.open(tcp::v4());
  full.bind({loopback, 0});
  full.listen(0);
  tcp::socket first(io);
  first.connect(full.local_endpoint());

  apply({service("web", {backend(full.local_endpoint().port())},
                 config::Health{.interval = 5ms, .timeout = 20ms, .rise = 1, .fall = 2})});
  ASSERT_TRUE(run_until_changed());
  EXPECT_THAT(changes, ElementsAre(Says("web", false, "no answer within 20 ms, 2 times in a row")));
}

TEST_F(Health, AnAnswerCountsAlthoughTheProcessWasHeldUpBeyondItsTimeout) {
  Server server(io, boost::asio::ip::address_v4::any());
  std::vector<config::Backend> backends;
  for (std::uint32_t i = 0; i < 300; ++i) {
    config::Backend another = backend(server.port());
    another.address = boost::asio::ip::address_v4(0x7f010000U + i);
    backends.push_back(another);
  }
  apply({service("web", backends, config::Health{.interval = 400ms, .timeout = 100ms, .rise = 1, .fall = 1})});
  // As when a process is stopped: while it is, hundreds of connects are answered, and their time is over. (The queue of
  // the listener has room for all of them.)
  int handlers = 0;
  int stops = 0;
  ASSERT_TRUE(run_until(io, [&] {
    if (++handlers % 290 != 0) return false;
    const auto until = std::chrono::steady_clock::now() + 150ms;
    while (std::chrono::steady_clock::now() < until) {
    }
    return ++stops == 10;
  }));
  EXPECT_GT(server.accepted(), 0);
  EXPECT_EQ(changes.size(), 0U);
}

TEST_F(Health, WhatSeveralServicesAskForIsCheckedOnce) {
  constexpr config::Health other{.interval = 5ms, .timeout = 1s, .rise = 2, .fall = 2};
  Server server(io);
  apply({service("a", {backend(server.port())}), service("b", {backend(server.port())}),
         service("c", {backend(server.port())}, other), service("d", {backend(server.port())}, {})});
  EXPECT_EQ(checker->checked(), 2U) << "c asks for something else, and d for nothing";

  server.stop();
  ASSERT_TRUE(run_until(io, [&] { return changes.size() == 3; }));
  const auto named = [&](const std::string& name) {
    return std::ranges::count_if(changes, [&](const Change& change) { return change.service == name; });
  };
  EXPECT_EQ(named("a"), 1);
  EXPECT_EQ(named("b"), 1);
  EXPECT_EQ(named("c"), 1);
  EXPECT_FALSE(checker->is_down("d", loopback, server.port()));
}

TEST_F(Health, ASharedProbeConnectsOnceAnInterval) {
  constexpr config::Health slow{.interval = 200ms, .timeout = 1s};
  Server server(io);
  std::vector<config::Service> services;
  for (int i = 0; i < 50; ++i) services.push_back(service("s" + std::to_string(i), {backend(server.port())}, slow));
  apply(services);
  EXPECT_EQ(checker->checked(), 1U);
  ASSERT_TRUE(run_until(io, [&] { return server.accepted() >= 1; }));
  const auto begin = std::chrono::steady_clock::now();
  ASSERT_TRUE(run_until(io, [&] { return server.accepted() >= 6; }));
  // Five intervals of at least 180 ms; the first may have been accepted late.
  EXPECT_GE(std::chrono::steady_clock::now() - begin, 4 * 180ms);
}

TEST_F(Health, WhatStaysKeepsItsState) {
  Server up(io);
  Server down(io);
  down.stop();
  const auto web = service("web", {backend(up.port()), backend(down.port())});
  apply({web});
  ASSERT_TRUE(run_until_changed());
  EXPECT_TRUE(checker->is_down("web", loopback, down.port()));

  Server added(io);
  auto next = web;
  next.backends.push_back(backend(added.port()));
  next.backends[0].state = BackendState::down;  // what others believe is not what was seen
  apply({next, service("other", {backend(down.port())})});
  EXPECT_TRUE(checker->is_down("web", loopback, down.port()));
  EXPECT_FALSE(checker->is_down("web", loopback, up.port()));
  EXPECT_TRUE(checker->is_down("other", loopback, down.port())) << "it shares what is known";
  EXPECT_EQ(changes.size(), 1U) << "nothing is told twice";

  apply({});
  EXPECT_EQ(checker->checked(), 0U);
  EXPECT_FALSE(checker->is_down("web", loopback, down.port()));
  apply({web});
  EXPECT_FALSE(checker->is_down("web", loopback, down.port())) << "it is new again";
}

TEST_F(Health, WhatStaysKeepsItsSchedule) {
  Server server(io);
  const auto web = service("web", {backend(server.port())}, config::Health{.interval = 300ms});
  apply({web});
  ASSERT_TRUE(run_until(io, [&] { return server.accepted() == 1; }));
  // Applied more often than it is checked, it is checked all the same.
  ASSERT_TRUE(run_until(io, [&] {
    checker->apply(std::vector{web});
    return server.accepted() == 3;
  }));
  apply({service("web", {})});
  run_for(400ms);
  EXPECT_EQ(server.accepted(), 3) << "checked after it has left";
}

TEST_F(Health, WithoutHealthNothingIsCheckedAnyMore) {
  Server server(io);
  apply({service("web", {backend(server.port())})});
  ASSERT_TRUE(run_until(io, [&] { return server.accepted() >= 1; }));
  server.stop();
  apply({service("web", {backend(server.port())}, {})});
  EXPECT_EQ(checker->checked(), 0U);
  run_for(100ms);
  EXPECT_THAT(changes, IsEmpty());
}

TEST_F(Health, BackendsThatDrainAreNotChecked) {
  Server draining(io);
  Server active(io);
  apply({service("web", {backend(draining.port(), BackendState::drain), backend(active.port())})});
  EXPECT_EQ(checker->checked(), 1U);
  ASSERT_TRUE(run_until(io, [&] { return active.accepted() >= 3; }));
  EXPECT_EQ(draining.accepted(), 0);
}

TEST_F(Health, DownAtTheBeginningStaysDownUntilItRises) {
  Server server(io);
  apply({service("web", {backend(server.port(), BackendState::down)},
                 config::Health{.interval = 5ms, .timeout = 1s, .rise = 3, .fall = 1})});
  EXPECT_TRUE(checker->is_down("web", loopback, server.port()));
  int accepted = 0;
  when_changed = [&] { accepted = server.accepted(); };
  ASSERT_TRUE(run_until_changed());
  EXPECT_THAT(changes, ElementsAre(Says("web", true, "")));
  EXPECT_GE(accepted, 2) << "of three; the third may be in the queue still";
}

TEST_F(Health, DownAtTheBeginningAndStillDownIsNoNews) {
  Server server(io);
  server.stop();
  apply({service("web", {backend(server.port(), BackendState::down)},
                 config::Health{.interval = 5ms, .timeout = 1s, .rise = 1, .fall = 1})});
  run_for(100ms);
  EXPECT_THAT(changes, IsEmpty());
  EXPECT_TRUE(checker->is_down("web", loopback, server.port()));
}

TEST_F(Health, WhoIsToldMayApply) {
  Server server(io);
  server.stop();
  const auto web =
      service("web", {backend(server.port())}, config::Health{.interval = 5ms, .timeout = 1s, .rise = 1, .fall = 1});
  when_changed = [&] { checker->apply(std::vector<config::Service>{}); };
  apply({web, service("other", {backend(server.port())}, web.health)});
  ASSERT_TRUE(run_until_changed());
  EXPECT_EQ(changes.size(), 2U);
  EXPECT_EQ(checker->checked(), 0U);
  run_for(50ms);
  EXPECT_EQ(changes.size(), 2U);
}

TEST_F(Health, WhoIsToldMayDestroyTheChecker) {
  Server server(io);
  server.stop();
  when_changed = [&] { checker.reset(); };
  apply(
      {service("web", {backend(server.port())}, config::Health{.interval = 5ms, .timeout = 1s, .rise = 1, .fall = 1})});
  ASSERT_TRUE(run_until_changed());
  run_for(50ms);
  EXPECT_EQ(changes.size(), 1U);
}

TEST_F(Health, MayEndWithChecksUnderWay) {
  tcp::acceptor full(io);
  full.open(tcp::v4());
  full.bind({loopback, 0});
  full.listen(0);
  tcp::socket first(io);
  first.connect(full.local_endpoint());
  Server server(io);
  std::vector<config::Backend> backends{backend(full.local_endpoint().port())};
  for (int i = 1; i < 100; ++i) {
    config::Backend another = backend(server.port());
    another.address = boost::asio::ip::address_v4(0x7f000001U + static_cast<std::uint32_t>(i) * 256);
    backends.push_back(another);
  }
  apply({service("web", backends, config::Health{.interval = 1ms, .timeout = 1h})});
  const auto descriptors = [] {
    return std::distance(std::filesystem::directory_iterator("/proc/self/fd"), std::filesystem::directory_iterator());
  };
  const auto before = descriptors();
  ASSERT_TRUE(run_until(io, [&] { return descriptors() > before; }));
  checker.reset();
  // Whatever was under way or due comes to nothing.
  run_for(50ms);
  EXPECT_EQ(descriptors(), before);
}

std::size_t threads() {
  return static_cast<std::size_t>(
      std::distance(std::filesystem::directory_iterator("/proc/self/task"), std::filesystem::directory_iterator()));
}

TEST_F(Health, OneThreadChecksThousands) {
  constexpr std::uint32_t count = 5000;
  // All of 127.0.0.0/8 is this host.
  Server server(io, boost::asio::ip::address_v4::any());
  std::vector<config::Backend> backends;
  for (std::uint32_t i = 0; i < count; ++i) {
    config::Backend another = backend(server.port());
    another.address = boost::asio::ip::address_v4(0x7f010000U + i);
    backends.push_back(another);
  }
  const std::size_t threads_before = threads();
  apply({service("web", backends, config::Health{.interval = 2s, .timeout = 5s, .rise = 1, .fall = 1})});
  EXPECT_EQ(checker->checked(), count);
  ASSERT_TRUE(run_until(io, [&] { return std::cmp_greater_equal(server.accepted(), count); }));
  EXPECT_EQ(threads(), threads_before);
  EXPECT_THAT(changes, IsEmpty());
  server.stop();
  ASSERT_TRUE(run_until(io, [&] { return changes.size() == count; }, 40s));
  EXPECT_TRUE(std::ranges::none_of(changes, &Change::is_up));
}

/// No further descriptor, as long as it lives.
class NoDescriptors {
 public:
  NoDescriptors() {
    ::getrlimit(RLIMIT_NOFILE, &before_);
    const config::Fd next(::dup(0));
    const rlimit none{static_cast<rlim_t>(next.get()), before_.rlim_max};
    EXPECT_EQ(::setrlimit(RLIMIT_NOFILE, &none), 0);
  }
  ~NoDescriptors() { ::setrlimit(RLIMIT_NOFILE, &before_); }
  NoDescriptors(const NoDescriptors&) = delete;
  NoDescriptors& operator=(const NoDescriptors&) = delete;

 private:
  rlimit before_{};
};

TEST_F(Health, WithoutADescriptorItWaitsAndBlamesNoBackend) {
  Server refusing(io);
  refusing.stop();
  apply({service("web", {backend(refusing.port())},
                 config::Health{.interval = 5ms, .timeout = 1s, .rise = 1, .fall = 1})});
  {
    const NoDescriptors none;
    run_for(300ms);
    EXPECT_THAT(changes, IsEmpty());
  }
  ASSERT_TRUE(run_until_changed());
  EXPECT_THAT(changes, ElementsAre(Says("web", false, "connection refused"))) << "it goes on once there is one";
}

TEST_F(Health, HasNoMoreConnectsUnderWayThanAQuarterOfTheDescriptors) {
  rlimit before{};
  ::getrlimit(RLIMIT_NOFILE, &before);
  const rlimit few{64, before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &few), 0);
  checker.emplace(io, [](std::span<const Change>) {});
  ::setrlimit(RLIMIT_NOFILE, &before);
  tcp::acceptor full(io);
  full.open(tcp::v4());
  full.bind({boost::asio::ip::address_v4::any(), 0});
  full.listen(0);
  tcp::socket first(io);
  first.connect({loopback, full.local_endpoint().port()});
  std::vector<config::Backend> backends;
  for (std::uint32_t i = 0; i < 200; ++i) {
    config::Backend another = backend(full.local_endpoint().port());
    another.address = boost::asio::ip::address_v4(0x7f010000U + i);
    backends.push_back(another);
  }
  const auto descriptors = [] {
    return std::distance(std::filesystem::directory_iterator("/proc/self/fd"), std::filesystem::directory_iterator());
  };
  const auto own = descriptors();
  apply({service("web", backends, config::Health{.interval = 10ms, .timeout = 1h})});
  ASSERT_TRUE(run_until(io, [&] { return descriptors() == own + 16; }));
  run_for(50ms);
  EXPECT_EQ(descriptors(), own + 16);
}

}  // namespace
