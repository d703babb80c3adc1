// SPDX-License-Identifier: BSD-2-Clause
//
// What an application in the cgroup sees of its connect().
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <vector>

#include "tests/support/fixture.h"
#include "tests/support/route.h"

namespace {

using namespace support;

int connect_errno(int type, int protocol, const std::string& address, std::uint16_t port) {
  const Fd fd(checked(::socket(AF_INET, type | SOCK_CLOEXEC, protocol), "socket"));
  return support::connect_errno(fd.get(), address, port);
}

/// Packets that went over `lo` in this network namespace.
std::string loopback_packets() {
  std::ifstream devices("/proc/net/dev");
  for (std::string line; std::getline(devices, line);)
    if (line.find("lo:") != std::string::npos) return line;
  return {};
}

class Connect : public Integration {};

TEST_F(Connect, ReachesTheBackendOfTheService) {
  const NamedServer one("one"), two("two");
  const Handle handle =
      serve(toml({{"first", "10.96.0.1", 80, {backend(one)}}, {"second", "10.96.0.2", 80, {backend(two)}}}));
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("one"));
  EXPECT_EQ(ask("10.96.0.2", 80), answered_by("two"));
}

TEST_F(Connect, TellsServicesOfOneVipApartByPort) {
  const NamedServer one("one"), two("two");
  const Handle handle =
      serve(toml({{"first", "10.96.0.1", 80, {backend(one)}}, {"second", "10.96.0.1", 443, {backend(two)}}}));
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("one"));
  EXPECT_EQ(ask("10.96.0.1", 443), answered_by("two"));
}

TEST_F(Connect, ChoosesBackendsByWeight) {
  constexpr int connects = 100'000;
  constexpr int batch = 250;  // well below the servers' backlog: no SYN is dropped
  const NamedServer servers[] = {NamedServer("one", "127.0.0.1"), NamedServer("two", "127.0.0.2"),
                                 NamedServer("five", "127.0.0.3")};
  const NamedServer bystander("bystander");
  const double shares[] = {1.0 / 8, 2.0 / 8, 5.0 / 8};
  Handle handle = serve(
      toml({{"bystander", "10.96.0.1", 80, {backend(bystander)}},
            {"weighted", "10.96.0.2", 80, {backend(servers[0], 1), backend(servers[1], 2), backend(servers[2], 5)}}}));

  std::map<std::string, int> answers;
  for (int done = 0; done < connects; done += batch) {
    std::vector<Fd> sockets;
    for (int i = 0; i < batch; ++i) {
      sockets.push_back(tcp_socket());
      ASSERT_EQ(support::connect_errno(sockets.back().get(), "10.96.0.2", 80), 0);
    }
    for (const Fd& socket : sockets) ++answers[read_answer(socket.get()).text];
  }

  EXPECT_EQ(bystander.accepted(), 0u);
  ASSERT_EQ(answers.size(), 3u);
  double chi_squared = 0;
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(servers[i].accepted(), static_cast<std::uint64_t>(answers[servers[i].name()]));
    const double expected = connects * shares[i];
    chi_squared += std::pow(static_cast<double>(servers[i].accepted()) - expected, 2) / expected;
  }
  EXPECT_GT(std::exp(-chi_squared / 2), 1e-4) << "chi squared " << chi_squared << ", 2 degrees of freedom";

  const auto seen = handle.visit();
  ASSERT_EQ(seen.size(), 2u);
  EXPECT_EQ(seen[0].connects, 0u);
  EXPECT_EQ(seen[1].connects, static_cast<std::uint64_t>(connects));
  ASSERT_EQ(seen[1].backends.size(), 3u);
  for (const SeenBackend& counted : seen[1].backends) {
    const auto server = std::ranges::find(servers, counted.port, &NamedServer::port);
    ASSERT_NE(server, std::end(servers));
    EXPECT_EQ(counted.connects, server->accepted());
  }
}

TEST_F(Connect, ServiceWithoutBackendRefuses) {
  Handle handle = serve(toml({{"empty", "10.96.0.1", 80, {}, "refuse"}}));
  EXPECT_EQ(ask("10.96.0.1", 80), refused_by_program(ECONNREFUSED));
  EXPECT_EQ(handle.visit().at(0).refused, 1u);
}

TEST_F(Connect, ServiceWithoutBackendIsUnreachableWhenAsked) {
  const Handle handle = serve(toml({{"empty", "10.96.0.1", 80, {}, "unreachable"}}));
  EXPECT_EQ(ask("10.96.0.1", 80), refused_by_program(EHOSTUNREACH));
}

