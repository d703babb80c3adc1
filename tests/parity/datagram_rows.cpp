// SPDX-License-Identifier: BSD-2-Clause
#include <cerrno>

#include "tests/parity/checks.h"
#include "tests/support/client.h"
#include "tests/support/observe.h"
#include "tests/support/udp.h"

namespace parity {

using namespace support;

namespace {

Service names(std::vector<Backend> backends, const std::string& more = {}) {
  return {"names", vip, port, std::move(backends), "refuse", "protocol = \"udp\"\n" + more};
}

/// From a backend "one", to a socket that is bound there, connected or not.
void expect_answers(const std::string& from, const std::string& address, const std::string& peer) {
  const UdpSocket unconnected(from);
  EXPECT_EQ(ask(unconnected, address, port).name, "one");  // which compares where it comes from
  const UdpSocket connected(from);
  connected.connect(address, port);
  EXPECT_EQ(peer_of(connected.get()), peer);
  connected.send("?");
  const Datagram answer = connected.receive();
  EXPECT_EQ(answer.bytes.substr(0, 4), "one ");
  EXPECT_EQ(answer.address, address);
  EXPECT_EQ(answer.port, port);
}

}  // namespace

void answer_comes_from_the_vip(Stage& stage) {
  const UdpServer one("one");
  stage.serve({names({one.backend()})});
  expect_answers("127.0.0.1", vip, "10.96.0.1:80");
}

void answer_comes_from_the_vip_over_ipv6(Stage& stage) {
  const UdpServer one("one", "::1");
  stage.serve({{"names", vip6, port, {one.backend()}, "refuse", "protocol = \"udp\"\n"}});
  expect_answers("::1", vip6, "[fd00:96::1]:80");
}

void answer_comes_from_the_mapped_vip(Stage& stage) {
  const UdpServer one("one");
  stage.serve({names({one.backend()})});
  expect_answers("::", "::ffff:10.96.0.1", "[::ffff:10.96.0.1]:80");
}

void datagrams_of_a_socket_go_to_one_backend(Stage& stage) {
  const UdpServer one("one"), two("two");
  stage.serve({names({one.backend(), two.backend()}, "policy = \"round_robin\"\n")});
  const UdpSocket first, second;
  const std::string name = ask(first, vip, port).name;
  EXPECT_NE(ask(second, vip, port).name, name);
  for (int i = 0; i < 10; ++i) EXPECT_EQ(ask(first, vip, port).name, name);
}

void unconnected_socket_is_given_another_backend(Stage& stage) {
  const UdpServer one("one"), two("two");
  stage.serve({names({one.backend()})});
  const UdpSocket client;
  EXPECT_EQ(ask(client, vip, port).name, "one");
  stage.reload({names({two.backend()})});
  EXPECT_EQ(ask_until_answered(client, vip, port).name, "two");
}

void datagram_without_backend(Stage& stage) {
  stage.serve({names({})});
  const Fd fd = udp_socket();
  const int connected = connect_errno(fd.get(), vip, port);
  EXPECT_EQ(connected, stage.either(refusal(ECONNREFUSED), 0));
  if (connected != 0) return;
  ASSERT_EQ(::send(fd.get(), "?", 1, 0), 1);
  EXPECT_EQ(receive(fd.get()), "ECONNREFUSED");
}

void connected_socket_whose_backend_leaves(Stage& stage) {
  const UdpServer one("one"), two("two");
  stage.serve({names({one.backend()})});
  const UdpSocket client;
  client.connect(vip, port);
  client.send("?");
  EXPECT_EQ(client.receive().bytes.substr(0, 4), "one ");
  stage.reload({names({two.backend()})});
  const std::string seen = stage.either<std::string>("ECONNABORTED", "two");
  if (seen == "two") client.send("?");
  const std::string answer = receive(client.get());
  EXPECT_EQ(answer.substr(0, seen.size()), seen);
}

}  // namespace parity
