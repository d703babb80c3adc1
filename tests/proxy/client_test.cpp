// SPDX-License-Identifier: BSD-2-Clause
//
// Who may be a client, and how a backend is told of it.
#include <fmt/format.h>
#include <sched.h>

#include <cerrno>
#include <sstream>

#include "fallback_proxy/local_vips.h"
#include "tests/proxy/proxied.h"

namespace {

using namespace support;

void ip(const std::string& arguments) {
  std::vector<std::string> command = {"ip"};
  std::istringstream words(arguments);
  for (std::string word; words >> word;) command.push_back(word);
  const Finished finished = run(command);
  ASSERT_EQ(finished.exit_code, 0) << "ip " << arguments << ": " << finished.err;
}

void raise_loopback_v6() {
  ip("-6 addr add fd00::1/128 dev lo nodad");
  ip("-6 addr add fd00::2/128 dev lo nodad");
  // The kernel adds their routes a moment later.
  ASSERT_TRUE(eventually([] {
    const std::string routes = run({"ip", "-6", "route", "show", "table", "local"}).out;
    return routes.find("local fd00::1 ") != std::string::npos && routes.find("local fd00::2 ") != std::string::npos;
  }));
}

std::string number(std::uint16_t value) { return {static_cast<char>(value >> 8), static_cast<char>(value & 0xff)}; }

class ProxyProtocol : public Proxied {};

TEST_F(ProxyProtocol, Version1TellsTheClientOverIpv4) {
  const TcpListener backend;
  FallbackProxy proxy(proxy_toml({web({backend.backend()}, "proxy_protocol = \"v1\"\n")}));
  const Fd client = dial(vip, vip_port, "127.0.9.9");
  const Fd server = backend.accept();
  const std::string header = fmt::format("PROXY TCP4 127.0.9.9 127.0.1.1 {} 80\r\n", own_port(client));
  EXPECT_EQ(receive(server, header.size()), header);
  send_all(client, "then the client");
  EXPECT_EQ(receive(server, 15), "then the client");
}

TEST_F(ProxyProtocol, Version2TellsTheClientOverIpv4) {
  const TcpListener backend;
  FallbackProxy proxy(proxy_toml({web({backend.backend()}, "proxy_protocol = \"v2\"\n")}));
  const Fd client = dial(vip, vip_port, "127.0.9.9");
  const Fd server = backend.accept();
  const std::string header = std::string("\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\x7f\0\x09\x09\x7f\0\x01\x01", 24) +
                             number(own_port(client)) + number(80);
  EXPECT_EQ(receive(server, header.size()), header);
  send_all(client, "then the client");
  EXPECT_EQ(receive(server, 15), "then the client");
}

TEST_F(ProxyProtocol, Version1TellsTheClientOverIpv6) {
  raise_loopback_v6();
  const TcpListener backend("::1");
  FallbackProxy proxy(proxy_toml({{"six", "fd00::1", 80, {backend.backend()}, "refuse", "proxy_protocol = \"v1\"\n"}}));
  const Fd client = dial("fd00::1", 80, "fd00::2");
  const std::string header = fmt::format("PROXY TCP6 fd00::2 fd00::1 {} 80\r\n", own_port(client));
  EXPECT_EQ(receive(backend.accept(), header.size()), header);
}

TEST_F(ProxyProtocol, Version2TellsTheClientOverIpv6) {
  raise_loopback_v6();
  const TcpListener backend("::1");
  FallbackProxy proxy(proxy_toml({{"six", "fd00::1", 80, {backend.backend()}, "refuse", "proxy_protocol = \"v2\"\n"}}));
  const Fd client = dial("fd00::1", 80, "fd00::2");
  const auto address = [](char last) { return "\xfd" + std::string(14, '\0') + last; };
  const std::string header = std::string("\r\n\r\n\0\r\nQUIT\n\x21\x21\0\x24", 16) + address(2) + address(1) +
                             number(own_port(client)) + number(80);
  EXPECT_EQ(receive(backend.accept(), header.size()), header);
}

TEST_F(ProxyProtocol, ComesBeforeAServerThatSpeaksFirst) {
  const TcpListener backend;
  FallbackProxy proxy(proxy_toml({web({backend.backend()}, "proxy_protocol = \"v1\"\n")}));
  const Fd client = dial(vip, vip_port);
  const Fd server = backend.accept();
  EXPECT_EQ(receive(server, 6), "PROXY ");
  send_all(server, "220 ready");
  EXPECT_EQ(receive(client, 9), "220 ready");
}

class Clients : public Proxied {};

TEST_F(Clients, ReachVipsThatTheProxyMakesLocal) {
  const TcpListener four, six("::1");
  {
    FallbackProxy proxy(proxy_toml({{"four", "10.96.0.1", 80, {four.backend()}},
                                    {"six", "fd00:96::1", 80, {six.backend()}},
                                    {"datagrams", "fd00:96::1", 53, {six.backend()}, "refuse", "protocol = \"udp\"\n"}},
                                   {.local_vips = true}));
    for (const auto& [address, listener] : {std::pair{"10.96.0.1", &four}, std::pair{"fd00:96::1", &six}}) {
      SCOPED_TRACE(address);
      const Fd client = dial(address, 80);
      const Fd server = listener->accept();
      send_all(client, "hello");
      EXPECT_EQ(receive(server, 5), "hello");
    }
    EXPECT_EQ(proxy.terminate().exit_code, 0);
  }
  EXPECT_EQ(run({"ip", "route", "show", "table", "local", "proto", "96"}).out, "");
  EXPECT_EQ(run({"ip", "-6", "route", "show", "table", "local", "proto", "96"}).out, "");
}

TEST_F(Clients, ReachVipsWhoseRoutesSomebodyHasRemoved) {
  const NamedServer one("one");
  FallbackProxy proxy(proxy_toml({{"web", "10.96.0.1", 80, {backend(one)}}, {"more", "10.96.0.2", 80, {backend(one)}}},
                                 {.local_vips = true}));
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("one"));
  ip("route flush table local proto 96");
  proxy.wait_for_log("warning: somebody else has removed 2 local routes of this proxy: added again\n");
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("one"));
  ip("route del local 10.96.0.2 dev lo table local proto 96");
  proxy.wait_for_log("warning: somebody else has removed 1 local routes of this proxy: added again\n");
  EXPECT_EQ(ask("10.96.0.2", 80), answered_by("one"));
  // Its own changes are none of somebody else.
  proxy.reload(proxy_toml({{"web", "10.96.0.1", 80, {backend(one)}}}, {.local_vips = true}));
  // Nobody answers a SYN that meets the route while it goes: such a connect() takes its 10 s.
  EXPECT_TRUE(eventually([] { return ask("10.96.0.2", 80) == refused_with(ENETUNREACH); }, std::chrono::seconds(30)));
  const std::string log = proxy.terminate().err;
  EXPECT_EQ(log.find("somebody", log.find("somebody else has removed 1") + 1), std::string::npos) << log;
}

