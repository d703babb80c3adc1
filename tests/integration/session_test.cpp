// SPDX-License-Identifier: BSD-2-Clause
//
// What is remembered of a socket: the name of its peer, its flows, and that it counts at its backend.
#include <sys/socket.h>
#include <sys/wait.h>

#include <csignal>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "bpf/map_layout.h"
#include "tests/support/bpf_objects.h"
#include "tests/support/fixture.h"
#include "tests/support/tcp.h"

namespace {

using namespace support;

constexpr const char* udp = "protocol = \"udp\"";

class Session : public Integration {
 protected:
  static std::string local(const NamedServer& server) { return server.address() + ":" + std::to_string(server.port()); }

  static void disconnect(int fd) {
    sockaddr nowhere{};
    nowhere.sa_family = AF_UNSPEC;
    ASSERT_EQ(::connect(fd, &nowhere, sizeof nowhere), 0);
  }

  static std::uint64_t live(Handle& handle, std::size_t service = 0) { return handle.visit().at(service).live; }
};

TEST_F(Session, PeerIsTheVipAndSoIsTheOriginalDestination) {
  const NamedServer server("server");
  Handle handle = serve(toml({{"web", "10.96.0.1", 80, {backend(server)}}}));
  const Fd fd = tcp_socket();
  ASSERT_EQ(connect_errno(fd.get(), "10.96.0.1", 80), 0);
  EXPECT_EQ(peer_of(fd.get()), "10.96.0.1:80");
  EXPECT_EQ(handle.original_destination(fd.get()), "10.96.0.1:80");
  EXPECT_EQ(handle.visit().at(0).reversed, 1u);

  const Fd plain = tcp_socket();
  EXPECT_EQ(handle.original_destination(plain.get()), "ENOENT");
  EXPECT_EQ(handle.original_destination(-1), "EBADF");
}

TEST_F(Session, WithoutPeerNamesThePeerIsTheBackend) {
  const NamedServer server("server");
  Handle handle = serve("[engine]\npeer_names = false\n" + toml({{"web", "10.96.0.1", 80, {backend(server)}}}));
  const Fd fd = tcp_socket();
  ASSERT_EQ(connect_errno(fd.get(), "10.96.0.1", 80), 0);
  EXPECT_EQ(peer_of(fd.get()), local(server));
  EXPECT_EQ(handle.original_destination(fd.get()), "ENOENT") << "nothing is kept where nothing needs it";

  ASSERT_TRUE(ok(handle.load(toml({{"web", "10.96.0.1", 80, {backend(server)}}}))));
  const Fd named = tcp_socket();
  ASSERT_EQ(connect_errno(named.get(), "10.96.0.1", 80), 0);
  EXPECT_EQ(peer_of(named.get()), "10.96.0.1:80") << "a reload attaches the hooks that it needs";
}

TEST_F(Session, FollowsTheSocketToAnotherVipAndToAPlainAddress) {
  const NamedUdpServer one("one"), two("two", "127.0.0.2");
  Handle handle = serve(toml({{"first", "10.96.0.1", 53, {backend(one)}, "refuse", udp},
                              {"second", "10.96.0.2", 53, {backend(two)}, "refuse", udp},
                              {"shared", "10.96.0.3", 53, {backend(one)}, "refuse", udp}}));
  const Fd fd = udp_socket();
  ASSERT_EQ(connect_errno(fd.get(), "10.96.0.1", 53), 0);
  EXPECT_EQ(peer_of(fd.get()), "10.96.0.1:53");
  ASSERT_EQ(connect_errno(fd.get(), "10.96.0.2", 53), 0);
  EXPECT_EQ(peer_of(fd.get()), "10.96.0.2:53");
  ASSERT_EQ(connect_errno(fd.get(), "10.96.0.3", 53), 0);
  EXPECT_EQ(peer_of(fd.get()), "10.96.0.3:53") << "two VIPs share a backend, not a socket";
  ASSERT_EQ(connect_errno(fd.get(), one.address(), one.port()), 0);
  EXPECT_EQ(peer_of(fd.get()), one.address() + ":" + std::to_string(one.port())) << "asked for by its own address";
  EXPECT_EQ(handle.original_destination(fd.get()), "ENOENT");
  disconnect(fd.get());
  EXPECT_EQ(peer_of(fd.get()), "ENOTCONN");
}

TEST_F(Session, BackendOnTheAddressOfItsVipIsNamed) {
  const NamedServer server("server", "127.0.0.9");
  Handle handle = serve(toml({{"web", "127.0.0.9", 80, {backend(server)}}}));
  const Fd fd = tcp_socket();
  ASSERT_EQ(connect_errno(fd.get(), "127.0.0.9", 80), 0);
  EXPECT_EQ(peer_of(fd.get()), "127.0.0.9:80");
}

TEST_F(Session, SurvivesNewMaps) {
  const NamedServer server("server");
  const NamedUdpServer udp_server("udp");
  std::vector<Service> services = {{"a", "10.96.0.1", 80, {backend(server)}},
                                   {"b", "10.96.0.1", 53, {backend(udp_server)}, "refuse", udp}};
  Handle handle = serve(toml(services));
  const Fd fd = tcp_socket();
  ASSERT_EQ(connect_errno(fd.get(), "10.96.0.1", 80), 0);
  const Fd flow = udp_socket();
  ASSERT_EQ(exchange(flow.get(), "10.96.0.1", 53), "udp from 10.96.0.1:53");

  const auto more = more_services(200, backend(server));
  services.insert(services.end(), more.begin(), more.end());
  ASSERT_TRUE(ok(handle.load(toml(services))));
  EXPECT_EQ(peer_of(fd.get()), "10.96.0.1:80");
  EXPECT_EQ(live(handle), 1u);
  EXPECT_EQ(exchange(flow.get(), "10.96.0.1", 53), "udp from 10.96.0.1:53");
  EXPECT_EQ(handle.visit().at(1).connects, 1u) << "the flow was kept";
}

TEST_F(Session, CountsLiveConnectionsUntilTheyEnd) {
  const NamedServer server("server");
  Handle handle = serve(toml({{"web", "10.96.0.1", 80, {backend(server)}}}));
  {
    const Fd one = tcp_socket(), two = tcp_socket();
    ASSERT_EQ(connect_errno(one.get(), "10.96.0.1", 80), 0);
    ASSERT_EQ(connect_errno(two.get(), "10.96.0.1", 80), 0);
    EXPECT_EQ(live(handle), 2u);
    EXPECT_EQ(handle.visit().at(0).backends.at(0).live, 2u);
  }
  EXPECT_EQ(live(handle), 0u);
}

TEST_F(Session, ConnectThatFailsCountsNoLonger) {
  Handle handle = serve(toml({{"web", "10.96.0.1", 80, {{"127.0.0.1", 1}}}}));
  const Fd fd = tcp_socket();
  EXPECT_EQ(connect_errno(fd.get(), "10.96.0.1", 80), ECONNREFUSED) << "nobody listens there";
  EXPECT_EQ(live(handle), 0u) << "though the socket is still open";
}

TEST_F(Session, NextConnectGivesBack) {
  const NamedUdpServer one("one"), two("two", "127.0.0.2");
  Handle handle = serve(toml(
      {{"a", "10.96.0.1", 53, {backend(one)}, "refuse", udp}, {"b", "10.96.0.2", 53, {backend(two)}, "refuse", udp}}));
  const Fd fd = udp_socket();
  ASSERT_EQ(connect_errno(fd.get(), "10.96.0.1", 53), 0);
  EXPECT_EQ(live(handle, 0), 1u);
  ASSERT_EQ(connect_errno(fd.get(), "10.96.0.2", 53), 0);
  EXPECT_EQ(live(handle, 0), 0u);
  EXPECT_EQ(live(handle, 1), 1u);
}

TEST_F(Session, KilledClientGivesBack) {
  const NamedServer server("server");
  Handle handle = serve(toml({{"web", "10.96.0.1", 80, {backend(server)}}}));
  Child client([](const Channel& channel) {
    const Fd fd = tcp_socket();
    require(connect_errno(fd.get(), "10.96.0.1", 80) == 0, "not connected");
    channel.tell('c');
    channel.hear();
  });
  client.channel().hear();
  EXPECT_EQ(live(handle), 1u);
  client.kill();
  client.wait();
  EXPECT_EQ(live(handle), 0u);
}

TEST_F(Session, FlowKeepsItsBackendUntilThatLeaves) {
  const NamedUdpServer one("one"), two("two", "127.0.0.2"), three("three", "127.0.0.3");
  const Service both{"dns", "10.96.0.1", 53, {backend(one), backend(two)}, "refuse", udp};
  Handle handle = serve(toml({both}));
  const Fd fd = udp_socket();
  const std::string first = exchange(fd.get(), "10.96.0.1", 53);
  for (int i = 0; i < 50; ++i) ASSERT_EQ(exchange(fd.get(), "10.96.0.1", 53), first);
  EXPECT_EQ(handle.visit().at(0).connects, 1u);
  const std::uint16_t port = own_port(fd);

  const bool was_one = first.starts_with("one");
  ASSERT_TRUE(ok(handle.set_backends(
      "dns", {backend(was_one ? one : two), backend(was_one ? two : one, 9), backend(three, 100)})));
  for (int i = 0; i < 10; ++i) ASSERT_EQ(exchange(fd.get(), "10.96.0.1", 53), first) << "others come, it stays";
  ASSERT_TRUE(ok(handle.set_backends("dns", {backend(was_one ? two : one)})));
  EXPECT_EQ(exchange(fd.get(), "10.96.0.1", 53), (was_one ? "two" : "one") + std::string(" from 10.96.0.1:53"));
  EXPECT_EQ(own_port(fd), port);
}

TEST_F(Session, FlowsOfOneSocketAreToldApart) {
  const NamedUdpServer one("one"), two("two", "127.0.0.2");
  const Handle handle = serve(toml(
      {{"a", "10.96.0.1", 53, {backend(one)}, "refuse", udp}, {"b", "10.96.0.2", 53, {backend(two)}, "refuse", udp}}));
  const Fd fd = udp_socket();
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(exchange(fd.get(), "10.96.0.1", 53), "one from 10.96.0.1:53");
    EXPECT_EQ(exchange(fd.get(), "10.96.0.2", 53), "two from 10.96.0.2:53");
    EXPECT_EQ(exchange(fd.get(), two.address(), two.port()), "two from 10.96.0.2:53")
        << "the reply of a backend that is also asked for by its VIP";
  }
}

