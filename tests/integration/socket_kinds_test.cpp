// SPDX-License-Identifier: BSD-2-Clause
//
// Sockets that connect in other ways than most: MPTCP, TCP Fast Open, and to port 0.
#include <linux/mptcp.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <fstream>
#include <string>

#include "tests/support/fixture.h"
#include "tests/support/route.h"
#include "tests/support/tcp.h"

namespace {

using namespace support;

/// Calls end after some seconds at the latest.
Fd mptcp_socket(int family) {
  Fd fd(checked(::socket(family, SOCK_STREAM | SOCK_CLOEXEC, IPPROTO_MPTCP), "socket"));
  const timeval bound{10, 0};
  checked(::setsockopt(fd.get(), SOL_SOCKET, SO_RCVTIMEO, &bound, sizeof bound), "SO_RCVTIMEO");
  checked(::setsockopt(fd.get(), SOL_SOCKET, SO_SNDTIMEO, &bound, sizeof bound), "SO_SNDTIMEO");
  return fd;
}

/// Whether both ends speak MPTCP, and have not fallen back to TCP.
bool speaks_mptcp(const Fd& fd) {
  mptcp_info info{};
  socklen_t length = sizeof info;
  return ::getsockopt(fd.get(), SOL_MPTCP, MPTCP_INFO, &info, &length) == 0 &&
         (info.mptcpi_flags & MPTCP_INFO_FLAG_FALLBACK) == 0;
}

/// A listening socket of either kind, at a port that the kernel has chosen.
class Listener {
 public:
  explicit Listener(Fd fd, const std::string& address) : address_(address), fd_(std::move(fd)) {
    const Endpoint local(address, 0);
    checked(::bind(fd_.get(), local.address(), local.length()), "bind");
    checked(::listen(fd_.get(), 16), "listen");
  }

  Backend backend() const { return {address_, own_port(fd_)}; }
  std::string name() const { return text_of_end(address_, own_port(fd_)); }
  const Fd& fd() const { return fd_; }

  /// Takes one connection and tells it `what`.
  Fd answer(const std::string& what) const {
    Fd connection(checked(::accept4(fd_.get(), nullptr, nullptr, SOCK_CLOEXEC), "accept"));
    send_all(connection, what);
    return connection;
  }

 private:
  static std::string text_of_end(const std::string& address, std::uint16_t port) {
    return address.find(':') == std::string::npos ? address + ":" + std::to_string(port)
                                                  : "[" + address + "]:" + std::to_string(port);
  }

  std::string address_;
  Fd fd_;
};

class Mptcp : public Integration {
 protected:
  void SetUp() override {
    Integration::SetUp();
    if (IsSkipped() || HasFatalFailure()) return;
    const Fd any(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, IPPROTO_MPTCP));
    if (any.get() < 0) SKIP_OR_FAIL("this kernel has no MPTCP");
  }
};

TEST_F(Mptcp, ReachesTheBackendOfEachFamily) {
  const Listener four(mptcp_socket(AF_INET), "127.0.0.1"), six(mptcp_socket(AF_INET6), "::1");
  Handle handle = serve(toml({{"four", "10.96.0.1", 80, {four.backend()}}, {"six", "fd00::1", 80, {six.backend()}}}));
  const struct {
    int family;
    const char* vip;
    const Listener& listener;
  } rows[] = {{AF_INET, "10.96.0.1", four}, {AF_INET6, "fd00::1", six}, {AF_INET6, "::ffff:10.96.0.1", four}};
  for (const auto& [family, vip, listener] : rows) {
    SCOPED_TRACE(vip);
    const Fd fd = mptcp_socket(family);
    ASSERT_EQ(connect_errno(fd.get(), vip, 80), 0);
    listener.answer("it");
    EXPECT_EQ(read_answer(fd.get()), answered_by("it"));
    EXPECT_TRUE(speaks_mptcp(fd));
  }
  EXPECT_EQ(handle.visit().at(0).connects, 2u);
  EXPECT_EQ(handle.visit().at(1).connects, 1u);
}

