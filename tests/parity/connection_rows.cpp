// SPDX-License-Identifier: BSD-2-Clause
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <sys/socket.h>

#include <cerrno>

#include "tests/parity/checks.h"
#include "tests/support/client.h"
#include "tests/support/named_server.h"
#include "tests/support/observe.h"
#include "tests/support/other_host.h"

namespace parity {

using namespace support;
using testing::HasSubstr;

namespace {

/// Hears the IPv4 packets that leave for the other host.
class Wire {
 public:
  Wire() : fd_(checked(::socket(AF_PACKET, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, htons(ETH_P_ALL)), "socket")) {
    sockaddr_ll cable{};
    cable.sll_family = AF_PACKET;
    cable.sll_protocol = htons(ETH_P_ALL);  // what is sent is shown to those alone who ask for all
    cable.sll_ifindex = static_cast<int>(::if_nametoindex("cable0"));
    checked(::bind(fd_.get(), reinterpret_cast<const sockaddr*>(&cable), sizeof cable), "bind");
  }

  /// How many since the last time.
  int heard() const {
    int count = 0;
    char packet[64];
    sockaddr_ll from{};
    socklen_t length = sizeof from;
    while (::recvfrom(fd_.get(), packet, sizeof packet, 0, reinterpret_cast<sockaddr*>(&from), &length) >= 0)
      count += from.sll_pkttype == PACKET_OUTGOING && ntohs(from.sll_protocol) == ETH_P_IP;
    return count;
  }