TEST_F(Session, SocketForgetsTheFlowThatCameFirst) {
  constexpr std::size_t flows = 8;  // that a socket keeps
  std::vector<Service> services;
  std::vector<std::unique_ptr<NamedUdpServer>> servers;
  for (std::size_t i = 0; i <= flows; ++i) {
    servers.push_back(std::make_unique<NamedUdpServer>("udp" + std::to_string(i)));
    services.push_back(
        {"udp" + std::to_string(i), "10.96.0." + std::to_string(i + 1), 53, {backend(*servers.back())}, "refuse", udp});
  }
  Handle handle = serve(toml(services));
  const Fd fd = udp_socket();
  const auto ask_all = [&](std::size_t first) {
    for (std::size_t i = first; i <= flows; ++i)
      ASSERT_EQ(exchange(fd.get(), services[i].vip, 53), services[i].name + " from " + services[i].vip + ":53");
  };
  ask_all(0);
  ask_all(1);
  for (std::size_t i = 1; i <= flows; ++i) EXPECT_EQ(handle.visit().at(i).connects, 1u) << "these are kept";
  EXPECT_EQ(exchange(fd.get(), "10.96.0.1", 53), "udp0 from 10.96.0.1:53");
  EXPECT_EQ(handle.visit().at(0).connects, 2u) << "a new one";
}

