// SPDX-License-Identifier: BSD-2-Clause
//
// One fast path, sockets in several network namespaces, as those of containers are.
#include <sched.h>
#include <sys/socket.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "tests/support/fixture.h"
#include "tests/support/tcp.h"

namespace {

using namespace support;

constexpr std::uint16_t leaving_port = 7000;
constexpr std::uint16_t staying_port = 7001;

/// A connection, and the backend's end of it.
struct Connection {
  Connection(const TcpListener& listener, const std::string& address, std::uint16_t port)
      : client(dial(address, port)), server(listener.accept()) {}

  bool works() const {
    send_all(client, "x");
    return receive(server, 1) == "x";
  }

  Fd client;
  Fd server;
};

/// What one container has: its own backends at the addresses that all have, and sockets of each kind. Says when they
/// are connected, and looks at them when it is told that a backend has left.
void live_in_a_namespace(const Channel& channel) {
  checked(::unshare(CLONE_NEWNET), "unshare");
  raise_loopback();
  const NamedUdpServer leaving_udp("leaving", "127.0.0.1", leaving_port);
  const NamedUdpServer staying_udp("staying", "127.0.0.1", staying_port);
  const TcpListener leaving_tcp("127.0.0.1", leaving_port), staying_tcp("127.0.0.1", staying_port);

  const Fd ended = udp_socket(), other = udp_socket(), direct = udp_socket(), moved = udp_socket();
  require(connect_errno(ended.get(), "10.96.0.1", 53) == 0, "UDP to the backend that leaves");
  require(connect_errno(other.get(), "10.96.0.2", 53) == 0, "UDP to the backend that stays");
  require(connect_errno(direct.get(), "127.0.0.1", leaving_port) == 0, "UDP without a VIP");
  require(connect_errno(moved.get(), "10.96.0.1", 53) == 0, "UDP to the backend that leaves");
  require(connect_errno(moved.get(), "10.96.0.2", 53) == 0, "UDP that has moved on");
  const Connection reset(leaving_tcp, "10.96.0.1", 80), draining(leaving_tcp, "10.96.0.3", 80),
      staying(staying_tcp, "10.96.0.2", 80), plain(leaving_tcp, "127.0.0.1", leaving_port);
  require(reset.works(), "TCP before");
  channel.tell('c');
  channel.hear();

  const std::string said = receive(ended.get());
  require(said == "ECONNABORTED", "UDP of the backend that left: " + said);
  require(end_of(reset.client) == ECONNABORTED, "TCP of the backend that left");
  for (const Fd* spared : {&other, &direct, &moved}) {
    require(::send(spared->get(), "x", 1, 0) == 1, "UDP that is spared does not send");
    require(receive(spared->get()).find(" from ") != std::string::npos, "UDP that is spared hears nothing");
  }
  require(draining.works() && staying.works() && plain.works(), "TCP that is spared");
}

class Namespaces : public Integration {};

TEST_F(Namespaces, SocketsOfABackendThatLeftAreEndedInEach) {
  if (!can(CLUSTERIP_CAN_DESTROY)) SKIP_OR_FAIL("this kernel cannot end sockets");

  const std::string udp = "protocol = \"udp\"";
  const std::string reset = "on_remove = \"reset\"";
  const std::vector<Backend> leaving = {{"127.0.0.1", leaving_port}}, staying = {{"127.0.0.1", staying_port}};
  const auto services = [&](const std::vector<Backend>& first) {
    return toml({{"udp", "10.96.0.1", 53, first, "refuse", udp},
                 {"udp-other", "10.96.0.2", 53, staying, "refuse", udp},
                 {"tcp", "10.96.0.1", 80, first, "refuse", reset},
                 {"tcp-other", "10.96.0.2", 80, staying, "refuse", reset},
                 {"tcp-drain", "10.96.0.3", 80, first}});
  };
  Handle handle = serve(services(leaving));
  std::vector<std::unique_ptr<Child>> containers;
  for (int i = 0; i < 3; ++i) containers.push_back(std::make_unique<Child>(live_in_a_namespace));
  for (const auto& container : containers) container->channel().hear();
  EXPECT_EQ(handle.visit().at(3).live, 3u) << "\"udp\"";

  ASSERT_TRUE(ok(handle.load(services(staying))));
  for (const auto& container : containers) container->channel().tell('g');
  for (const auto& container : containers) EXPECT_EQ(container->wait(), "");
  for (const SeenService& service : handle.visit()) EXPECT_EQ(service.reason, "") << service.name;
  EXPECT_TRUE(eventually([&] {
    return std::ranges::all_of(handle.visit(), [](const SeenService& service) { return service.live == 0; });
  }));
}

}  // namespace
