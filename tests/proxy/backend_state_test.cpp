// SPDX-License-Identifier: BSD-2-Clause
//
// What health checks say to the userspace engine, inside of this process: what is down gets nothing new, and what lives
// goes on. And the checks themselves, where a socket can meet itself.
#include <fmt/format.h>

#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/address.hpp>
#include <boost/asio/post.hpp>
#include <cerrno>
#include <chrono>
#include <fstream>
#include <future>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "fallback_proxy/proxy.h"
#include "health/checker.h"
#include "tests/proxy/proxied.h"

namespace {

using namespace support;
using namespace std::chrono_literals;
using boost::asio::ip::make_address;
using config::BackendState;

config::Service settings_of(const std::vector<const NamedServer*>& servers, bool panic = false) {
  config::Service settings;
  settings.name = "web";
  settings.vip = make_address(vip);
  settings.port = vip_port;
  settings.panic = panic;
  for (const NamedServer* server : servers)
    settings.backends.push_back({.address = make_address(server->address()), .port = server->port(), .position = {}});
  return settings;
}

/// The engine, with its control loop in a thread of its own.
class RunningProxy {
 public:
  explicit RunningProxy(config::Service service) {
    config_.userspace.threads = 2;
    config_.userspace.local_vips = false;
    config_.services = {std::move(service)};
    proxy_.emplace(control_, config_);
    problems_ = proxy_->apply(config_);
    thread_ = std::thread([this] { control_.run(); });
  }
  ~RunningProxy() {
    control_.stop();
    thread_.join();
  }
  RunningProxy(const RunningProxy&) = delete;
  RunningProxy& operator=(const RunningProxy&) = delete;

  /// In the control thread, as all calls are made; blocks until it is done.
  template <class Function>
  auto run(Function function) {
    std::packaged_task<decltype(function(*proxy_))()> task([&] { return function(*proxy_); });
    auto result = task.get_future();
    boost::asio::post(control_, [&] { task(); });
    return result.get();
  }

  void set(const NamedServer& server, BackendState state, const std::string& service = "web") {
    run([&](userspace::Proxy& proxy) {
      proxy.set_backend_state(service, make_address(server.address()), server.port(), state);
    });
  }
  userspace::ServiceStatus status() {
    return run([](userspace::Proxy& proxy) { return proxy.status().services.at(0); });
  }
  void apply(config::Service service) {
    config_.services = {std::move(service)};
    run([this](userspace::Proxy& proxy) { problems_ = proxy.apply(config_); });
  }
  const userspace::Problems& problems() const { return problems_; }

