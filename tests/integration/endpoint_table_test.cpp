// SPDX-License-Identifier: BSD-2-Clause
//
// One table of what an application asks for and what it gets: every kind of socket, every family, every kind of
// destination, each over a real socket.
#include <sys/socket.h>

#include <string>

#include "tests/support/fixture.h"

namespace {

using namespace support;

enum class Way { tcp, udp_connected, udp_unconnected };
using enum Way;

struct Row {
  const char* what;
  Way way;
  int family;  // of the application's socket
  const char* address;
  std::uint16_t port;
  const char* expected;  // "who answered from whom", as getpeername() or recvfrom() says it; or the errno
};

constexpr int v4 = AF_INET;
constexpr int v6 = AF_INET6;

// What there is: services "tcp4", "udp4" at 10.96.0.1:80 and "tcp6", "udp6" at [fd00::1]:80, "tls4" and "tls6" at the
// same VIPs with port 443, TCP only; 10.96.0.2 and fd00::2 are VIPs of services without a backend, of which those with
// port 81 say "unreachable"; and at 127.0.0.77:4000 and [::1]:4000 somebody of whom clusterip knows nothing.
constexpr Row rows[] = {
    {"a service", tcp, v4, "10.96.0.1", 80, "tcp4 from 10.96.0.1:80"},
    {"a service", tcp, v6, "fd00::1", 80, "tcp6 from [fd00::1]:80"},
    {"a service", tcp, v6, "::ffff:10.96.0.1", 80, "tcp4 from [::ffff:10.96.0.1]:80"},
    {"a service", udp_connected, v4, "10.96.0.1", 80, "udp4 from 10.96.0.1:80"},
    {"a service", udp_connected, v6, "fd00::1", 80, "udp6 from [fd00::1]:80"},
    {"a service", udp_connected, v6, "::ffff:10.96.0.1", 80, "udp4 from [::ffff:10.96.0.1]:80"},
    {"a service", udp_unconnected, v4, "10.96.0.1", 80, "udp4 from 10.96.0.1:80"},
    {"a service", udp_unconnected, v6, "fd00::1", 80, "udp6 from [fd00::1]:80"},
    {"a service", udp_unconnected, v6, "::ffff:10.96.0.1", 80, "udp4 from [::ffff:10.96.0.1]:80"},

    {"no VIP", tcp, v4, "127.0.0.77", 4000, "stranger4 from 127.0.0.77:4000"},
    {"no VIP", tcp, v6, "::1", 4000, "stranger6 from [::1]:4000"},
    {"no VIP", tcp, v6, "::ffff:127.0.0.77", 4000, "stranger4 from [::ffff:127.0.0.77]:4000"},
    {"no VIP", udp_connected, v4, "127.0.0.77", 4000, "stranger4 from 127.0.0.77:4000"},
    {"no VIP", udp_connected, v6, "::1", 4000, "stranger6 from [::1]:4000"},
    {"no VIP", udp_connected, v6, "::ffff:127.0.0.77", 4000, "stranger4 from [::ffff:127.0.0.77]:4000"},
    {"no VIP", udp_unconnected, v4, "127.0.0.77", 4000, "stranger4 from 127.0.0.77:4000"},
    {"no VIP", udp_unconnected, v6, "::1", 4000, "stranger6 from [::1]:4000"},
    {"no VIP", udp_unconnected, v6, "::ffff:127.0.0.77", 4000, "stranger4 from [::ffff:127.0.0.77]:4000"},

    {"no backend, refuse", tcp, v4, "10.96.0.2", 80, "ECONNREFUSED"},
    {"no backend, refuse", tcp, v6, "fd00::2", 80, "ECONNREFUSED"},
    {"no backend, refuse", tcp, v6, "::ffff:10.96.0.2", 80, "ECONNREFUSED"},
    {"no backend, refuse", udp_connected, v4, "10.96.0.2", 80, "ECONNREFUSED"},
    {"no backend, refuse", udp_connected, v6, "fd00::2", 80, "ECONNREFUSED"},
    {"no backend, refuse", udp_connected, v6, "::ffff:10.96.0.2", 80, "ECONNREFUSED"},
    {"no backend, refuse", udp_unconnected, v4, "10.96.0.2", 80, "ECONNREFUSED"},
    {"no backend, refuse", udp_unconnected, v6, "fd00::2", 80, "ECONNREFUSED"},
    {"no backend, refuse", udp_unconnected, v6, "::ffff:10.96.0.2", 80, "ECONNREFUSED"},

    {"no backend, unreachable", tcp, v4, "10.96.0.2", 81, "EHOSTUNREACH"},
    {"no backend, unreachable", tcp, v6, "fd00::2", 81, "EHOSTUNREACH"},
    {"no backend, unreachable", tcp, v6, "::ffff:10.96.0.2", 81, "EHOSTUNREACH"},
    {"no backend, unreachable", udp_connected, v4, "10.96.0.2", 81, "EHOSTUNREACH"},
    {"no backend, unreachable", udp_connected, v6, "fd00::2", 81, "EHOSTUNREACH"},
    {"no backend, unreachable", udp_connected, v6, "::ffff:10.96.0.2", 81, "EHOSTUNREACH"},
    {"no backend, unreachable", udp_unconnected, v4, "10.96.0.2", 81, "EHOSTUNREACH"},
    {"no backend, unreachable", udp_unconnected, v6, "fd00::2", 81, "EHOSTUNREACH"},
    {"no backend, unreachable", udp_unconnected, v6, "::ffff:10.96.0.2", 81, "EHOSTUNREACH"},

    {"a port that no service has", tcp, v4, "10.96.0.1", 81, "ECONNREFUSED"},
    {"a port that no service has", tcp, v6, "fd00::1", 81, "ECONNREFUSED"},
    {"a port that no service has", tcp, v6, "::ffff:10.96.0.1", 81, "ECONNREFUSED"},
    {"a port that no service has", udp_connected, v4, "10.96.0.1", 81, "ECONNREFUSED"},
    {"a port that no service has", udp_connected, v6, "fd00::1", 81, "ECONNREFUSED"},
    {"a port that no service has", udp_connected, v6, "::ffff:10.96.0.1", 81, "ECONNREFUSED"},
    {"a port that no service has", udp_unconnected, v4, "10.96.0.1", 81, "ECONNREFUSED"},
    {"a port that no service has", udp_unconnected, v6, "fd00::1", 81, "ECONNREFUSED"},
    {"a port that no service has", udp_unconnected, v6, "::ffff:10.96.0.1", 81, "ECONNREFUSED"},

    {"a port of the other protocol", tcp, v4, "10.96.0.1", 443, "tcp4 from 10.96.0.1:443"},
    {"a port of the other protocol", udp_connected, v4, "10.96.0.1", 443, "ECONNREFUSED"},
    {"a port of the other protocol", udp_connected, v6, "fd00::1", 443, "ECONNREFUSED"},
    {"a port of the other protocol", udp_connected, v6, "::ffff:10.96.0.1", 443, "ECONNREFUSED"},
    {"a port of the other protocol", udp_unconnected, v4, "10.96.0.1", 443, "ECONNREFUSED"},
    {"a port of the other protocol", udp_unconnected, v6, "fd00::1", 443, "ECONNREFUSED"},
    {"a port of the other protocol", udp_unconnected, v6, "::ffff:10.96.0.1", 443, "ECONNREFUSED"},
};

std::string name_of(const Row& row) {
  constexpr const char* ways[] = {"tcp", "udp, connected", "udp, unconnected"};
  return std::string(row.what) + " over " + ways[static_cast<int>(row.way)] + (row.family == v4 ? ", IPv4" : ", IPv6") +
         ": " + row.address + " port " + std::to_string(row.port);
}

std::string ask_as(const Row& row) {
  if (row.way == udp_unconnected) return exchange(udp_socket(row.family).get(), row.address, row.port);
  const Fd fd = row.way == tcp ? tcp_socket(0, row.family) : udp_socket(row.family);
  if (const int error = connect_errno(fd.get(), row.address, row.port); error != 0) return ::strerrorname_np(error);
  const std::string peer = peer_of(fd.get());
  if (row.way == tcp) return read_answer(fd.get()).text + " from " + peer;
  if (::send(fd.get(), "x", 1, 0) != 1) return ::strerrorname_np(errno);
  const std::string answer = receive(fd.get());
  return answer.ends_with(" from " + peer) ? answer : answer + ", but the peer is " + peer;
}

/// As the row says, but for the errno of a refusal where the kernel lets a program choose none.
std::string expected_here(const Row& row) {
  for (const int error : {ECONNREFUSED, EHOSTUNREACH})
    if (row.expected == std::string_view(::strerrorname_np(error))) return ::strerrorname_np(refusal(error));
  return row.expected;
}

class EndpointTable : public Integration {};

TEST_F(EndpointTable, EachRequestHasItsAnswer) {
  const NamedServer tcp4("tcp4"), tcp6("tcp6", "::1");
  const NamedUdpServer udp4("udp4"), udp6("udp6", "::1");
  constexpr auto speaks = NamedServer::Speaks::name;
  const NamedServer stranger4("stranger4", "127.0.0.77", speaks, 4000), stranger6("stranger6", "::1", speaks, 4000);
  const NamedUdpServer stranger4_udp("stranger4", "127.0.0.77", 4000), stranger6_udp("stranger6", "::1", 4000);
  const char* const udp = "protocol = \"udp\"";
  const Handle handle = serve(toml({{"tcp4", "10.96.0.1", 80, {backend(tcp4)}},
                                    {"tcp6", "fd00::1", 80, {backend(tcp6)}},
                                    {"udp4", "10.96.0.1", 80, {backend(udp4)}, "refuse", udp},
                                    {"udp6", "fd00::1", 80, {backend(udp6)}, "refuse", udp},
                                    {"tls4", "10.96.0.1", 443, {backend(tcp4)}},
                                    {"tls6", "fd00::1", 443, {backend(tcp6)}},
                                    {"refuse-tcp4", "10.96.0.2", 80, {}, "refuse"},
                                    {"refuse-tcp6", "fd00::2", 80, {}, "refuse"},
                                    {"refuse-udp4", "10.96.0.2", 80, {}, "refuse", udp},
                                    {"refuse-udp6", "fd00::2", 80, {}, "refuse", udp},
                                    {"unreachable-tcp4", "10.96.0.2", 81, {}, "unreachable"},
                                    {"unreachable-tcp6", "fd00::2", 81, {}, "unreachable"},
                                    {"unreachable-udp4", "10.96.0.2", 81, {}, "unreachable", udp},
                                    {"unreachable-udp6", "fd00::2", 81, {}, "unreachable", udp}}));
  for (const Row& row : rows) {
    SCOPED_TRACE(name_of(row));
    EXPECT_EQ(ask_as(row), expected_here(row));
  }
}

}  // namespace
