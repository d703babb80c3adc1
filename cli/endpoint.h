// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <sys/socket.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace cli {

/// What an application would connect to.
struct Endpoint {
  sockaddr_storage socket_address{};
  socklen_t length = 0;
  std::string address;  // as inet_ntop writes it
  std::uint16_t port = 0;
  int protocol = 0;  // IPPROTO_TCP or IPPROTO_UDP
};

/// "ADDRESS:PORT", "ADDRESS:PORT/tcp", "ADDRESS:PORT/udp"; an IPv6 address stands in brackets. Nothing: it is none of
/// them.
std::optional<Endpoint> parse_endpoint(std::string_view text);

/// "10.0.0.1:80", "[2001:db8::1]:80".
std::string address_and_port(std::string_view address, std::uint16_t port);

/// The numeric address of a sockaddr_in or sockaddr_in6, and its port; an empty address for another family.
struct AddressAndPort {
  std::string address;
  std::uint16_t port = 0;
};
AddressAndPort numeric(const sockaddr_storage& socket_address);

/// "tcp", "udp"; a number for what is neither.
std::string protocol_name(int protocol);

}  // namespace cli