 private:
  config::Config config_;
  boost::asio::io_context control_;
  boost::asio::executor_work_guard<boost::asio::io_context::executor_type> work_{control_.get_executor()};
  std::optional<userspace::Proxy> proxy_;
  userspace::Problems problems_;
  std::thread thread_;
};

/// Nothing but this answers, from some moment on.
::testing::AssertionResult settles_on(const Answer& answer, int times = 20) {
  if (!eventually([&] { return ask(vip, vip_port) == answer; }))
    return ::testing::AssertionFailure() << "never " << answer;
  for (int i = 0; i < times; ++i) {
    if (const Answer other = ask(vip, vip_port); other != answer) return ::testing::AssertionFailure() << other;
  }
  return ::testing::AssertionSuccess();
}

class BackendStates : public Proxied {};

TEST_F(BackendStates, WhatIsDownGetsNothingNewUntilItIsUpAgain) {
  const NamedServer one("one"), two("two");
  RunningProxy proxy(settings_of({&one, &two}));
  proxy.set(one, BackendState::down);
  EXPECT_TRUE(settles_on(answered_by("two")));
  EXPECT_EQ(proxy.status().backends.at(0).state, BackendState::down);
  EXPECT_EQ(proxy.status().backends.at(1).state, BackendState::active);
  proxy.set(one, BackendState::active);
  proxy.set(two, BackendState::down);
  EXPECT_TRUE(settles_on(answered_by("one")));
}

TEST_F(BackendStates, WithAllDownTheKernelRefusesAndLiveConnectionsGoOn) {
  const TcpListener listener;
  const NamedServer other("other");
  config::Service settings = settings_of({&other});
  settings.backends.at(0).port = listener.port();
  RunningProxy proxy(settings);
  const Connected live = connect_through(listener);
  proxy.run([&](userspace::Proxy& p) {
    p.set_backend_state("web", make_address("127.0.0.1"), listener.port(), BackendState::down);
  });
  EXPECT_TRUE(eventually([] { return dial_errno(vip, vip_port) == ECONNREFUSED; }));
  EXPECT_EQ(proxy.status().reason, "no active backend");
  send_all(live.client, "still here");
  EXPECT_EQ(receive(live.backend, 10), "still here");

  proxy.run([&](userspace::Proxy& p) {
    p.set_backend_state("web", make_address("127.0.0.1"), listener.port(), BackendState::active);
  });
  EXPECT_TRUE(eventually([] { return dial_errno(vip, vip_port) == 0; }));
  EXPECT_TRUE(proxy.status().is_serving);
  EXPECT_EQ(proxy.status().reason, "");
  send_all(live.backend, "and back");
  EXPECT_EQ(receive(live.client, 8), "and back");
}

TEST_F(BackendStates, MayFlapAsFastAsTheyLikeAndTheListenerComesBack) {
  const NamedServer one("one");
  RunningProxy proxy(settings_of({&one}));
  for (int i = 0; i < 200; ++i) {
    proxy.run([&](userspace::Proxy& p) {
      // As a rule before a worker has closed anything.
      p.set_backend_state("web", make_address(one.address()), one.port(), BackendState::down);
      p.set_backend_state("web", make_address(one.address()), one.port(), BackendState::active);
    });
    ASSERT_TRUE(eventually([&] { return proxy.status().is_serving; })) << proxy.status().reason;
  }
  EXPECT_TRUE(settles_on(answered_by("one")));
  EXPECT_EQ(proxy.status().reason, "");
}

TEST_F(BackendStates, NoConnectionFailsWhileOneOfTwoFlaps) {
  const NamedServer one("one"), two("two");
  RunningProxy proxy(settings_of({&one, &two}));
  Asker asker(vip, vip_port);
  for (int i = 0; i < 100; ++i) {
    proxy.set(one, i % 2 == 0 ? BackendState::down : BackendState::active);
    asker.wait_for(5);
  }
  auto seen = asker.stop();
  EXPECT_GT(seen["one"], 0U);
  EXPECT_GT(seen["two"], 0U);
  seen.erase("one");
  seen.erase("two");
  EXPECT_TRUE(seen.empty()) << testing::PrintToString(seen);
}

TEST_F(BackendStates, WithPanicAllOfThoseThatAreDownAreTried) {
  const NamedServer one("one"), two("two");
  RunningProxy proxy(settings_of({&one, &two}, true));
  proxy.set(one, BackendState::down);
  EXPECT_TRUE(settles_on(answered_by("two")));
  proxy.set(two, BackendState::down);
  EXPECT_TRUE(eventually([] { return ask(vip, vip_port) == answered_by("one"); }));
  EXPECT_TRUE(eventually([] { return ask(vip, vip_port) == answered_by("two"); }));
  EXPECT_TRUE(proxy.status().is_serving);
  proxy.set(one, BackendState::active);
  EXPECT_TRUE(settles_on(answered_by("one")));
}

TEST_F(BackendStates, OfWhatIsNotServedOrDrainsChangeNothing) {
  const NamedServer one("one"), two("two");
  config::Service settings = settings_of({&one, &two});
  settings.backends.at(1).state = BackendState::drain;
  RunningProxy proxy(settings);
  proxy.set(one, BackendState::down, "other");
  proxy.run([](userspace::Proxy& p) { p.set_backend_state("web", make_address("127.0.0.9"), 1, BackendState::down); });
  proxy.set(two, BackendState::active);
  EXPECT_TRUE(settles_on(answered_by("one")));
  EXPECT_EQ(proxy.status().backends.at(1).state, BackendState::drain);
}

TEST_F(BackendStates, ApplyBringsItsOwn) {
  const NamedServer one("one"), two("two");
  config::Service settings = settings_of({&one, &two});
  RunningProxy proxy(settings);
  proxy.set(one, BackendState::down);
  EXPECT_TRUE(settles_on(answered_by("two")));
  settings.backends.at(1).state = BackendState::down;
  proxy.apply(settings);
  EXPECT_TRUE(settles_on(answered_by("one")));
  settings.backends.at(0).state = BackendState::down;
  proxy.apply(settings);
  EXPECT_TRUE(settles_on(refused_with(ECONNREFUSED)));
}

TEST_F(BackendStates, WaitWhileTheSocketsAreHandedOver) {
  const NamedServer one("one");
  RunningProxy proxy(settings_of({&one}));
  proxy.run([](userspace::Proxy& p) { p.begin_hand_over(); });
  proxy.set(one, BackendState::down);
  EXPECT_EQ(ask(vip, vip_port), answered_by("one")) << "the socket is the successor's, too";
  proxy.run([](userspace::Proxy& p) { p.cancel_hand_over(); });
  EXPECT_TRUE(settles_on(refused_with(ECONNREFUSED)));
}

TEST_F(BackendStates, EveryServiceIsServedWhateverItsEngine) {
  const NamedServer one("one");
  config::Service settings = settings_of({&one});
  settings.engine = config::EngineMode::bpf;
  RunningProxy proxy(settings);
  EXPECT_TRUE(proxy.problems().empty());
  EXPECT_EQ(ask(vip, vip_port), answered_by("one"));
}

TEST_F(BackendStates, AnEjectedBackendIsShownWithTheTimeThatIsLeft) {
  const NamedServer one("one");
  config::Service settings = settings_of({&one});
  settings.backends.push_back({.address = make_address("127.0.0.1"), .port = 7001, .position = {}});
  settings.policy = config::Policy::round_robin;
  settings.eject = config::Eject{.failures = 3, .time = 1h};
  RunningProxy proxy(settings);
  while (proxy.status().backends.at(1).failures < 2) ASSERT_EQ(ask(vip, vip_port), answered_by("one"));
  EXPECT_EQ(proxy.status().backends.at(1).ejected, 0ms) << "two failures";
  for (int i = 0; i < 40; ++i) EXPECT_EQ(ask(vip, vip_port), answered_by("one"));
  const userspace::BackendStatus ejected = proxy.status().backends.at(1);
  EXPECT_EQ(ejected.failures, 3U) << "it is not tried any more";
  EXPECT_TRUE(ejected.is_marked);
  EXPECT_GT(ejected.ejected, 59min);
  EXPECT_LE(ejected.ejected, 1h);
  EXPECT_EQ(proxy.status().backends.at(0).ejected, 0ms);
}

/// The ports that this namespace gives to sockets that ask for none.
class LocalPorts {
 public:
  LocalPorts(std::uint16_t first, std::uint16_t last) {
    std::ifstream(path) >> first_ >> last_;
    std::ofstream(path) << first << ' ' << last;
  }
  ~LocalPorts() { std::ofstream(path) << first_ << ' ' << last_; }
  LocalPorts(const LocalPorts&) = delete;
  LocalPorts& operator=(const LocalPorts&) = delete;