TEST_F(Mptcp, FallsBackToTcpWithABackendThatSpeaksNothingElse) {
  const NamedServer server("server");
  const Handle handle = serve(toml({{"web", "10.96.0.1", 80, {backend(server)}}}));
  const Fd fd = mptcp_socket(AF_INET);
  ASSERT_EQ(connect_errno(fd.get(), "10.96.0.1", 80), 0);
  EXPECT_EQ(read_answer(fd.get()), answered_by("server"));
  EXPECT_FALSE(speaks_mptcp(fd));
}

TEST_F(Mptcp, IsRefusedAsTcpIs) {
  Handle handle = serve(toml({{"empty", "10.96.0.1", 80, {}, "unreachable"}}));
  EXPECT_EQ(connect_errno(mptcp_socket(AF_INET).get(), "10.96.0.1", 80), refusal(EHOSTUNREACH));
  EXPECT_EQ(connect_errno(mptcp_socket(AF_INET).get(), "10.96.0.1", 81), refusal(ECONNREFUSED));
  EXPECT_EQ(handle.visit().at(0).refused, 1u);
}

TEST_F(Mptcp, CountsUntilTheConnectionEnds) {
  const Listener listener(mptcp_socket(AF_INET), "127.0.0.1");
  Handle handle = serve(toml({{"web", "10.96.0.1", 80, {listener.backend()}, "refuse", "policy = \"least_conn\""}}));
  Fd fd = mptcp_socket(AF_INET);
  ASSERT_EQ(connect_errno(fd.get(), "10.96.0.1", 80), 0);
  Fd connection = listener.answer("it");
  EXPECT_EQ(handle.visit().at(0).live, 1u);
  connection.reset();
  EXPECT_EQ(read_answer(fd.get()), answered_by("it"));
  fd.reset();
  EXPECT_TRUE(eventually([&] { return handle.visit().at(0).live == 0; })) << handle.visit().at(0).live;
}

/// The TCP socket below is the kernel's own: it ends without a word.
TEST_F(Mptcp, CountsNowhereWhenItFailsBeforeItsSyn) {
  Handle handle = serve(toml({{"web", "10.96.0.1", 80, {{"10.200.0.1", 80}}, "refuse", "policy = \"least_conn\""}}));
  for (int i = 0; i < 10; ++i) ASSERT_EQ(connect_errno(mptcp_socket(AF_INET).get(), "10.96.0.1", 80), ENETUNREACH);
  EXPECT_EQ(handle.visit().at(0).connects, 10u);
  EXPECT_EQ(handle.visit().at(0).live, 0u);
}

/// The hooks of connect() see the TCP socket below, those of getpeername() the MPTCP socket above it.
TEST_F(Mptcp, PeerIsTheBackend) {
  const Listener listener(mptcp_socket(AF_INET), "127.0.0.1");
  Handle handle = serve(toml({{"web", "10.96.0.1", 80, {listener.backend()}}}));
  const Fd fd = mptcp_socket(AF_INET);
  ASSERT_EQ(connect_errno(fd.get(), "10.96.0.1", 80), 0);
  EXPECT_EQ(peer_of(fd.get()), listener.name());
  EXPECT_EQ(handle.original_destination(fd.get()), "ENOENT");
}

class FastOpen : public Integration {
 protected:
  void SetUp() override {
    Integration::SetUp();
    if (IsSkipped() || HasFatalFailure()) return;
    std::ofstream("/proc/sys/net/ipv4/tcp_fastopen") << "3";  // as a client and as a server
  }

  static Listener listener() {
    Fd fd = tcp_socket();
    const int pending = 16;
    checked(::setsockopt(fd.get(), IPPROTO_TCP, TCP_FASTOPEN, &pending, sizeof pending), "TCP_FASTOPEN");
    return Listener(std::move(fd), "127.0.0.1");
  }

  static ssize_t send_to_vip(const Fd& fd, std::uint16_t port = 80) {
    const sockaddr_in vip = socket_address("10.96.0.1", port);
    return ::sendto(fd.get(), "x", 1, MSG_FASTOPEN | MSG_NOSIGNAL, reinterpret_cast<const sockaddr*>(&vip), sizeof vip);
  }

  static bool sent_data_with_syn(const Fd& fd) {
    tcp_info info{};
    socklen_t length = sizeof info;
    checked(::getsockopt(fd.get(), IPPROTO_TCP, TCP_INFO, &info, &length), "TCP_INFO");
    return (info.tcpi_options & TCPI_OPT_SYN_DATA) != 0;
  }

