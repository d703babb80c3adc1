// SPDX-License-Identifier: BSD-2-Clause
//
// One table over protocols, families and what is asked for: what an application in the cgroup sees, on every kind of
// socket.
#include <sys/socket.h>

#include <string>
#include <tuple>

#include "tests/support/fixture.h"

namespace {

using namespace support;

enum class Way { tcp, udp_connected, udp_unconnected };

struct Family {
  int socket;            // the family of the application's socket
  const char* prefix;    // put before the VIP when it is asked for
  const char* vip;       // of the service with backends
  const char* empty;     // of the service without
  const char* stranger;  // no VIP
  const char* backend;
};

constexpr Family v4{AF_INET, "", "10.96.0.1", "10.96.0.2", "127.0.0.77", "127.0.0.1"};
constexpr Family v6{AF_INET6, "", "fd00::1", "fd00::2", "::1", "::1"};
constexpr Family mapped{AF_INET6, "::ffff:", "10.96.0.1", "10.96.0.2", "127.0.0.77", "127.0.0.1"};

constexpr std::uint16_t port = 80;
constexpr std::uint16_t foreign_port = 81;

class EachFamily : public Integration, public testing::WithParamInterface<std::tuple<Way, Family>> {
 protected:
  static std::string toml_of(const NamedServer& tcp, const NamedUdpServer& udp, const Family& family) {
    return toml({{"tcp", family.vip, port, {backend(tcp)}},
                 {"udp", family.vip, port, {backend(udp)}, "refuse", "protocol = \"udp\""},
                 {"tcp-empty", family.empty, port, {}},
                 {"udp-empty", family.empty, port, {}, "unreachable", "protocol = \"udp\""}});
  }

  /// "answer from address:port", or the name of the errno.
  static std::string ask_there(const std::string& address, std::uint16_t to) {
    const auto& [way, family] = GetParam();
    if (way == Way::udp_unconnected) {
      const Fd fd = udp_socket(family.socket);
      return exchange(fd.get(), address, to);
    }
    const Fd fd = way == Way::tcp ? tcp_socket(0, family.socket) : udp_socket(family.socket);
    if (const int error = connect_errno(fd.get(), address, to); error != 0) return ::strerrorname_np(error);
    if (way == Way::udp_connected) {
      if (::send(fd.get(), "x", 1, 0) != 1) return ::strerrorname_np(errno);
      return receive(fd.get());
    }
    return read_answer(fd.get()).text + " from " + peer_of(fd.get());
  }

  static std::string text(const std::string& address, std::uint16_t to) {
    return address.find(':') == std::string::npos ? address + ":" + std::to_string(to)
                                                  : "[" + address + "]:" + std::to_string(to);
  }
};

TEST_P(EachFamily, SeesTheVip) {
  const auto& [way, family] = GetParam();
  const NamedServer tcp("tcp", family.backend);
  const NamedUdpServer udp("udp", family.backend);
  const Handle handle = serve(toml_of(tcp, udp, family));
  const std::string vip = std::string(family.prefix) + family.vip;
  const std::string name = way == Way::tcp ? "tcp" : "udp";
  EXPECT_EQ(ask_there(vip, port), name + " from " + text(vip, port));
}

TEST_P(EachFamily, IsRefusedWithoutBackend) {
  const auto& [way, family] = GetParam();
  const NamedServer tcp("tcp", family.backend);
  const NamedUdpServer udp("udp", family.backend);
  const Handle handle = serve(toml_of(tcp, udp, family));
  EXPECT_EQ(ask_there(std::string(family.prefix) + family.empty, port),
            way == Way::tcp ? "ECONNREFUSED" : "EHOSTUNREACH");
}

TEST_P(EachFamily, IsRefusedAtAPortThatNoServiceHas) {
  const Family& family = std::get<Family>(GetParam());
  const NamedServer tcp("tcp", family.backend);
  const NamedUdpServer udp("udp", family.backend);
  const Handle handle = serve(toml_of(tcp, udp, family));
  EXPECT_EQ(ask_there(std::string(family.prefix) + family.vip, foreign_port), "ECONNREFUSED");
}

TEST_P(EachFamily, ReachesOthersUntouched) {
  const auto& [way, family] = GetParam();
  const NamedServer tcp("tcp", family.backend);
  const NamedUdpServer udp("udp", family.backend);
  const NamedServer other_tcp("other", family.stranger);
  const NamedUdpServer other_udp("other", family.stranger);
  const Handle handle = serve(toml_of(tcp, udp, family));
  const std::string address = std::string(family.prefix) + family.stranger;
  const std::uint16_t to = way == Way::tcp ? other_tcp.port() : other_udp.port();
  EXPECT_EQ(ask_there(address, to), "other from " + text(address, to));
}

std::string name_of(const testing::TestParamInfo<std::tuple<Way, Family>>& param) {
  constexpr const char* ways[] = {"Tcp", "UdpConnected", "UdpUnconnected"};
  const auto& [way, family] = param.param;
  const char* const name = family.socket == AF_INET ? "V4" : family.prefix[0] == '\0' ? "V6" : "Mapped";
  return std::string(ways[static_cast<int>(way)]) + name;
}

INSTANTIATE_TEST_SUITE_P(Connect, EachFamily,
                         testing::Combine(testing::Values(Way::tcp, Way::udp_connected, Way::udp_unconnected),
                                          testing::Values(v4, v6, mapped)),
                         name_of);

}  // namespace
