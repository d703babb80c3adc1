// SPDX-License-Identifier: BSD-2-Clause
#include "fallback_proxy/local_vips.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sched.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdlib>
#include <optional>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "tests/support/client.h"
#include "tests/support/environment.h"
#include "tests/support/fd.h"
#include "tests/support/named_server.h"
#include "tests/support/observe.h"
#include "tests/support/process.h"
#include "tests/support/restrict.h"

namespace {

using config::Address;
using support::checked;
using support::Fd;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using userspace::LocalVips;

Address address(const std::string& text) { return boost::asio::ip::make_address(text); }

std::vector<Address> addresses(const std::vector<std::string>& texts) {
  std::vector<Address> list;
  std::ranges::transform(texts, std::back_inserter(list), address);
  return list;
}

/// Runs a command line in the shell; returns what it writes to stdout.
std::string shell(const std::string& line) {
  const auto finished = support::run({"sh", "-ec", line});
  if (finished.exit_code != 0) throw std::runtime_error(line + ": " + finished.err);
  return finished.out;
}

std::set<std::string> lines(const std::string& text) {
  std::set<std::string> lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) {
    line.erase(line.find_last_not_of(' ') + 1);
    lines.insert(line);
  }
  return lines;
}

/// Our routes as iproute2 sees them.
std::set<std::string> our_routes() {
  return lines(shell("ip -4 route show table local proto 96; ip -6 route show table local proto 96"));
}

/// All other routes of all tables.
std::string other_routes() {
  return shell("ip -4 route show table all; ip -6 route show table all | grep -v 'proto 96'");
}

std::string route(const std::string& vip) {
  const bool is_v4 = address(vip).is_v4();
  return is_v4 ? "local " + vip + " dev lo scope host src 127.0.0.1"
               : "local " + vip + " dev lo src ::1 metric 1024 pref medium";
}

/// Throws when it fails as a whole.
std::vector<std::string> reconcile(LocalVips& vips, const std::vector<Address>& wanted) {
  const auto failures = vips.reconcile(wanted);
  if (!failures) throw std::runtime_error(failures.error().message);
  std::vector<std::string> list;
  for (const auto& failure : *failures) list.push_back(failure.vip.to_string() + ": " + failure.reason);
  return list;
}

LocalVips open_vips() {
  auto vips = LocalVips::open();
  if (!vips) throw std::runtime_error(vips.error().message);
  return std::move(*vips);
}

std::vector<Address> many_v4(std::uint32_t count) {
  std::vector<Address> list;
  for (std::uint32_t i = 0; i < count; ++i) list.push_back(boost::asio::ip::address_v4(0x0a600001 + i));
  return list;
}

std::vector<Address> many_v6(int count) {
  std::vector<Address> list;
  for (int i = 0; i < count; ++i) list.push_back(address(fmt::format("fd00:96::{:x}", i + 1)));
  return list;
}

Fd network_namespace() {
  return Fd(checked(::open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC), "network namespace"));
}

void enter(const Fd& network_namespace) { checked(::setns(network_namespace.get(), CLONE_NEWNET), "setns"); }

/// Each test has a network namespace of its own, with `lo` up.
class VipRoutes : public testing::Test {
 protected:
  void SetUp() override {
    if (!support::missing_privilege().empty()) {
      if (std::getenv("CLUSTERIP_REQUIRE_PRIVILEGE") != nullptr) FAIL() << support::missing_privilege();
      GTEST_SKIP() << support::missing_privilege();
    }
    before_ = network_namespace();
    checked(::unshare(CLONE_NEWNET), "unshare");
    shell("ip link set lo up");
  }

  void TearDown() override {
    if (before_.get() >= 0) enter(before_);
  }

 private:
  Fd before_;
};

TEST_F(VipRoutes, MakesEachVipLocalByOneRouteOfOurs) {
  const std::string before = other_routes();
  LocalVips vips = open_vips();
  EXPECT_THAT(reconcile(vips, addresses({"10.96.0.10", "192.10.100.100", "fd00:96::10"})), IsEmpty());
  EXPECT_THAT(our_routes(), ElementsAre(route("10.96.0.10"), route("192.10.100.100"), route("fd00:96::10")));
  EXPECT_THAT(reconcile(vips, {}), IsEmpty());
  EXPECT_EQ(other_routes(), before);
}

