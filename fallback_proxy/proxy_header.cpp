// SPDX-License-Identifier: BSD-2-Clause
#include "fallback_proxy/proxy_header.h"

#include <fmt/format.h>

#include <cstring>
#include <string_view>

namespace userspace {
namespace {

std::string version_1(const SocketAddress& client, const SocketAddress& vip) {
  return fmt::format("PROXY {} {} {} {} {}\r\n", client.address().is_v4() ? "TCP4" : "TCP6",
                     client.address().to_string(), vip.address().to_string(), client.port(), vip.port());
}

void append_address(std::string& header, const config::Address& address) {
  const auto append = [&](const auto& bytes) { header.append(bytes.begin(), bytes.end()); };
  if (address.is_v4())
    append(address.to_v4().to_bytes());
  else
    append(address.to_v6().to_bytes());
}

void append_number(std::string& header, std::uint16_t number) {
  header.push_back(static_cast<char>(number >> 8));
  header.push_back(static_cast<char>(number & 0xff));
}

std::string version_2(const SocketAddress& client, const SocketAddress& vip) {
  constexpr std::string_view signature("\r\n\r\n\0\r\nQUIT\n", 12);
  constexpr char version_and_command = 0x21;  // 2, PROXY
  constexpr char tcp_over_ipv4 = 0x11;
  constexpr char tcp_over_ipv6 = 0x21;
  const bool is_v4 = client.address().is_v4();
  std::string header(signature);
  header.push_back(version_and_command);
  header.push_back(is_v4 ? tcp_over_ipv4 : tcp_over_ipv6);
  append_number(header, is_v4 ? 2 * 4 + 2 * 2 : 2 * 16 + 2 * 2);
  append_address(header, client.address());
  append_address(header, vip.address());
  append_number(header, client.port());
  append_number(header, vip.port());
  return header;
}

}  // namespace

std::string proxy_header(config::ProxyProtocol version, const SocketAddress& client, const SocketAddress& vip) {
  return version == config::ProxyProtocol::v1 ? version_1(client, vip) : version_2(client, vip);
}

}  // namespace userspace