 private:
  static constexpr const char* path = "/proc/sys/net/ipv4/ip_local_port_range";
  int first_ = 0;
  int last_ = 0;
};

TEST_F(BackendStates, AHealthCheckThatIsConnectedToItselfHasFoundNobody) {
  // The only port that a client can have is the one that it asks for.
  constexpr std::uint16_t only = 42000;
  const LocalPorts ports(only, only);
  config::Service settings;
  settings.name = "web";
  settings.health = config::Health{.interval = 10ms, .timeout = 1s, .rise = 1, .fall = 2};
  settings.backends.push_back({.address = make_address("127.0.0.1"), .port = only, .position = {}});
  boost::asio::io_context io;
  std::vector<health::Change> changes;
  health::Checker checker(
      io, [&](std::span<const health::Change> news) { changes.insert(changes.end(), news.begin(), news.end()); });
  checker.apply(std::vector{settings});
  const auto end = std::chrono::steady_clock::now() + 10s;
  while (changes.empty() && std::chrono::steady_clock::now() < end) io.run_one_for(100ms);
  ASSERT_EQ(changes.size(), 1U);
  EXPECT_FALSE(changes[0].is_up);
  EXPECT_EQ(changes[0].reason, "connection refused, 2 times in a row");
  // A FIN would keep the port from its owner for a minute. Between two checks it is free.
  EXPECT_TRUE(eventually([&] {
    try {
      const TcpListener listener("127.0.0.1", only);
      return true;
    } catch (const std::system_error&) {
      return false;
    }
  }));
}

}  // namespace
