// SPDX-License-Identifier: BSD-2-Clause
//
// A reload changes what is served, in place.
#include <fmt/format.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <map>
#include <system_error>

#include "tests/proxy/control.h"

namespace {

using namespace support;

class ProxyReload : public Proxied {};

/// The connection still passes bytes, both ways.
void expect_alive(const Connected& connection) {
  send_all(connection.client, "ping");
  EXPECT_EQ(receive(connection.backend, 4), "ping");
  send_all(connection.backend, "pong");
  EXPECT_EQ(receive(connection.client, 4), "pong");
}

TEST_F(ProxyReload, NoConnectionFailsInAHundredReloads) {
  const NamedServer one("one"), two("two"), three("three");
  const auto text = [&](int turn) {
    std::vector<Backend> backends = {backend(one, 1 + static_cast<std::uint32_t>(turn) % 7)};
    if (turn % 2 == 0) backends.push_back(backend(two));
    if (turn % 3 == 0) backends.push_back(backend(three, 2, turn % 4 == 0 ? "drain" : "active"));
    const char* policies[] = {"random", "round_robin", "least_conn", "maglev"};
    std::vector<Service> services = {web(backends, fmt::format("policy = \"{}\"\n", policies[turn / 5 % 4]))};
    for (int i = 0; i < turn % 10; ++i)
      services.push_back({fmt::format("more-{}", i), fmt::format("127.0.3.{}", i + 1), 80, {backend(two)}});
    return proxy_toml(services);
  };
  FallbackProxy proxy(text(0));
  Asker first(vip, vip_port), second(vip, vip_port), third(vip, vip_port);
  for (int turn = 1; turn <= 100; ++turn) {
    proxy.reload(text(turn));
    if (turn % 10 == 0) first.wait_for(10);
  }
  std::uint64_t answers = 0;
  for (Asker* asker : {&first, &second, &third}) {
    for (const auto& [answer, times] : asker->stop()) {
      EXPECT_TRUE(answer == "one" || answer == "two" || answer == "three") << times << " times " << answer;
      answers += times;
    }
  }
  EXPECT_GT(answers, 100U);
}

TEST_F(ProxyReload, ConnectionsGoOnThatTheReloadDoesNotConcern) {
  const TcpListener backend;
  FallbackProxy proxy(proxy_toml({web({backend.backend()})}));
  const Connected connection = connect_through(backend);
  proxy.reload(proxy_toml({web({backend.backend(7)}, "policy = \"maglev\"\n"), {"new", "127.0.3.1", 80, {}}}));
  expect_alive(connection);
}

TEST_F(ProxyReload, AMistakeChangesNothingAndIsShown) {
  const NamedServer one("one");
  FallbackProxy proxy(proxy_toml({web({backend(one)})}));
  const std::string log = proxy.reload(proxy_toml({web({backend(one)}, "polcy = \"random\"\n")}));
  EXPECT_NE(log.find(proxy.files()->config() + ":"), std::string::npos) << log;
  EXPECT_NE(log.find(":1: service \"web\": polcy"), std::string::npos) << log;
  EXPECT_NE(log.find("goes on serving"), std::string::npos) << log;
  EXPECT_EQ(ask(vip, vip_port), answered_by("one"));
  // A file that is no TOML at all.
  EXPECT_NE(proxy.reload("[[service\n").find("goes on serving"), std::string::npos);
  EXPECT_EQ(ask(vip, vip_port), answered_by("one"));
}

TEST_F(ProxyReload, AFifoInPlaceOfTheFileHoldsNothingUp) {
  const NamedServer one("one");
  FallbackProxy proxy(proxy_toml({web({backend(one)})}));
  ASSERT_EQ(::unlink(proxy.files()->config().c_str()), 0);
  ASSERT_EQ(::mkfifo(proxy.files()->config().c_str(), 0600), 0);
  proxy.signal(SIGHUP);
  EXPECT_NE(proxy.wait_for_log("goes on serving").find("a pipe, and nobody writes to it"), std::string::npos);
  EXPECT_EQ(ask(vip, vip_port), answered_by("one"));
  EXPECT_EQ(proxy.terminate().exit_code, 0);
}

TEST_F(ProxyReload, ServicesComeAndGo) {
  const NamedServer one("one"), two("two");
  const Service other{"other", "127.0.3.1", 81, {backend(two)}};
  FallbackProxy proxy(proxy_toml({web({backend(one)})}));
  EXPECT_EQ(ask("127.0.3.1", 81), refused_with(ECONNREFUSED));
  proxy.reload(proxy_toml({web({backend(one)}), other}));
  EXPECT_EQ(ask("127.0.3.1", 81), answered_by("two"));
  EXPECT_EQ(ask(vip, vip_port), answered_by("one"));
  proxy.reload(proxy_toml({other}));
  EXPECT_TRUE(eventually([] { return ask(vip, vip_port) == refused_with(ECONNREFUSED); }));
  EXPECT_EQ(ask("127.0.3.1", 81), answered_by("two"));
}

TEST_F(ProxyReload, AServiceWithoutBackendsRefusesAtOnce) {
  const NamedServer one("one");
  FallbackProxy proxy(proxy_toml({web({backend(one)})}));
  EXPECT_EQ(ask(vip, vip_port), answered_by("one"));
  proxy.reload(proxy_toml({web({})}));
  EXPECT_TRUE(eventually([] { return ask(vip, vip_port) == refused_with(ECONNREFUSED); }));
  proxy.reload(proxy_toml({web({backend(one, 1, "drain")})}));
  EXPECT_EQ(ask(vip, vip_port), refused_with(ECONNREFUSED));
  proxy.reload(proxy_toml({web({backend(one)})}));
  EXPECT_EQ(ask(vip, vip_port), answered_by("one"));
}

TEST_F(ProxyReload, APortInUseTakesOutItsServiceOnly) {
  const NamedServer one("one");
  std::optional<TcpListener> squatter(std::in_place, "127.0.3.1", std::uint16_t{80});
  const std::string text = proxy_toml({{"taken", "127.0.3.1", 80, {backend(one)}}, web({backend(one)})});
  FallbackProxy proxy(text);
  EXPECT_EQ(ask(vip, vip_port), answered_by("one"));
  const std::string log = proxy.reload(text);
  EXPECT_NE(log.find("service taken: binding 127.0.3.1:80: Address already in use"), std::string::npos) << log;
  squatter.reset();
  const std::string served = proxy.reload(text);
  EXPECT_EQ(served.find("taken"), std::string::npos) << served;
  EXPECT_EQ(ask("127.0.3.1", 80), answered_by("one"));
}

TEST_F(ProxyReload, OnRemoveSaysWhatBecomesOfConnectionsToABackendThatLeaves) {
  const TcpListener leaving, staying;
  for (const char* on_remove : {"keep", "drain", "reset"}) {
    const std::string more = fmt::format("on_remove = \"{}\"\n", on_remove);
    FallbackProxy proxy(proxy_toml({web({leaving.backend()}, more)}));
    const Connected connection = connect_through(leaving);
    proxy.reload(proxy_toml({web({leaving.backend(), staying.backend()}, more)}));
    expect_alive(connection);
    proxy.reload(proxy_toml({web({staying.backend()}, more)}));
    if (std::string(on_remove) == "reset") {
      EXPECT_EQ(end_of(connection.client), ECONNRESET);
      EXPECT_EQ(end_of(connection.backend), ECONNRESET);
    } else {
      expect_alive(connection);
      const Connected next = connect_through(staying);
      expect_alive(next);
      expect_alive(connection);
    }
  }
}

TEST_F(ProxyReload, OnRemoveHoldsForAServiceThatLeaves) {
  const TcpListener backend;
  const std::string nothing = proxy_toml({{"other", "127.0.3.1", 80, {backend.backend()}}});
  for (const char* on_remove : {"keep", "drain", "reset"}) {
    FallbackProxy proxy(proxy_toml({web({backend.backend()}, fmt::format("on_remove = \"{}\"\n", on_remove))}));
    const Connected connection = connect_through(backend);
    proxy.reload(nothing);
    if (std::string(on_remove) == "reset") {
      EXPECT_EQ(end_of(connection.client), ECONNRESET);
      EXPECT_EQ(end_of(connection.backend), ECONNRESET);
    } else {
      expect_alive(connection);
    }
  }
}

TEST_F(ProxyReload, ResetReachesConnectionsThatAnEarlierReloadHasLeft) {
  const TcpListener leaving, staying;
  const std::string more = "on_remove = \"reset\"\n";
  FallbackProxy proxy(proxy_toml({web({leaving.backend()}, more)}));
  const Connected connection = connect_through(leaving);
  // A backend that drains is still one of the service.
  Backend draining = leaving.backend();
  draining.state = "drain";
  proxy.reload(proxy_toml({web({draining, staying.backend()}, more)}));
  expect_alive(connection);
  proxy.reload(proxy_toml({web({staying.backend()}, more)}));
  EXPECT_EQ(end_of(connection.client), ECONNRESET);
}

// Also those that the listener had just given to another thread, when that one had already reset what it had.
TEST_F(ProxyReload, ResetReachesConnectionsThatBeginMeanwhile) {
  raise_descriptor_limit();
  const TcpListener leaving, staying;
  const std::string more = "on_remove = \"reset\"\n";
  const std::string before = proxy_toml({web({leaving.backend()}, more)}, {.threads = 4});
  const std::string after = proxy_toml({web({staying.backend()}, more)}, {.threads = 4});
  FallbackProxy proxy(before);
  for (int round = 0; round < 30; ++round) {
    std::atomic<bool> is_over = false;
    std::vector<Fd> clients[2];
    const auto dial_until_over = [&](std::vector<Fd>& to) {
      return meanwhile([&] {
        while (!is_over && to.size() < 2000) {
          try {
            to.push_back(dial(vip, vip_port));
          } catch (const std::system_error& error) {
            if (error.code().value() != ECONNRESET) throw;  // perhaps before connect() has returned
          }
        }
      });
    };
    auto one = dial_until_over(clients[0]);
    auto other = dial_until_over(clients[1]);
    ASSERT_TRUE(is_readable(leaving.get(), 5000));
    proxy.reload(after);
    ASSERT_TRUE(is_readable(staying.get(), 5000));
    is_over = true;
    one.get();
    other.get();
    // A client of the round before may have ended in order.
    while (is_readable(leaving.get())) ASSERT_NE(end_of(leaving.accept()), EAGAIN) << "it lives on";
    for (auto& each : clients) each.clear();
    ASSERT_TRUE(eventually([&] {
      while (is_readable(staying.get())) staying.accept();
      return number(status(*proxy.files()), "connections") == 0;
    }));
    proxy.reload(before);
  }
}

TEST_F(ProxyReload, AConnectionOnItsWayTriesNoBackendThatHasLeft) {
  // Takes one connection into its queue and answers no other.
  const TcpListener silent("127.0.0.1", 0, 0);
  const Fd queued = dial("127.0.0.1", silent.port());
  const TcpListener leaving, staying;
  const Userspace settings{.connect_timeout = "1s"};
  FallbackProxy proxy(proxy_toml({web({silent.backend(60000), leaving.backend()})}, settings));
  const Fd client = dial(vip, vip_port);
  ASSERT_TRUE(eventually([&] { return number(status(*proxy.files()), "connections") == 1; }));
  proxy.reload(proxy_toml({web({silent.backend(60000), staying.backend()})}, settings));
  const Fd server = staying.accept();
  send_all(server, "staying");
  EXPECT_EQ(receive(client, 7), "staying");
}

TEST_F(ProxyReload, WhatIsQueuedWhenAServiceLeavesIsServed) {
  const NamedServer one("one");
  FallbackProxy proxy(proxy_toml({web({backend(one)}), {"other", "127.0.3.1", 80, {backend(one)}}}));
  proxy.signal(SIGSTOP);
  std::vector<Fd> queued;
  for (int i = 0; i < 50; ++i) queued.push_back(dial(vip, vip_port));
  proxy.files()->write(proxy_toml({{"other", "127.0.3.1", 80, {backend(one)}}}));
  proxy.signal(SIGHUP);
  proxy.signal(SIGCONT);
  proxy.wait_for_log("serving 1 service");
  for (const Fd& client : queued) EXPECT_EQ(receive_all(client), "one");
}

TEST_F(ProxyReload, LeavesNothingBehind) {
  const NamedServer one("one"), two("two");
  const std::string first = proxy_toml({web({backend(one)}), {"other", "127.0.3.1", 80, {backend(two)}}});
  const std::string second = proxy_toml({web({backend(two)})});
  FallbackProxy proxy(first);
  ask(vip, vip_port);
  proxy.reload(second);
  proxy.reload(first);
  // What has come back listens a moment after the reload: when its socket from before is closed.
  ASSERT_TRUE(eventually([&] {
    const object now = status(*proxy.files());
    const auto is_serving = [](const boost::json::value& service) { return service.at("serving") == true; };
    return number(now, "connections") == 0 && std::ranges::all_of(now.at("services").as_array(), is_serving);
  }));
  const std::size_t files = proxy.open_files();
  for (int i = 0; i < 50; ++i) {
    proxy.reload(second);
    proxy.reload(first);
    EXPECT_EQ(ask(vip, vip_port), answered_by("one"));
  }
  EXPECT_TRUE(eventually([&] { return proxy.open_files() <= files; })) << proxy.open_files() << " after " << files;
}

}  // namespace