  static void expect_conversation(const Listener& listener, const Fd& fd) {
    Fd connection = listener.answer("it");
    EXPECT_EQ(receive(connection, 1), "x");
    EXPECT_EQ(receive(fd, 2), "it");
    EXPECT_EQ(peer_of(fd.get()), "10.96.0.1:80");
  }
};

TEST_F(FastOpen, SendtoReachesTheBackend) {
  const Listener server = listener();
  Handle handle = serve(toml({{"web", "10.96.0.1", 80, {server.backend()}}}));
  {
    const Fd first = tcp_socket();  // is given the cookie
    ASSERT_EQ(send_to_vip(first), 1);
    expect_conversation(server, first);
  }
  const Fd second = tcp_socket();
  ASSERT_EQ(send_to_vip(second), 1);
  expect_conversation(server, second);
  EXPECT_TRUE(sent_data_with_syn(second));
  EXPECT_EQ(handle.visit().at(0).connects, 2u);
}

TEST_F(FastOpen, DeferredConnectReachesTheBackend) {
  const Listener server = listener();
  Handle handle = serve(toml({{"web", "10.96.0.1", 80, {server.backend()}}}));
  for (const bool has_cookie : {false, true}) {  // given by the first
    const Fd fd = tcp_socket();
    const int on = 1;
    ASSERT_EQ(::setsockopt(fd.get(), IPPROTO_TCP, TCP_FASTOPEN_CONNECT, &on, sizeof on), 0);
    ASSERT_EQ(connect_errno(fd.get(), "10.96.0.1", 80), 0);
    send_all(fd, "x");
    expect_conversation(server, fd);
    EXPECT_TRUE(!has_cookie || sent_data_with_syn(fd));
  }
  EXPECT_EQ(handle.visit().at(0).connects, 2u) << "the hook runs once for each";
}

TEST_F(FastOpen, SendtoIsRefused) {
  const Handle handle = serve(toml({{"empty", "10.96.0.1", 80, {}, "unreachable"}}));
  EXPECT_EQ(send_to_vip(tcp_socket()), -1);
  EXPECT_EQ(errno, refusal(EHOSTUNREACH));
  EXPECT_EQ(send_to_vip(tcp_socket(), 81), -1);
  EXPECT_EQ(errno, refusal(ECONNREFUSED));
}

class PortZero : public Integration {};

TEST_F(PortZero, UdpConnectTellsTheRoute) {
  const Route route4("10.96.0.0/16"), route6("fd00::/64");
  const NamedUdpServer server("server"), six("six", "::1");
  const std::string udp = "protocol = \"udp\"";
  Handle handle = serve(toml({{"dns", "10.96.0.1", 53, {backend(server)}, "refuse", udp},
                              {"six", "fd00::1", 53, {backend(six)}, "refuse", udp}}));
  const struct {
    int family;
    const char* vip;
  } rows[] = {{AF_INET, "10.96.0.1"}, {AF_INET6, "fd00::1"}, {AF_INET6, "::ffff:10.96.0.1"}};
  for (const auto& [family, vip] : rows) {
    SCOPED_TRACE(vip);
    const Fd fd = udp_socket(family);
    EXPECT_EQ(connect_errno(fd.get(), vip, 0), 0) << "glibc sorts addresses with such connects";
    EXPECT_EQ(connect_errno(fd.get(), vip, 53), 0) << "and the socket can go on to a service";
    EXPECT_EQ(peer_of(fd.get()), (family == AF_INET ? vip + std::string(":53") : "[" + std::string(vip) + "]:53"));
  }
  EXPECT_EQ(handle.visit().at(0).connects, 2u);
}

TEST_F(PortZero, IsNoPortOfAService) {
  const Route route("10.96.0.0/16");
  const NamedServer server("server");
  const Handle handle = serve(toml({{"web", "10.96.0.1", 80, {backend(server)}}}));
  EXPECT_EQ(connect_errno(tcp_socket().get(), "10.96.0.1", 0), refusal(ECONNREFUSED));
  EXPECT_EQ(exchange(udp_socket().get(), "10.96.0.1", 0), "EINVAL") << "what the kernel says of any address";
}

}  // namespace