TEST_F(Session, SendtoOnAConnectedSocketGoesToItsBackend) {
  const NamedUdpServer one("one"), two("two", "127.0.0.2");
  const Handle handle = serve(toml({{"dns", "10.96.0.1", 53, {backend(one), backend(two)}, "refuse", udp}}));
  for (int i = 0; i < 20; ++i) {
    const Fd fd = udp_socket();
    ASSERT_EQ(connect_errno(fd.get(), "10.96.0.1", 53), 0);
    ASSERT_EQ(::send(fd.get(), "x", 1, 0), 1);
    const std::string first = receive(fd.get());
    EXPECT_EQ(exchange(fd.get(), "10.96.0.1", 53), first);
  }
}

TEST_F(Session, ConnectedUdpSocketOfABackendThatLeftIsEnded) {
  if (!can(CLUSTERIP_CAN_DESTROY)) SKIP_OR_FAIL("this kernel cannot end sockets");

  const NamedUdpServer one("one"), two("two", "127.0.0.2"), plain("plain", "127.0.0.3");
  Handle handle =
      serve(toml({{"a", "10.96.0.1", 53, {backend(one)}, "refuse", udp},
                  {"b", "10.96.0.2", 53, {backend(two)}, "refuse", udp},
                  {"c", "10.96.0.3", 53, {backend(one)}, "refuse", std::string(udp) + "\non_remove = \"keep\""}}));
  const Fd pointing = udp_socket(), other = udp_socket(), direct = udp_socket(), moved = udp_socket(),
           kept = udp_socket();
  ASSERT_EQ(connect_errno(pointing.get(), "10.96.0.1", 53), 0);
  ASSERT_EQ(connect_errno(other.get(), "10.96.0.2", 53), 0);
  ASSERT_EQ(connect_errno(direct.get(), one.address(), one.port()), 0);
  ASSERT_EQ(connect_errno(moved.get(), "10.96.0.1", 53), 0);
  ASSERT_EQ(connect_errno(moved.get(), plain.address(), plain.port()), 0);
  ASSERT_EQ(connect_errno(kept.get(), "10.96.0.3", 53), 0);

  ASSERT_TRUE(ok(handle.set_backends("a", {backend(two)})));
  ASSERT_TRUE(ok(handle.set_backends("c", {backend(two)})));
  EXPECT_EQ(receive(pointing.get()), "ECONNABORTED");
  for (const Fd* spared : {&other, &direct, &moved, &kept}) {
    ASSERT_EQ(::send(spared->get(), "x", 1, 0), 1);
    EXPECT_NE(receive(spared->get()).find(" from "), std::string::npos);
  }
  EXPECT_EQ(handle.visit().at(0).reason, "");
}