TEST_F(VipRoutes, LetsAServerBeReachedFromTheLoopbackAddress) {
  LocalVips vips = open_vips();
  ASSERT_THAT(reconcile(vips, addresses({"10.96.0.10"})), IsEmpty());
  const support::NamedServer server("a", "10.96.0.10");
  EXPECT_EQ(support::ask("10.96.0.10", server.port()), support::answered_by("a"));
  const Fd client = support::tcp_socket();
  ASSERT_EQ(support::connect_errno(client.get(), "10.96.0.10", server.port()), 0);
  sockaddr_in source{};
  socklen_t length = sizeof source;
  checked(::getsockname(client.get(), reinterpret_cast<sockaddr*>(&source), &length), "getsockname");
  EXPECT_EQ(ntohl(source.sin_addr.s_addr), INADDR_LOOPBACK);
}

TEST_F(VipRoutes, TakesAVipOfSeveralServicesOnce) {
  LocalVips vips = open_vips();
  EXPECT_THAT(reconcile(vips, addresses({"10.96.0.10", "10.96.0.10", "10.96.0.11", "10.96.0.10"})), IsEmpty());
  EXPECT_THAT(our_routes(), ElementsAre(route("10.96.0.10"), route("10.96.0.11")));
}

TEST_F(VipRoutes, RemovesWhatIsNoLongerWantedAndTakesBackWhatIsWantedAgain) {
  LocalVips vips = open_vips();
  ASSERT_THAT(reconcile(vips, addresses({"10.96.0.10", "10.96.0.11", "fd00:96::10", "fd00:96::11"})), IsEmpty());
  EXPECT_THAT(reconcile(vips, addresses({"10.96.0.11", "fd00:96::11", "10.96.0.12"})), IsEmpty());
  EXPECT_THAT(our_routes(), ElementsAre(route("10.96.0.11"), route("10.96.0.12"), route("fd00:96::11")));
  EXPECT_THAT(reconcile(vips, addresses({"10.96.0.10"})), IsEmpty());
  EXPECT_THAT(our_routes(), ElementsAre(route("10.96.0.10")));
  EXPECT_THAT(reconcile(vips, {}), IsEmpty());
  EXPECT_THAT(our_routes(), IsEmpty());
}

TEST_F(VipRoutes, KeepsWhatItIsAskedToKeepAndAddsNoneOfThat) {
  LocalVips vips = open_vips();
  ASSERT_THAT(reconcile(vips, addresses({"10.96.0.10", "10.96.0.11"})), IsEmpty());
  const auto kept = addresses({"10.96.0.11", "10.96.0.13"});
  const auto failures = vips.reconcile(addresses({"10.96.0.12"}), kept);
  ASSERT_TRUE(failures);
  EXPECT_THAT(*failures, IsEmpty());
  EXPECT_THAT(our_routes(), ElementsAre(route("10.96.0.11"), route("10.96.0.12")));
}

TEST_F(VipRoutes, SetsRightWhatAKilledProcessLeft) {
  support::Child victim([](const support::Channel& channel) {
    LocalVips vips = open_vips();
    reconcile(vips, addresses({"10.96.0.10", "10.96.0.11", "10.96.0.12", "fd00:96::10"}));
    channel.tell('r');
    channel.hear();
  });
  ASSERT_EQ(victim.channel().hear(), 'r');
  victim.kill();
  victim.wait();
  ASSERT_EQ(our_routes().size(), 4u);

  LocalVips vips = open_vips();
  EXPECT_THAT(reconcile(vips, addresses({"10.96.0.11", "10.96.0.13"})), IsEmpty());
  EXPECT_THAT(our_routes(), ElementsAre(route("10.96.0.11"), route("10.96.0.13")));
}

TEST_F(VipRoutes, LeavesTheAddressOfADeviceAsItIs) {
  shell("ip addr add 10.96.0.10/32 dev lo; ip addr add fd00:96::10/128 dev lo nodad");
  // The kernel adds the route of an IPv6 address a moment later.
  ASSERT_TRUE(support::eventually([] { return other_routes().find("local fd00:96::10") != std::string::npos; }));
  const std::string before = other_routes();
  LocalVips vips = open_vips();
  EXPECT_THAT(reconcile(vips, addresses({"10.96.0.10", "fd00:96::10", "10.96.0.11"})), IsEmpty());
  EXPECT_THAT(our_routes(), ElementsAre(route("10.96.0.11")));
  EXPECT_THAT(reconcile(vips, {}), IsEmpty());
  EXPECT_EQ(other_routes(), before);
}

