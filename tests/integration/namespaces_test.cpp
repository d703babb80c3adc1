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

struct Family {
  int socket;
  std::string backend;
  std::string leaving;   // VIP of services whose backend leaves
  std::string staying;   // VIP of services whose backend stays
  std::string draining;  // the first again, but TCP is not to be reset
};
const Family families[] = {{AF_INET, "127.0.0.1", "10.96.0.1", "10.96.0.2", "10.96.0.3"},
                           {AF_INET6, "::1", "fd00::1", "fd00::2", "fd00::3"}};

/// What one container has of one family: its own backends, at the address that all have, and sockets of each kind.
class Inhabitant {
 public:
  explicit Inhabitant(const Family& family)
      : leaving_udp_("leaving", family.backend, leaving_port),
        staying_udp_("staying", family.backend, staying_port),
        leaving_tcp_(family.backend, leaving_port),
        staying_tcp_(family.backend, staying_port),
        ended_(connected_udp(family, family.leaving, 53)),
        other_(connected_udp(family, family.staying, 53)),
        direct_(connected_udp(family, family.backend, leaving_port)),
        moved_(connected_udp(family, family.leaving, 53)),
        reset_(leaving_tcp_, family.leaving, 80),
        draining_(leaving_tcp_, family.draining, 80),
        staying_(staying_tcp_, family.staying, 80),
        plain_(leaving_tcp_, family.backend, leaving_port) {
    require(connect_errno(moved_.get(), family.staying, 53) == 0, "UDP that moves on");
    require(reset_.works(), "TCP before");
  }

  /// To be called when the backend has left.
  void require_that_only_its_sockets_are_ended() const {
    const std::string said = receive(ended_.get());
    require(said == "ECONNABORTED", "UDP of the backend that left: " + said);
    require(end_of(reset_.client) == ECONNABORTED, "TCP of the backend that left");
    for (const Fd* spared : {&other_, &direct_, &moved_}) {
      require(::send(spared->get(), "x", 1, 0) == 1, "UDP that is spared does not send");
      require(receive(spared->get()).find(" from ") != std::string::npos, "UDP that is spared hears nothing");
    }
    require(draining_.works() && staying_.works() && plain_.works(), "TCP that is spared");
  }

 private:
  static Fd connected_udp(const Family& family, const std::string& address, std::uint16_t port) {
    Fd fd = udp_socket(family.socket);
    require(connect_errno(fd.get(), address, port) == 0, "UDP to " + address);
    return fd;
  }

  NamedUdpServer leaving_udp_, staying_udp_;
  TcpListener leaving_tcp_, staying_tcp_;
  Fd ended_, other_, direct_, moved_;
  Connection reset_, draining_, staying_, plain_;
};

/// Says when it is connected, and looks at its sockets when it is told that a backend has left.
void live_in_a_namespace(const Channel& channel) {
  checked(::unshare(CLONE_NEWNET), "unshare");
  raise_loopback();
  const Inhabitant four(families[0]), six(families[1]);
  channel.tell('c');
  channel.hear();
  four.require_that_only_its_sockets_are_ended();
  six.require_that_only_its_sockets_are_ended();
}

class Namespaces : public Integration {};

TEST_F(Namespaces, SocketsOfABackendThatLeftAreEndedInEach) {
  if (!can(CLUSTERIP_CAN_DESTROY)) SKIP_OR_FAIL("this kernel cannot end sockets");

  const std::string udp = "protocol = \"udp\"";
  const std::string reset = "on_remove = \"reset\"";
  const auto services = [&](std::uint16_t port) {
    std::vector<Service> all;
    for (const Family& family : families) {
      const std::string v = family.socket == AF_INET ? "4" : "6";
      const std::vector<Backend> first = {{family.backend, port}}, staying = {{family.backend, staying_port}};
      all.push_back({"udp" + v, family.leaving, 53, first, "refuse", udp});
      all.push_back({"udp-other" + v, family.staying, 53, staying, "refuse", udp});
      all.push_back({"tcp" + v, family.leaving, 80, first, "refuse", reset});
      all.push_back({"tcp-other" + v, family.staying, 80, staying, "refuse", reset});
      all.push_back({"tcp-drain" + v, family.draining, 80, first});
    }
    return toml(all);
  };
  Handle handle = serve(services(leaving_port));
  std::vector<std::unique_ptr<Child>> containers;
  for (int i = 0; i < 3; ++i) containers.push_back(std::make_unique<Child>(live_in_a_namespace));
  for (const auto& container : containers) container->channel().hear();
  std::uint64_t live = 0;
  for (const SeenService& service : handle.visit()) live += service.live;
  EXPECT_EQ(live, 3u * 2u * 6u) << "in each, of each family: three of UDP and three of TCP";

  ASSERT_TRUE(ok(handle.load(services(staying_port))));
  for (const auto& container : containers) container->channel().tell('g');
  for (const auto& container : containers) EXPECT_EQ(container->wait(), "");
  for (const SeenService& service : handle.visit()) EXPECT_EQ(service.reason, "") << service.name;
  EXPECT_TRUE(eventually([&] {
    return std::ranges::all_of(handle.visit(), [](const SeenService& service) { return service.live == 0; });
  }));
}

}  // namespace