TEST_F(Session, ConnectThatFailsLeavesAUdpSocketWithItsPeer) {
  if (!can(CLUSTERIP_CAN_DESTROY)) SKIP_OR_FAIL("this kernel cannot end sockets");

  const NamedUdpServer plain("plain");
  const NamedUdpServer other("other", "127.0.0.2");
  Handle handle = serve(toml({{"a", "10.96.0.1", 53, {{"10.200.0.1", 53}}, "refuse", udp}}));
  const Fd fd = udp_socket();
  ASSERT_EQ(connect_errno(fd.get(), plain.address(), plain.port()), 0);
  ASSERT_EQ(connect_errno(fd.get(), "10.96.0.1", 53), ENETUNREACH);

  ASSERT_TRUE(ok(handle.set_backends("a", {backend(other)})));
  ASSERT_EQ(::send(fd.get(), "x", 1, 0), 1);
  EXPECT_NE(receive(fd.get()).find("plain from "), std::string::npos);
}

/// The kernel looks at the family of a UDP socket's address only behind the programs.
TEST_F(Session, AddressOfAnotherFamilyChangesNothing) {
  const NamedUdpServer plain("plain");
  const NamedUdpServer server("server", "127.0.0.2");
  Handle handle = serve(toml({{"a", "10.96.0.1", 53, {backend(server)}, "refuse", std::string(udp) + "\nmark = 193"}}));
  const Fd fd = udp_socket();
  ASSERT_EQ(connect_errno(fd.get(), plain.address(), plain.port()), 0);
  sockaddr_in vip = *reinterpret_cast<const sockaddr_in*>(Endpoint("10.96.0.1", 53).address());
  vip.sin_family = AF_APPLETALK;
  EXPECT_EQ(::connect(fd.get(), reinterpret_cast<const sockaddr*>(&vip), sizeof vip), -1);
  EXPECT_EQ(errno, EAFNOSUPPORT);

  int mark = -1;
  socklen_t length = sizeof mark;
  ASSERT_EQ(::getsockopt(fd.get(), SOL_SOCKET, SO_MARK, &mark, &length), 0);
  EXPECT_EQ(mark, 0);
  EXPECT_EQ(handle.visit().at(0).connects, 0u);
}