TEST_F(VipRoutes, LeavesTheRouteOfAnotherOwnerAndReportsTheVip) {
  shell(
      "ip link add net type veth; ip link set net up; ip addr add 192.168.7.1/24 dev net;"
      "ip route add local 10.96.0.10 dev lo table local proto 99;"
      "ip route add blackhole 10.96.0.11 table local proto static;"
      "ip route add local fd00:96::10 dev lo table local proto 99");
  const std::string before = other_routes();
  LocalVips vips = open_vips();
  EXPECT_THAT(
      reconcile(vips, addresses({"10.96.0.12", "10.96.0.10", "10.96.0.11", "fd00:96::10", "192.168.7.255"})),
      ElementsAre("10.96.0.10: somebody else's route for it is in table local (type local, protocol 99)",
                  "10.96.0.11: somebody else's route for it is in table local (type blackhole, protocol 4)",
                  "fd00:96::10: somebody else's route for it is in table local (type local, protocol 99)",
                  "192.168.7.255: somebody else's route for it is in table local (type broadcast, protocol 2)"));
  EXPECT_THAT(our_routes(), ElementsAre(route("10.96.0.12")));
  EXPECT_THAT(reconcile(vips, {}), IsEmpty());
  EXPECT_EQ(other_routes(), before);
}

TEST_F(VipRoutes, NamesTheVipsThatStayUnservedWithoutPrivilegeInOneError) {
  shell("ip addr add 10.96.0.10/32 dev lo");
  EXPECT_EQ(
      support::in_child([] {
        support::drop_capabilities();
        LocalVips vips = open_vips();
        // One is the address of a device, one is in 127.0.0.0/8.
        const auto local = vips.reconcile(addresses({"10.96.0.10", "127.10.0.1"}));
        if (!local || !local->empty()) throw std::runtime_error("could not serve what is local");
        const auto some = vips.reconcile(addresses({"10.96.0.10", "127.10.0.1", "10.96.0.11", "fd00:96::10"}));
        if (some || some.error().code != -EPERM) throw std::runtime_error("not -EPERM");
        const auto many = vips.reconcile(many_v4(10000));
        if (many) throw std::runtime_error("made 10,000 VIPs local without the right to");
        throw std::runtime_error(some.error().message + "\n" + many.error().message);
      }),
      "making VIPs local takes CAP_NET_ADMIN; not local: 10.96.0.11, fd00:96::10\n"
      "making VIPs local takes CAP_NET_ADMIN; not local: 10.96.0.1, 10.96.0.2, 10.96.0.3, 10.96.0.4, 10.96.0.5 and "
      "9994 more");
}

TEST_F(VipRoutes, SaysWhatItCannotRemoveWithoutPrivilege) {
  {
    LocalVips vips = open_vips();
    ASSERT_THAT(reconcile(vips, addresses({"10.96.0.10", "10.96.0.11"})), IsEmpty());
  }
  EXPECT_EQ(support::in_child([] {
              support::drop_capabilities();
              LocalVips vips = open_vips();
              const auto kept = vips.reconcile(addresses({"10.96.0.10", "10.96.0.11"}));
              if (!kept || !kept->empty()) throw std::runtime_error("could not serve what is local");
              reconcile(vips, addresses({"10.96.0.10", "10.96.0.12"}));
            }),
            "making VIPs local takes CAP_NET_ADMIN; not local: 10.96.0.12; "
            "removing local routes takes CAP_NET_ADMIN; not removed: 10.96.0.11");
}

TEST_F(VipRoutes, GivesTheKernelsReasonForEachVipThatItRefuses) {
  shell("echo 1 > /proc/sys/net/ipv6/conf/lo/disable_ipv6");
  LocalVips vips = open_vips();
  EXPECT_THAT(reconcile(vips, addresses({"fd00:96::10", "10.96.0.10", "fd00:96::11"})),
              ElementsAre("fd00:96::10: making it local: IPv6 is disabled on nexthop device",
                          "fd00:96::11: making it local: IPv6 is disabled on nexthop device"));
  EXPECT_THAT(our_routes(), ElementsAre(route("10.96.0.10")));
}

