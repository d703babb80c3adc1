// SPDX-License-Identifier: BSD-2-Clause
//
// How the program ends, and what ends a connection that nobody has ended.
#include <signal.h>

#include <cerrno>

#include "tests/proxy/proxied.h"

namespace {

using namespace support;

class End : public Proxied {};

TEST_F(End, DrainsFirst) {
  const TcpListener backend;
  FallbackProxy proxy(proxy_toml({web({backend.backend()})}));
  auto [client, server] = connect_through(backend);
  proxy.signal(SIGTERM);
  EXPECT_NE(proxy.wait_for_log("accepting nothing more").find("; 1 connections to drain"), std::string::npos);
  EXPECT_TRUE(eventually([] { return dial_errno(vip, vip_port) == ECONNREFUSED; }));
  auto replying = meanwhile([&server] { send_stream(server, 1, 8 << 20); });
  receive_stream(client, 1, 8 << 20);
  replying.get();
  send_end(client);
  send_end(server);
  EXPECT_EQ(end_of(client), 0);
  EXPECT_EQ(proxy.wait().exit_code, 0);
}

TEST_F(End, ComesAtOnceWhenThereIsNothingToDrain) {
  const NamedServer one("one");
  FallbackProxy proxy(proxy_toml({web({backend(one)})}));
  EXPECT_EQ(ask(vip, vip_port), answered_by("one"));
  const Finished finished = proxy.terminate();
  EXPECT_EQ(finished.exit_code, 0) << finished.err;
  EXPECT_NE(finished.err.find("info: ended\n"), std::string::npos) << finished.err;
}

TEST_F(End, ResetsWhatIsLeftAfterTheDrainTimeout) {
  const TcpListener backend;
  Userspace settings;
  settings.drain_timeout = "200ms";
  FallbackProxy proxy(proxy_toml({web({backend.backend()})}, settings));
  const auto [client, server] = connect_through(backend);
  const auto start = std::chrono::steady_clock::now();
  proxy.signal(SIGTERM);
  EXPECT_EQ(end_of(client), ECONNRESET);
  EXPECT_EQ(end_of(server), ECONNRESET);
  EXPECT_GE(std::chrono::steady_clock::now() - start, std::chrono::milliseconds(200));
  const Finished finished = proxy.wait();
  EXPECT_EQ(finished.exit_code, 0);
  EXPECT_NE(finished.err.find("warning: drain_timeout is over: 1 connections are reset\n"), std::string::npos)
      << finished.err;
}

TEST_F(End, ComesAtOnceWithASecondSignal) {
  const TcpListener backend;
  Userspace settings;
  settings.drain_timeout = "1h";
  for (const int signal : {SIGTERM, SIGINT}) {
    FallbackProxy proxy(proxy_toml({web({backend.backend()})}, settings));
    const auto [client, server] = connect_through(backend);
    send_all(server, "half of it");
    EXPECT_EQ(receive(client, 10), "half of it");
    proxy.signal(signal);
    proxy.wait_for_log("accepting nothing more");
    proxy.signal(signal);
    EXPECT_EQ(proxy.wait().exit_code, 0);
    // Nobody takes what was cut off for all.
    EXPECT_EQ(end_of(client), ECONNRESET);
    EXPECT_EQ(end_of(server), ECONNRESET);
  }
}

TEST_F(End, NamesTheRoutesThatItCannotRemove) {
  const NamedServer one("one");
  const std::string text = proxy_toml({{"web", "10.96.0.1", 8080, {backend(one)}}}, {.local_vips = true});
  FallbackProxy(text).kill();
  // The route is there, so it takes no right to serve.
  FallbackProxy proxy(text, drop_capabilities);
  EXPECT_EQ(ask("10.96.0.1", 8080), answered_by("one"));
  const Finished finished = proxy.terminate();
  EXPECT_EQ(finished.exit_code, 0);
  EXPECT_TRUE(finished.err.ends_with("info: ended\n")) << finished.err;
  EXPECT_NE(finished.err.find("warning: removing local routes takes CAP_NET_ADMIN; not removed: 10.96.0.1\n"),
            std::string::npos)
      << finished.err;
  EXPECT_EQ(run({CLUSTERIP_FALLBACK_PROXY, "--cleanup"}).exit_code, 0);
}

TEST_F(End, ServesWhatWasQueued) {
  const NamedServer one("one");
  FallbackProxy proxy(proxy_toml({web({backend(one)})}));
  proxy.signal(SIGSTOP);
  std::vector<Fd> queued;
  for (int i = 0; i < 100; ++i) queued.push_back(dial(vip, vip_port));
  proxy.signal(SIGTERM);
  proxy.signal(SIGCONT);
  for (const Fd& client : queued) EXPECT_EQ(receive_all(client), "one");
  queued.clear();
  EXPECT_EQ(proxy.wait().exit_code, 0);
}

TEST_F(End, OfAProgramThatIsKilledIsSeenByBothSides) {
  const TcpListener backend;
  const std::string text = proxy_toml({web({backend.backend()})});
  FallbackProxy proxy(text);
  const auto [client, server] = connect_through(backend);
  proxy.kill();
  end_of(client);
  end_of(server);
  FallbackProxy again(text);
  const auto [next, next_server] = connect_through(backend);
  send_all(next_server, "again");
  EXPECT_EQ(receive(next, 5), "again");
}

TEST_F(End, OfAnIdleConnectionComesAfterTheIdleTimeout) {
  const TcpListener backend;
  Userspace settings;
  settings.idle_timeout = "700ms";
  FallbackProxy proxy(proxy_toml({web({backend.backend()})}, settings));
  const Connected busy = connect_through(backend);
  const Connected idle = connect_through(backend);
  // As long as the idle one lives, and longer than that.
  const auto start = std::chrono::steady_clock::now();
  for (int more = 100; more > 0; more -= is_readable(idle.client.get(), 10)) {
    send_all(busy.client, "x");
    EXPECT_EQ(receive(busy.backend, 1), "x");
    ASSERT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(30));
  }
  EXPECT_GE(std::chrono::steady_clock::now() - start, std::chrono::milliseconds(700));
  EXPECT_EQ(end_of(idle.client), ECONNRESET);
  EXPECT_EQ(end_of(idle.backend), ECONNRESET);
}

TEST_F(End, OfAnIdleConnectionDoesNotComeByItself) {
  const TcpListener backend;
  Userspace settings;
  settings.connect_timeout = "100ms";
  FallbackProxy proxy(proxy_toml({web({backend.backend()})}, settings));
  const auto [client, server] = connect_through(backend);
  // Longer than any time that the proxy knows of a connection's youth.
  EXPECT_FALSE(is_readable(client.get(), 2500));
  send_all(client, "still");
  EXPECT_EQ(receive(server, 5), "still");
}

}  // namespace