TEST_F(Session, TcpOfABackendThatLeftGoesOnUnlessResetIsAsked) {
  if (!can(CLUSTERIP_CAN_DESTROY)) SKIP_OR_FAIL("this kernel cannot end sockets");

  Fd listener(checked(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), "socket"));
  const Endpoint local_end("127.0.0.1", 7000);
  ASSERT_EQ(::bind(listener.get(), local_end.address(), local_end.length()), 0);
  ASSERT_EQ(::listen(listener.get(), 8), 0);
  Handle handle = serve(toml({{"drain", "10.96.0.1", 80, {{"127.0.0.1", 7000}}},
                              {"reset", "10.96.0.2", 80, {{"127.0.0.1", 7000}}, "refuse", "on_remove = \"reset\""}}));
  const Fd drained = tcp_socket(), reset = tcp_socket();
  ASSERT_EQ(connect_errno(drained.get(), "10.96.0.1", 80), 0);
  const Fd drained_server(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
  ASSERT_EQ(connect_errno(reset.get(), "10.96.0.2", 80), 0);
  ASSERT_TRUE(ok(handle.set_backends("drain", {})));
  ASSERT_TRUE(ok(handle.set_backends("reset", {})));
  EXPECT_EQ(read_answer(reset.get()).error, ECONNABORTED);
  ASSERT_EQ(::send(drained_server.get(), "live", 4, MSG_NOSIGNAL), 4);
  char answer[8];
  EXPECT_EQ(::recv(drained.get(), answer, sizeof answer, 0), 4);
}

TEST_F(Session, IndexOfABackendThatLeftIsNobodyElsesWhileConnectionsCountThere) {
  const TcpListener all("0.0.0.0");
  const auto backends = [&](int round) {
    std::vector<Backend> result;
    for (int i = 1; i <= 4; ++i)
      result.push_back(
          {"127." + std::to_string(1 + round / 250) + "." + std::to_string(round % 250) + "." + std::to_string(i),
           all.port()});
    return result;
  };
  Handle handle = serve(toml({{"web", "10.96.0.1", 80, backends(1), "refuse", "policy = \"least_conn\"\n"}}, {8, 16}));
  // One connection at each of so many changes that indices come back, together as they were: one of those that are in
  // use at the end has been a backend that a connection still counts at. A count below 0 is shown as 0, so that it
  // takes new connections to see it.
  int round = 2;
  for (int turn = 0; turn < 3; ++turn) {
    std::vector<Fd> held;
    for (int change = 0; change < 100 + 25 * turn; ++change) {
      held.push_back(dial("10.96.0.1", 80));
      ASSERT_TRUE(ok(handle.set_backends("web", backends(round++))));
    }
    EXPECT_EQ(handle.visit().at(0).live, 0u) << "of those that it has now";
    held.clear();
    for (int i = 0; i < 8; ++i) held.push_back(dial("10.96.0.1", 80));
    ASSERT_EQ(handle.visit().at(0).live, 8u) << "the end of another's connection was counted";
  }
}

TEST_F(Session, ConnectThatCountsWhenItsBackendHasLongLeftTakesAwayWhatItAdds) {
  const auto backends = [](std::uint32_t round) {
    const std::string network = "127." + std::to_string(1 + round / 250) + "." + std::to_string(round % 250);
    return std::vector<Backend>{{network + ".1", 80}, {network + ".2", 80}};
  };
  Handle handle = serve(toml({{"web", "10.96.0.1", 80, backends(0)}}, {8, 16}), pinned());
  const Fd map = pinned_map(pin(), "Backend_Map");
  const std::uint32_t indices = 2 * read_element<meta_record>(pinned_map(pin(), "Meta_Map"), 0).backends;
  const auto record = [&map](std::uint32_t index) { return read_element<backend_record>(map, index); };
  const auto change_by = [&](std::uint32_t index, std::uint32_t difference) {
    auto changed = record(index);
    changed.live += difference;
    write_element(map, index, changed);
  };
  std::uint32_t round = 1;
  while (round < indices) ASSERT_TRUE(ok(handle.set_backends("web", backends(round++))));  // each was used, and left
  // A connect() was between its two programs all that time. It counts at an index that is nobody's now,
  std::set<std::uint32_t> late;
  for (std::uint32_t index = 0; index < indices; ++index)
    if (record(index).state == BACKEND_UNUSED) late.insert(index);
  for (const std::uint32_t index : late) change_by(index, 1);
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(ok(handle.set_backends("web", backends(round++))));
  // and ends when it is another's.
  int used_again = 0;
  for (const std::uint32_t index : late) {
    used_again += record(index).state == BACKEND_ACTIVE;
    change_by(index, ~0u);
    EXPECT_EQ(record(index).live, 0u) << index;
  }
  EXPECT_GT(used_again, 0) << "the test has no effect";
  EXPECT_TRUE(ok(handle.detach()));
}

}  // namespace