/// The rtnetlink socket that this process has opened.
int netlink_socket() {
  for (int fd = 3; fd < 1024; ++fd) {
    int domain = 0;
    socklen_t length = sizeof domain;
    if (::getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &length) == 0 && domain == AF_NETLINK) return fd;
  }
  throw std::runtime_error("no netlink socket");
}

TEST_F(VipRoutes, GetsAllAnswersThroughTheSmallestReceiveBuffer) {
  shell("echo 1 > /proc/sys/net/ipv6/conf/lo/disable_ipv6");
  LocalVips vips = open_vips();
  const int smallest = 1;
  checked(::setsockopt(netlink_socket(), SOL_SOCKET, SO_RCVBUF, &smallest, sizeof smallest), "SO_RCVBUF");
  std::vector<Address> wanted = many_v6(1000);
  std::ranges::copy(many_v4(1000), std::back_inserter(wanted));
  EXPECT_EQ(reconcile(vips, wanted).size(), 1000u);
  EXPECT_EQ(our_routes().size(), 1000u);
}

TEST_F(VipRoutes, HoldsTenThousandOfEachFamily) {
  std::vector<Address> wanted = many_v4(10000);
  std::ranges::copy(many_v6(10000), std::back_inserter(wanted));
  LocalVips vips = open_vips();
  EXPECT_THAT(reconcile(vips, wanted), IsEmpty());
  EXPECT_EQ(our_routes().size(), 20000u);
  EXPECT_THAT(reconcile(vips, wanted), IsEmpty());  // were one not read back, it would be refused as there already
  wanted.resize(10000);
  EXPECT_THAT(reconcile(vips, wanted), IsEmpty());
  EXPECT_EQ(our_routes().size(), 10000u);
  EXPECT_THAT(reconcile(vips, {}), IsEmpty());
  EXPECT_THAT(our_routes(), IsEmpty());
}

TEST_F(VipRoutes, MissesNoRouteWhileOthersChangeTheirs) {
  const std::vector<Address> wanted = many_v4(3000);
  LocalVips vips = open_vips();
  ASSERT_THAT(reconcile(vips, wanted), IsEmpty());

  // A table that changes while it is read is read again.
  const support::TemporaryDirectory directory;
  std::string batch;
  for (int i = 0; i < 20000; ++i)
    batch += fmt::format("route {} local 10.95.{}.250 dev lo table local proto 99\n", i % 2 == 0 ? "add" : "del",
                         i / 2 % 11);
  support::Child other([&](const support::Channel& channel) {
    channel.tell('b');
    shell("ip -batch " + directory.write("batch", batch));
    channel.tell('e');
  });
  ASSERT_EQ(other.channel().hear(), 'b');
  int rounds = 0;
  for (bool is_over = false; !is_over; ++rounds) {
    pollfd end{other.channel().get(), POLLIN, 0};
    is_over = checked(::poll(&end, 1, 0), "poll") > 0;
    ASSERT_THAT(reconcile(vips, wanted), IsEmpty()) << "round " << rounds;
  }
  EXPECT_EQ(other.wait(), "");
  EXPECT_EQ(our_routes().size(), wanted.size());
}

TEST_F(VipRoutes, RefusesASecondOneInTheNetworkNamespace) {
  std::optional<LocalVips> first = open_vips();
  reconcile(*first, addresses({"10.96.0.10"}));
  const auto second = LocalVips::open();
  ASSERT_FALSE(second);
  EXPECT_EQ(second.error().code, -EBUSY);
  EXPECT_THAT(second.error().message, HasSubstr("another process makes VIPs local in this network namespace"));
  EXPECT_THAT(shell("ss -xap 'src @clusterip/local_vips'"), HasSubstr(fmt::format("pid={},", ::getpid())));
  EXPECT_EQ(support::in_child([] {
              checked(::unshare(CLONE_NEWNET), "unshare");
              open_vips();
            }),
            "");
  first.reset();
  EXPECT_THAT(our_routes(), ElementsAre(route("10.96.0.10")));
  EXPECT_TRUE(LocalVips::open());
}