TEST_F(Clients, ReachVipsOnceNoOtherProcessMakesVipsLocal) {
  const NamedServer one("one");
  Child other([](const Channel& channel) {
    const auto vips = userspace::LocalVips::open();
    channel.tell(vips ? 'o' : 'f');
    channel.hear();
  });
  ASSERT_EQ(other.channel().hear(), 'o');
  FallbackProxy proxy(proxy_toml({{"web", "10.96.0.1", 80, {backend(one)}}}, {.local_vips = true}));
  EXPECT_EQ(ask("10.96.0.1", 80), refused_with(ENETUNREACH));
  other.kill();
  other.wait();
  proxy.wait_for_log("service web: serving now");
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("one"));
  EXPECT_EQ(proxy.terminate().exit_code, 0);
}

TEST_F(Clients, OverIpv6ReachIpv6Backends) {
  raise_loopback_v6();
  const TcpListener backend("::1");
  FallbackProxy proxy(proxy_toml({{"six", "fd00::1", 80, {backend.backend()}}}));
  const Fd client = dial("fd00::1", 80);
  const Fd server = backend.accept();
  send_all(client, "six");
  EXPECT_EQ(receive(server, 3), "six");
  reset(Fd(::dup(server.get())));
}

TEST_F(Clients, OfIpv4AndIpv6MayHaveServicesOfOnePort) {
  raise_loopback_v6();
  const TcpListener four, six("::1");
  FallbackProxy proxy(proxy_toml({web({four.backend()}), {"six", "fd00::1", vip_port, {six.backend()}}}));
  const Fd to_four = dial(vip, vip_port);
  const Fd to_six = dial("fd00::1", vip_port);
  send_all(four.accept(), "4");
  send_all(six.accept(), "6");
  EXPECT_EQ(receive(to_four, 1), "4");
  EXPECT_EQ(receive(to_six, 1), "6");
}