TEST_F(Connect, ServiceWithoutBackendPassesWhenAsked) {
  const Handle handle = serve(toml({{"empty", "10.96.0.1", 80, {}, "pass"}}));
  EXPECT_EQ(ask("10.96.0.1", 80), refused_with(ENETUNREACH)) << "what this namespace answers, which has no route";
}

TEST_F(Connect, DrainingBackendGetsNothing) {
  const NamedServer active("active", "127.0.0.1"), draining("draining", "127.0.0.2");
  const Handle handle = serve(toml({{"mixed", "10.96.0.1", 80, {backend(active), backend(draining, 65535, "drain")}},
                                    {"leaving", "10.96.0.2", 80, {backend(draining, 1, "drain")}}}));
  for (int i = 0; i < 200; ++i) ASSERT_EQ(ask("10.96.0.1", 80), answered_by("active"));
  EXPECT_EQ(ask("10.96.0.2", 80), refused_by_program(ECONNREFUSED));
  EXPECT_EQ(draining.accepted(), 0u);
}

TEST_F(Connect, RefusesPortOfVipThatNoServiceHas) {
  const NamedServer server("server");
  const Handle handle = serve(toml({{"web", "10.96.0.1", 80, {backend(server)}}}));
  EXPECT_EQ(ask("10.96.0.1", 81), refused_by_program(ECONNREFUSED));
  EXPECT_EQ(connect_errno(SOCK_DGRAM, 0, "10.96.0.1", 80), refusal(ECONNREFUSED)) << "the protocol belongs to the key";
}

TEST_F(Connect, RefusalSendsNoPacket) {
  const Route route4("10.96.0.0/16"), route6("fd00::/64");
  const std::string udp = "protocol = \"udp\"";
  const Handle handle = serve(toml({{"tcp4", "10.96.0.1", 80, {}},
                                    {"tcp6", "fd00::1", 80, {}},
                                    {"udp4", "10.96.0.1", 80, {}, "unreachable", udp},
                                    {"udp6", "fd00::1", 80, {}, "unreachable", udp}}));
  const std::string before = loopback_packets();
  for (const auto& [family, vip] : {std::pair(AF_INET, "10.96.0.1"), std::pair(AF_INET6, "fd00::1")}) {
    EXPECT_EQ(ask(vip, 80), refused_by_program(ECONNREFUSED));
    EXPECT_EQ(ask(vip, 81), refused_by_program(ECONNREFUSED));
    EXPECT_EQ(support::connect_errno(udp_socket(family).get(), vip, 80), refusal(EHOSTUNREACH));
    EXPECT_EQ(exchange(udp_socket(family).get(), vip, 80), ::strerrorname_np(refusal(EHOSTUNREACH)));
    EXPECT_EQ(exchange(udp_socket(family).get(), vip, 81), ::strerrorname_np(refusal(ECONNREFUSED)));
  }
  EXPECT_EQ(loopback_packets(), before);
  ASSERT_EQ(::sendto(udp_socket().get(), "x", 1, 0, Endpoint("10.96.0.9", 80).address(), sizeof(sockaddr_in)), 1);
  EXPECT_NE(loopback_packets(), before) << "what is sent would be seen";
}

TEST_F(Connect, LeavesOtherAddressesUntouched) {
  const NamedServer server("server"), other("other", "127.0.0.5");
  const Handle handle = serve(toml({{"web", "10.96.0.1", 80, {backend(server)}}}));
  EXPECT_EQ(ask("10.96.0.2", 80), refused_with(ENETUNREACH));
  EXPECT_EQ(ask(other.address(), other.port()), answered_by("other"));
  EXPECT_EQ(ask(server.address(), server.port()), answered_by("server")) << "a backend by its own address";
}

TEST_F(Connect, PingSocketPasses) {
  std::ofstream("/proc/sys/net/ipv4/ping_group_range") << "0 0";
  const Route route("10.96.0.0/16");
  const NamedServer server("server");
  const Handle handle = serve(toml({{"web", "10.96.0.1", 80, {backend(server)}}}));
  EXPECT_EQ(connect_errno(SOCK_DGRAM, IPPROTO_ICMP, "10.96.0.1", 0), 0);
}