TEST_F(VipRoutes, PassesOverAnotherUserWhoHoldsTheLock) {
  support::Child squatter([](const support::Channel& channel) {
    checked(::setresuid(65534, 65534, 65534), "setresuid");
    const Fd socket(checked(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0), "socket"));
    sockaddr_un address{.sun_family = AF_UNIX, .sun_path = {}};
    constexpr std::string_view name{"\0clusterip/local_vips", 21};
    name.copy(address.sun_path, name.size());
    const auto length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + name.size());
    checked(::bind(socket.get(), reinterpret_cast<const sockaddr*>(&address), length), "bind");
    channel.tell('b');
    channel.hear();
  });
  ASSERT_EQ(squatter.channel().hear(), 'b');
  LocalVips vips = open_vips();
  EXPECT_THAT(vips.warning(), HasSubstr("user 65534 holds @clusterip/local_vips"));
  EXPECT_THAT(reconcile(vips, addresses({"10.96.0.10"})), IsEmpty());
  EXPECT_THAT(our_routes(), ElementsAre(route("10.96.0.10")));
  // It may be that user's proxy.
  const auto cleanup = support::run({CLUSTERIP_FALLBACK_PROXY, "--cleanup"});
  EXPECT_EQ(cleanup.exit_code, 1);
  EXPECT_THAT(cleanup.err, HasSubstr("user 65534 holds @clusterip/local_vips"));
  EXPECT_THAT(our_routes(), ElementsAre(route("10.96.0.10")));
}

/// How many of so many clients of a port where nobody listens were connected, and be it to themselves.
int self_connects(const std::string& vip, std::uint16_t port, int tries) {
  int connected = 0;
  for (int i = 0; i < tries; ++i) {
    const Fd client = support::tcp_socket();
    const int error = support::connect_errno(client.get(), vip, port);
    if (error == 0) ++connected;
    if (error != 0 && error != ECONNREFUSED) throw std::runtime_error("connect: errno " + std::to_string(error));
  }
  return connected;
}

TEST_F(VipRoutes, NeverConnectsAClientToItself) {
  // Among few ephemeral ports, a client soon has the one that it wants to reach; connect() takes even ones first.
  shell("echo 40000 40031 > /proc/sys/net/ipv4/ip_local_port_range");
  LocalVips vips = open_vips();
  ASSERT_THAT(reconcile(vips, addresses({"10.96.0.10"})), IsEmpty());
  EXPECT_EQ(self_connects("10.96.0.10", 40008, 2000), 0);
  // What it would be without the preferred source.
  shell("ip route add local 10.96.0.11 dev lo table local proto 99");
  EXPECT_GT(self_connects("10.96.0.11", 40008, 2000), 0);
}

TEST_F(VipRoutes, TakesOneAddressAndLeavesItsNeighboursToOtherHosts) {
  const Fd here = network_namespace();
  checked(::unshare(CLONE_NEWNET), "unshare");
  const Fd there = network_namespace();
  shell(
      "ip link set lo up; ip addr add 10.96.0.9/32 dev lo; ip addr add 10.96.0.11/32 dev lo;"
      "ip link add there type veth peer name here netns " +
      fmt::format("/proc/{}/fd/{}", ::getpid(), here.get()) +
      "; ip addr add 192.168.7.2/24 dev there; ip link set there up; ip route add 10.96.0.10 via 192.168.7.1");
  const support::NamedServer other("other", "0.0.0.0", support::NamedServer::Speaks::local_address);
  enter(here);
  shell("ip addr add 192.168.7.1/24 dev here; ip link set here up; ip route add 10.96.0.0/24 via 192.168.7.2");

  LocalVips vips = open_vips();
  ASSERT_THAT(reconcile(vips, addresses({"10.96.0.10"})), IsEmpty());
  const support::NamedServer ours("ours", "10.96.0.10");
  EXPECT_EQ(support::ask("10.96.0.10", ours.port()), support::answered_by("ours"));
  for (const std::string neighbour : {"10.96.0.9", "10.96.0.11", "192.168.7.2"})
    EXPECT_EQ(support::ask(neighbour, other.port()), support::answered_by(neighbour));
  enter(there);
  EXPECT_EQ(support::ask("10.96.0.10", ours.port()), support::answered_by("ours"));
  enter(here);
}

}  // namespace