/// Another network namespace, at the far end of a virtual cable: 10.99.0.2 there, 10.99.0.1 here.
class Neighbour {
  /// Served, or reset: perhaps before connect() has returned.
  static bool is_answered() {
    try {
      return end_of(dial("10.99.0.1", 80)) == 0;
    } catch (const std::system_error& error) {
      if (error.code().value() == ECONNRESET) return false;
      throw;
    }
  }

 public:
  Neighbour()
      : child_([](const Channel& channel) {
          checked(::unshare(CLONE_NEWNET), "unshare");
          channel.tell('u');
          channel.hear();
          for (const char* arguments : {"link set lo up", "addr add 10.99.0.2/24 dev cable1", "link set cable1 up"})
            ip(arguments);
          channel.tell('r');
          for (;;) {
            channel.hear();
            channel.tell(is_answered() ? 's' : 'r');
          }
        }) {
    child_.channel().hear();
    ip("link add cable0 type veth peer name cable1 netns " + std::to_string(child_.pid()));
    ip("addr add 10.99.0.1/24 dev cable0");
    ip("link set cable0 up");
    child_.channel().tell('g');
    child_.channel().hear();
  }

  bool is_served() const {
    child_.channel().tell('a');
    return child_.channel().hear() == 's';
  }

 private:
  Child child_;
};

TEST_F(Clients, OfOtherHostsAreDeniedUnlessAllowed) {
  const Neighbour neighbour;
  const NamedServer one("one");
  const Service exposed{"exposed", "10.99.0.1", 80, {backend(one)}};
  Userspace settings;
  FallbackProxy proxy(proxy_toml({exposed}, settings));
  EXPECT_FALSE(neighbour.is_served());
  EXPECT_EQ(ask("10.99.0.1", 80), answered_by("one"));
  EXPECT_EQ(one.accepted(), 1U);
  for (const char* network : {"10.99.0.0/24", "10.99.0.2/32", "0.0.0.0/0"}) {
    settings.allow_from = {"192.0.2.0/24", network};
    proxy.reload(proxy_toml({exposed}, settings));
    EXPECT_TRUE(eventually([&] { return neighbour.is_served(); })) << network;
    settings.allow_from = {"10.99.0.3/32", "10.98.0.0/16"};
    proxy.reload(proxy_toml({exposed}, settings));
    EXPECT_TRUE(eventually([&] { return !neighbour.is_served(); })) << network;
  }
}

TEST_F(Clients, FromAnAddressThatThisHostGetsLaterAreServed) {
  const NamedServer one("one");
  FallbackProxy proxy(proxy_toml({web({backend(one)})}));
  ip("addr add 10.99.5.1/32 dev lo");
  EXPECT_TRUE(eventually([] {
    try {
      return ask_from("10.99.5.1", vip, vip_port) == "one";
    } catch (const std::system_error&) {
      return false;  // the proxy has not heard of the address yet
    }
  }));
}

}  // namespace
