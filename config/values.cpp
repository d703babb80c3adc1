// SPDX-License-Identifier: BSD-2-Clause
#include "config/values.h"

#include <fmt/format.h>

#include <algorithm>
#include <boost/asio/ip/address_v4.hpp>
#include <boost/asio/ip/address_v6.hpp>
#include <charconv>
#include <limits>
#include <optional>

namespace config {
namespace {

using boost::asio::ip::address_v4;

std::unexpected<std::string> expected(std::string what) { return std::unexpected(std::move(what)); }

// Digits only, no sign and no leading zero: "010" means 8 to some readers and 10 to others.
template <class T>
std::optional<T> parse_digits(std::string_view text) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  const bool whole = error == std::errc{} && end == text.data() + text.size();
  if (!whole || text.front() == '-' || (text.front() == '0' && text.size() > 1)) return std::nullopt;
  return value;
}

}  // namespace

Parsed<Address> parse_address(std::string_view text) {
  // Only these characters reach the system's parser, which would stop at a NUL and look up a scope's interface.
  const bool plain = text.find_first_not_of("0123456789abcdefABCDEF.:") == std::string_view::npos;
  if (text.find('%') != std::string_view::npos) return expected("an address without a scope");
  boost::system::error_code error;
  Address address = plain ? boost::asio::ip::make_address(text, error) : Address{};
  if (!plain || error || text.empty()) return expected("a numeric IPv4 or IPv6 address");
  return address;
}

Parsed<Endpoint> parse_endpoint(std::string_view text) {
  const auto general = "an address and a port such as \"10.0.0.1:80\" or \"[2001:db8::1]:80\"";
  const std::size_t colon = text.rfind(':');
  if (colon == std::string_view::npos) return expected(general);
  std::string_view host = text.substr(0, colon);
  const bool brackets = host.starts_with('[') && host.ends_with(']');
  if (brackets) host = host.substr(1, host.size() - 2);
  // Without brackets nobody can tell where an IPv6 address ends and the port begins.
  if (brackets != (host.find(':') != std::string_view::npos)) return expected(general);
  auto address = parse_address(host);
  if (!address) return expected(host.empty() ? general : std::move(address).error());
  const auto port = parse_digits<std::uint16_t>(text.substr(colon + 1));
  if (!port || *port == 0) return expected("a port from 1 to 65535 behind the colon");
  return Endpoint{*address, *port};
}

Parsed<std::string> parse_network(std::string_view text) {
  const auto general = "a network such as \"10.244.0.0/16\"";
  const std::size_t slash = text.find('/');
  if (slash == std::string_view::npos) return expected(general);
  auto address = parse_address(text.substr(0, slash));
  if (!address) return expected(general);
  const unsigned bits = address->is_v4() ? 32 : 128;
  const auto length = parse_digits<unsigned>(text.substr(slash + 1));
  if (!length || *length > bits) return expected(fmt::format("a prefix length from 0 to {} behind the slash", bits));
  return std::string(text);
}

Parsed<std::chrono::milliseconds> parse_duration(std::string_view text) {
  struct Unit {
    std::string_view name;
    std::chrono::milliseconds length;
  };
  using namespace std::chrono_literals;
  static constexpr Unit units[] = {{"ms", 1ms}, {"s", 1s}, {"m", 1min}, {"h", 1h}};
  const std::size_t digits = std::min(text.find_first_not_of("0123456789"), text.size());
  const auto unit = std::ranges::find(units, text.substr(digits), &Unit::name);
  if (digits == 0 || unit == std::end(units)) return expected("a duration such as \"500ms\", \"2s\", \"1m\" or \"3h\"");
  std::uint64_t number = 0;
  const auto parsed = std::from_chars(text.data(), text.data() + digits, number);
  if (parsed.ec != std::errc{} || number > static_cast<std::uint64_t>(max_duration / unit->length))
    return expected("a duration of at most a year, \"8760h\"");
  return static_cast<std::int64_t>(number) * unit->length;
}

Parsed<std::string> parse_name(std::string_view text) {
  static constexpr std::string_view allowed = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._:/@-";
  if (text.empty() || text.size() > max_name_length)
    return expected(fmt::format("a name of 1 to {} characters", max_name_length));
  if (text.find_first_not_of(allowed) != std::string_view::npos)
    return expected("a name of letters, digits and . _ : / @ -");
  return std::string(text);
}

Parsed<std::string> parse_path(std::string_view text, std::size_t max_length) {
  if (!text.starts_with('/')) return expected("an absolute path");
  if (text.size() > max_length) return expected(fmt::format("a path of at most {} bytes", max_length));
  if (std::ranges::any_of(text, [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7f; }))
    return expected("a path without control characters");
  return std::string(text);
}

std::string integer_range(std::uint64_t min, std::uint64_t max) {
  return fmt::format("an integer from {} to {}", min, max);
}

std::string unicast_fault(const Address& address) {
  if (address.is_unspecified()) return "a unicast address, not the unspecified one";
  if (address.is_multicast()) return "a unicast address, not a multicast one";
  if (address.is_v4() && address.to_v4() == address_v4::broadcast()) return "a unicast address, not the broadcast one";
  if (!address.is_v6()) return "";
  if (address.to_v6().is_link_local() || address.to_v6().scope_id() != 0)
    return "an address that needs no scope, not a link-local one";
  if (address.to_v6().is_v4_mapped()) {
    const auto inner = boost::asio::ip::make_address_v4(boost::asio::ip::v4_mapped, address.to_v6());
    return fmt::format("the IPv4 address itself, \"{}\"", inner.to_string());
  }
  return "";
}

std::string vip_fault(const Address& address) {
  if (address.is_v4() && address.to_v4().to_uint() == reserved_vip)
    return "another address, as this one is reserved for the canary";
  return unicast_fault(address);
}

std::string to_text(const Address& address, std::uint16_t port) {
  return fmt::format(fmt::runtime(address.is_v6() ? "[{}]:{}" : "{}:{}"), address.to_string(), port);
}

}  // namespace config
