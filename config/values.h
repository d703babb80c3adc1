// SPDX-License-Identifier: BSD-2-Clause
//
// Values that the TOML holds as strings. Each function returns the value, or else what was expected instead, in words
// that go after "expected"; those for an empty text say what is expected in general.
#pragma once

#include <chrono>
#include <expected>
#include <string>
#include <string_view>

#include "config/config.h"

namespace config {

template <class T>
using Parsed = std::expected<T, std::string>;

struct Endpoint {
  Address address;
  std::uint16_t port = 0;
};

/// Durations are at most a year: far from where any unit overflows.
inline constexpr std::chrono::milliseconds max_duration = std::chrono::hours{24 * 365};

/// A numeric address without a scope ("%eth0").
Parsed<Address> parse_address(std::string_view text);

/// "10.0.0.1:80" or "[2001:db8::1]:80".
Parsed<Endpoint> parse_endpoint(std::string_view text);

/// "10.244.0.0/16". Returned as it is written.
Parsed<std::string> parse_network(std::string_view text);

/// A whole number and a unit: "500ms", "2s", "1m", "3h".
Parsed<std::chrono::milliseconds> parse_duration(std::string_view text);

/// A service's name.
Parsed<std::string> parse_name(std::string_view text);

/// An absolute path of at most `max_length` bytes.
Parsed<std::string> parse_path(std::string_view text, std::size_t max_length);

/// "an integer from 1 to 65535"
std::string integer_range(std::uint64_t min, std::uint64_t max);

/// What is expected instead of `address` where a service or a backend needs a unicast address; empty if it is one.
std::string unicast_fault(const Address& address);

/// The same for a vip.
std::string vip_fault(const Address& address);

/// "10.0.0.1:80", "[2001:db8::1]:80".
std::string to_text(const Address& address, std::uint16_t port);

}  // namespace config
