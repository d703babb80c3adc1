// SPDX-License-Identifier: BSD-2-Clause
//
// The PROXY header of any client and VIP, read back by a strict reader of its own.
#include <fmt/format.h>

#include <boost/asio/ip/address.hpp>
#include <cstring>
#include <string>

#include "fallback_proxy/proxy_header.h"
#include "tests/fuzz/require.h"

namespace {

using userspace::SocketAddress;

struct Input {
  unsigned char is_v6;
  unsigned char client[16];
  unsigned char vip[16];
  std::uint16_t client_port;
  std::uint16_t vip_port;
};

boost::asio::ip::address address(bool is_v6, const unsigned char (&bytes)[16]) {
  if (is_v6) {
    boost::asio::ip::address_v6::bytes_type v6;
    std::memcpy(v6.data(), bytes, v6.size());
    return boost::asio::ip::address_v6(v6);
  }
  boost::asio::ip::address_v4::bytes_type v4;
  std::memcpy(v4.data(), bytes, v4.size());
  return boost::asio::ip::address_v4(v4);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  Input input{};
  std::memcpy(&input, data, std::min(size, sizeof input));
  const bool is_v6 = (input.is_v6 & 1) != 0;
  const auto client = address(is_v6, input.client);
  const auto vip = address(is_v6, input.vip);
  const SocketAddress from(client, input.client_port);
  const SocketAddress to(vip, input.vip_port);

  const std::string v1 = userspace::proxy_header(config::ProxyProtocol::v1, from, to);
  require(v1.size() <= 107 && v1.ends_with("\r\n") && v1.find('\r') == v1.size() - 2);
  char family[8];
  char from_text[64];
  char to_text[64];
  unsigned from_port = 0;
  unsigned to_port = 0;
  require(std::sscanf(v1.c_str(), "PROXY %7s %63s %63s %5u %5u\r\n", family, from_text, to_text, &from_port,
                      &to_port) == 5);
  require(family == std::string(is_v6 ? "TCP6" : "TCP4"));
  require(boost::asio::ip::make_address(from_text) == client && boost::asio::ip::make_address(to_text) == vip);
  require(from_port == input.client_port && to_port == input.vip_port);

  const std::string v2 = userspace::proxy_header(config::ProxyProtocol::v2, from, to);
  const std::size_t length = is_v6 ? 16 : 4;
  require(v2.size() == 16 + 2 * length + 4);
  require(v2.starts_with(std::string("\r\n\r\n\0\r\nQUIT\n\x21", 13)));
  require(v2[13] == (is_v6 ? '\x21' : '\x11') && v2[14] == 0 && static_cast<std::size_t>(v2[15]) == v2.size() - 16);
  require(std::memcmp(v2.data() + 16, input.client, length) == 0);
  require(std::memcmp(v2.data() + 16 + length, input.vip, length) == 0);
  const auto port = [&](std::size_t at) {
    return static_cast<unsigned char>(v2[at]) << 8 | static_cast<unsigned char>(v2[at + 1]);
  };
  require(port(16 + 2 * length) == input.client_port && port(18 + 2 * length) == input.vip_port);
  return 0;
}
