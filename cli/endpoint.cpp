// SPDX-License-Identifier: BSD-2-Clause
#include "cli/endpoint.h"

#include <arpa/inet.h>
#include <fmt/format.h>
#include <netinet/in.h>

#include <array>
#include <charconv>
#include <cstring>

namespace cli {

namespace {

std::optional<std::uint16_t> parse_port(std::string_view text) {
  std::uint16_t port = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), port);
  if (error != std::errc{} || end != text.data() + text.size() || port == 0) return std::nullopt;
  return port;
}

template <class SocketAddress>
void store(Endpoint& endpoint, const SocketAddress& socket_address) {
  std::memcpy(&endpoint.socket_address, &socket_address, sizeof socket_address);
  endpoint.length = sizeof socket_address;
}

}  // namespace

std::optional<Endpoint> parse_endpoint(std::string_view text) {
  Endpoint endpoint;
  endpoint.protocol = IPPROTO_TCP;
  if (const auto slash = text.find('/'); slash != std::string_view::npos) {
    const std::string_view protocol = text.substr(slash + 1);
    if (protocol != "tcp" && protocol != "udp") return std::nullopt;
    if (protocol == "udp") endpoint.protocol = IPPROTO_UDP;
    text = text.substr(0, slash);
  }

  const auto colon = text.rfind(':');
  if (colon == std::string_view::npos) return std::nullopt;
  const auto port = parse_port(text.substr(colon + 1));
  if (!port) return std::nullopt;
  endpoint.port = *port;

  std::string address(text.substr(0, colon));
  if (address.size() > 2 && address.starts_with('[') && address.ends_with(']')) {
    address = address.substr(1, address.size() - 2);
    sockaddr_in6 v6{};
    v6.sin6_family = AF_INET6;
    v6.sin6_port = htons(*port);
    if (inet_pton(AF_INET6, address.c_str(), &v6.sin6_addr) != 1) return std::nullopt;
    if (IN6_IS_ADDR_V4MAPPED(&v6.sin6_addr)) {
      sockaddr_in v4{};
      v4.sin_family = AF_INET;
      v4.sin_port = v6.sin6_port;
      std::memcpy(&v4.sin_addr, v6.sin6_addr.s6_addr + 12, sizeof v4.sin_addr);
      store(endpoint, v4);
    } else {
      store(endpoint, v6);
    }
  } else {
    sockaddr_in v4{};
    v4.sin_family = AF_INET;
    v4.sin_port = htons(*port);
    if (inet_pton(AF_INET, address.c_str(), &v4.sin_addr) != 1) return std::nullopt;
    store(endpoint, v4);
  }
  endpoint.address = numeric(endpoint.socket_address).address;
  return endpoint;
}

std::string address_and_port(std::string_view address, std::uint16_t port) {
  return address.contains(':') ? fmt::format("[{}]:{}", address, port) : fmt::format("{}:{}", address, port);
}

AddressAndPort numeric(const sockaddr_storage& socket_address) {
  std::array<char, INET6_ADDRSTRLEN> text{};
  if (socket_address.ss_family == AF_INET) {
    sockaddr_in v4{};
    std::memcpy(&v4, &socket_address, sizeof v4);
    inet_ntop(AF_INET, &v4.sin_addr, text.data(), text.size());
    return {.address = text.data(), .port = ntohs(v4.sin_port)};
  }
  if (socket_address.ss_family == AF_INET6) {
    sockaddr_in6 v6{};
    std::memcpy(&v6, &socket_address, sizeof v6);
    inet_ntop(AF_INET6, &v6.sin6_addr, text.data(), text.size());
    return {.address = text.data(), .port = ntohs(v6.sin6_port)};
  }
  return {};
}

std::string protocol_name(int protocol) {
  switch (protocol) {
    case IPPROTO_TCP:
      return "tcp";
    case IPPROTO_UDP:
      return "udp";
    default:
      return fmt::format("{}", protocol);
  }
}

}  // namespace cli