 private:
  Fd fd_;
};

/// Of a connect that is refused at once, the other host hears nothing.
void expect_refused_without_a_packet(const Stage& stage, const Wire& wire, std::uint16_t refused_port) {
  wire.heard();
  EXPECT_EQ(ask(vip, refused_port), stage.refused(ECONNREFUSED));
  EXPECT_EQ(wire.heard(), 0);
  dial_errno(OtherHost::v4, port);
  EXPECT_GT(wire.heard(), 0) << "what does leave is heard";
}

/// A connection through the VIP, and the backend's end of it.
struct Pair {
  Fd client;
  Fd backend;
};

Pair connect_through(const TcpListener& backend) {
  Fd client = dial(vip, port);
  return {std::move(client), backend.accept()};
}

void expect_alive(const Pair& pair) {
  send_all(pair.client, "question");
  EXPECT_EQ(receive(pair.backend, 8), "question");
  send_all(pair.backend, "answer");
  EXPECT_EQ(receive(pair.client, 6), "answer");
}

}  // namespace

void backend_answers(Stage& stage) {
  const NamedServer one("one");
  stage.serve({web({backend(one)})});
  EXPECT_EQ(ask(vip, port), answered_by("one"));
}

void backend_answers_over_ipv6(Stage& stage) {
  const NamedServer one("one", "::1");
  stage.serve({{"web", vip6, port, {backend(one)}}});
  const Fd fd = tcp_socket(0, AF_INET6);
  ASSERT_EQ(connect_errno(fd.get(), vip6, port), 0);
  EXPECT_EQ(peer_of(fd.get()), "[fd00:96::1]:80");
  EXPECT_EQ(read_answer(fd.get()), answered_by("one"));
}

void mapped_address_reaches_the_vip(Stage& stage) {
  const NamedServer one("one");
  stage.serve({web({backend(one)})});
  const Fd fd = tcp_socket(0, AF_INET6);
  ASSERT_EQ(connect_errno(fd.get(), "::ffff:10.96.0.1", port), 0);
  EXPECT_EQ(peer_of(fd.get()), "[::ffff:10.96.0.1]:80");
  EXPECT_EQ(read_answer(fd.get()), answered_by("one"));
}

void no_backend_is_refused(Stage& stage) {
  const OtherHost host;
  const Wire wire;
  stage.serve({web({})});
  expect_refused_without_a_packet(stage, wire, port);
}

void unserved_port_is_refused(Stage& stage) {
  const OtherHost host;
  const Wire wire;
  const NamedServer one("one");
  stage.serve({web({backend(one)})});
  expect_refused_without_a_packet(stage, wire, port + 1);
}

void other_address_is_untouched(Stage& stage) {
  const NamedServer one("one"), plain("plain", "127.0.0.2");
  stage.serve({web({backend(one)})});
  const Fd fd = tcp_socket();
  ASSERT_EQ(connect_errno(fd.get(), plain.address(), plain.port()), 0);
  EXPECT_EQ(peer_of(fd.get()), plain.address() + ":" + std::to_string(plain.port()));
  EXPECT_EQ(read_answer(fd.get()), answered_by("plain"));
  EXPECT_EQ(ask("10.96.0.99", port), refused_with(ENETUNREACH)) << "in the same network, but no VIP";
}

void peer_is_the_vip(Stage& stage) {
  const TcpListener one;
  stage.serve({web({one.backend()})});
  const Pair pair = connect_through(one);
  EXPECT_EQ(peer_of(pair.client.get()), "10.96.0.1:80");
}

void half_close_gets_the_whole_reply(Stage& stage) {
  const TcpListener one;
  stage.serve({web({one.backend()})});
  const Pair pair = connect_through(one);
  send_all(pair.client, "question");
  send_end(pair.client);
  EXPECT_EQ(receive_all(pair.backend), "question");
  const std::string reply(100'000, 'r');
  send_all(pair.backend, reply);
  send_end(pair.backend);
  EXPECT_EQ(receive_all(pair.client), reply);
}

void reset_arrives(Stage& stage) {
  const TcpListener one;
  stage.serve({web({one.backend()})});
  Pair pair = connect_through(one);
  expect_alive(pair);
  reset(std::move(pair.backend));
  EXPECT_EQ(end_of(pair.client), ECONNRESET);
}

void live_connection_outlives_its_backend(Stage& stage) {
  const TcpListener one;
  const NamedServer two("two");
  for (const char* on_remove : {"on_remove = \"drain\"\n", "on_remove = \"keep\"\n"}) {
    stage.serve({web({one.backend()}, on_remove)});
    const Pair pair = connect_through(one);
    expect_alive(pair);
    stage.reload({web({backend(two)}, on_remove)});
    expect_alive(pair);
    EXPECT_EQ(ask_often(10), (std::map<std::string, int>{{"two", 10}}));
    expect_alive(pair);
  }
}

void on_remove_reset_ends_connections(Stage& stage) {
  const TcpListener one;
  const NamedServer two("two");
  stage.serve({web({one.backend()}, "on_remove = \"reset\"\n")});
  const Pair pair = connect_through(one);
  expect_alive(pair);
  stage.reload({web({backend(two)}, "on_remove = \"reset\"\n")});
  const int end = end_of(pair.client);
  EXPECT_EQ(end, stage.either(ECONNABORTED, ECONNRESET));
}

void draining_backend_keeps_what_it_has(Stage& stage) {
  const TcpListener one;
  const NamedServer two("two");
  stage.serve({web({one.backend()})});
  const Pair pair = connect_through(one);
  Backend drained = one.backend();
  drained.state = "drain";
  stage.reload({web({drained, backend(two)})});
  EXPECT_EQ(ask_often(20), (std::map<std::string, int>{{"two", 20}}));
  expect_alive(pair);
}

void mistake_changes_nothing(Stage& stage) {
  const NamedServer one("one"), two("two");
  stage.serve({web({backend(one)})});
  const std::string told = stage.reload({web({backend(two)}, "polcy = \"random\"\n")});
  EXPECT_THAT(told, testing::ContainsRegex("clusterip\\.toml:[0-9]+:1: service \"web\": polcy: unknown key"));
  EXPECT_EQ(ask_often(10), (std::map<std::string, int>{{"one", 10}}));
}

void connections_are_counted(Stage& stage) {
  const TcpListener one;
  stage.serve({web({one.backend()}, "policy = \"least_conn\"\n")});
  const auto count = [&](const char* key) {
    const auto backends = stage.status_of("web").at("backends").as_array();
    return backends.at(0).at(key).to_number<int>();
  };
  {
    const Pair first = connect_through(one);
    const Pair second = connect_through(one);
    EXPECT_TRUE(eventually([&] { return count("connects") == 2; }));
    EXPECT_EQ(count("live"), 2);
  }
  EXPECT_TRUE(eventually([&] { return count("live") == 0; }));
  EXPECT_EQ(count("connects"), 2);
}

void backend_sees_whom(Stage& stage) {
  const TcpListener one;
  stage.serve({web({one.backend()})});
  const Fd client = dial(vip, port, "127.7.7.7");
  const std::string seen = peer_of(one.accept().get());
  EXPECT_EQ(seen.substr(0, seen.rfind(':')), stage.either("127.7.7.7", "127.0.0.1"));
}

void unreachable_and_pass(Stage& stage) {
  stage.serve({web({}, {}, "unreachable"), {"passed", other_vip, port, {}, "pass"}});
  EXPECT_EQ(ask(vip, port), stage.refused(stage.either(EHOSTUNREACH, ECONNREFUSED)));
  EXPECT_EQ(ask(other_vip, port), refused_with(stage.either(ENETUNREACH, ECONNREFUSED)));
}

void unserved_port_with_a_wildcard_listener(Stage& stage) {
  const NamedServer one("one"), wildcard("wildcard", "0.0.0.0");
  stage.serve({web({backend(one)})});
  EXPECT_EQ(ask(vip, wildcard.port()), stage.either(stage.refused(ECONNREFUSED), answered_by("wildcard")));
}

void wildcard_listener_on_the_port(Stage& stage) {
  const NamedServer one("one"), wildcard("wildcard", "0.0.0.0", NamedServer::Speaks::name, port);
  stage.serve({web({backend(one)})});
  EXPECT_EQ(ask(vip, port), answered_by(stage.either("one", "wildcard")));
  EXPECT_THAT(boost::json::value_to<std::string>(stage.status_of("web").at("reason")),
              HasSubstr(stage.either("", "Address already in use")));
}

void peer_names_off(Stage& stage) {
  const TcpListener one;
  stage.serve({web({one.backend()})}, "peer_names = false\n");
  const Pair pair = connect_through(one);
  EXPECT_EQ(peer_of(pair.client.get()),
            stage.either(one.address() + ":" + std::to_string(one.port()), std::string("10.96.0.1:80")));
}

void mark_is_set(Stage& stage) {
  const TcpListener one;
  stage.serve({web({one.backend()}, "mark = 193\n")});
  const Pair pair = connect_through(one);
  std::uint32_t mark = 0;
  socklen_t length = sizeof mark;
  ASSERT_EQ(::getsockopt(pair.client.get(), SOL_SOCKET, SO_MARK, &mark, &length), 0);
  EXPECT_EQ(mark, stage.either(193U, 0U));
}

}  // namespace parity