TEST_F(Connect, NonBlockingReachesTheBackend) {
  const NamedServer server("server");
  const Handle handle = serve(toml({{"web", "10.96.0.1", 80, {backend(server)}}}));
  const Fd fd = tcp_socket(SOCK_NONBLOCK);
  EXPECT_EQ(support::connect_errno(fd.get(), "10.96.0.1", 80), EINPROGRESS);
  pollfd writable{fd.get(), POLLOUT, 0};
  ASSERT_EQ(::poll(&writable, 1, 10'000), 1);
  int error = -1;
  socklen_t length = sizeof error;
  ASSERT_EQ(::getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &error, &length), 0);
  EXPECT_EQ(error, 0);
  ASSERT_EQ(::fcntl(fd.get(), F_SETFL, 0), 0);
  EXPECT_EQ(read_answer(fd.get()), answered_by("server"));
}

TEST_F(Connect, NonBlockingIsRefusedAtOnce) {
  const Handle handle = serve(toml({{"empty", "10.96.0.1", 80, {}}}));
  const Fd fd = tcp_socket(SOCK_NONBLOCK);
  EXPECT_EQ(support::connect_errno(fd.get(), "10.96.0.1", 80), refusal(ECONNREFUSED));
}

TEST_F(Connect, RefusedSocketCanConnectElsewhere) {
  const NamedServer server("server");
  const Handle handle = serve(toml({{"empty", "10.96.0.1", 80, {}}, {"web", "10.96.0.2", 80, {backend(server)}}}));
  const Fd fd = tcp_socket();
  EXPECT_EQ(support::connect_errno(fd.get(), "10.96.0.1", 80), refusal(ECONNREFUSED));
  EXPECT_EQ(support::connect_errno(fd.get(), "10.96.0.2", 80), 0);
  EXPECT_EQ(read_answer(fd.get()), answered_by("server"));
}

TEST_F(Connect, ProcessOutsideTheCgroupIsUntouched) {
  const NamedServer server("server");
  const Handle handle = serve(toml({{"web", "10.96.0.1", 80, {backend(server)}}}));
  EXPECT_EQ(in_child([] {
              Cgroup::leave();
              require(ask("10.96.0.1", 80) == refused_with(ENETUNREACH), "a process outside was served");
            }),
            "");
  EXPECT_EQ(server.accepted(), 0u);
}

TEST_F(Connect, ProcessInCgroupBelowIsServed) {
  const NamedServer server("server");
  const Handle handle = serve(toml({{"web", "10.96.0.1", 80, {backend(server)}}}));
  const std::string below = cgroup().path() + "/below";
  ASSERT_TRUE(std::filesystem::create_directory(below));
  EXPECT_EQ(in_child([&] {
              std::ofstream(below + "/cgroup.procs") << "0" << std::flush;
              require(read_text("/proc/self/cgroup").find("/below\n") != std::string::npos, "not moved");
              require(ask("10.96.0.1", 80) == answered_by("server"), "a process below was not served");
            }),
            "");
  EXPECT_TRUE(eventually([&] { return ::rmdir(below.c_str()) == 0; }));
}

TEST_F(Connect, BeforeAttachNothingChanges) {
  const NamedServer server("server");
  Handle handle(plugin(), unpinned());
  ASSERT_TRUE(ok(handle.load(toml({{"web", "10.96.0.1", 80, {backend(server)}}}))));
  EXPECT_EQ(ask("10.96.0.1", 80), refused_with(ENETUNREACH));
  ASSERT_TRUE(ok(handle.attach()));
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("server"));
}

TEST_F(Connect, LoadAfterAttachIsLiveAtOnce) {
  const NamedServer server("server");
  Handle handle(plugin(), unpinned());
  ASSERT_TRUE(ok(handle.attach()));
  EXPECT_EQ(ask("10.96.0.1", 80), refused_with(ENETUNREACH));
  ASSERT_TRUE(ok(handle.load(toml({{"web", "10.96.0.1", 80, {backend(server)}}}))));
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("server"));
}

TEST_F(Connect, AfterDetachNothingIsAttached) {
  const NamedServer server("server");
  Handle handle = serve(toml({{"web", "10.96.0.1", 80, {backend(server)}}}));
  EXPECT_EQ(connect4_programs(cgroup()).size(), 1u);
  ASSERT_TRUE(ok(handle.detach()));
  EXPECT_EQ(ask("10.96.0.1", 80), refused_with(ENETUNREACH));
  EXPECT_TRUE(connect4_programs(cgroup()).empty());
}

TEST_F(Connect, AfterCloseNothingIsLeft) {
  const NamedServer server("server");
  BpfObjects ours;
  {
    const Handle handle = serve(toml({{"web", "10.96.0.1", 80, {backend(server)}}}));
    ours = objects_of(cgroup());
    EXPECT_EQ(ours.programs.size(), 1u);
    EXPECT_GE(ours.maps.size(), 2u);
  }
  EXPECT_EQ(ask("10.96.0.1", 80), refused_with(ENETUNREACH));
  EXPECT_TRUE(eventually([&] { return still_there(ours) == 0; })) << still_there(ours);
}

}  // namespace
