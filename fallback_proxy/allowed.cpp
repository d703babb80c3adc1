// SPDX-License-Identifier: BSD-2-Clause
#include "fallback_proxy/allowed.h"

#include <ifaddrs.h>
#include <netinet/in.h>

#include <algorithm>
#include <boost/asio/ip/address.hpp>
#include <cstring>

namespace userspace {
namespace {

namespace ip = boost::asio::ip;

template <class Network, class Address>
bool has(const Network& network, const Address& address) {
  return Network(address, network.prefix_length()).network() == network.network();
}

// Addresses compare by their bytes; a scope ("%eth0") is none of them.
std::string key(const config::Address& address) {
  if (address.is_v4()) {
    const auto bytes = address.to_v4().to_bytes();
    return {bytes.begin(), bytes.end()};
  }
  const auto bytes = address.to_v6().to_bytes();
  return {bytes.begin(), bytes.end()};
}

}  // namespace

Allowed::Allowed(std::span<const std::string> networks, std::span<const config::Address> own) {
  for (const std::string& network : networks) {
    boost::system::error_code error;  // the configuration has checked them
    if (network.find(':') == std::string::npos)
      networks_v4_.push_back(ip::make_network_v4(network, error));
    else
      networks_v6_.push_back(ip::make_network_v6(network, error));
  }
  for (const config::Address& address : own) own_.insert(key(address));
}

bool Allowed::is_own(const SocketAddress& client) const {
  const config::Address address = client.address();
  return address.is_loopback() || own_.contains(key(address));
}

bool Allowed::contains(const SocketAddress& client) const {
  if (is_own(client)) return true;
  const config::Address address = client.address();
  if (address.is_v4())
    return std::ranges::any_of(networks_v4_, [&](const auto& network) { return has(network, address.to_v4()); });
  return std::ranges::any_of(networks_v6_, [&](const auto& network) { return has(network, address.to_v6()); });
}

std::vector<config::Address> own_addresses() {
  ifaddrs* list = nullptr;
  std::vector<config::Address> addresses;
  if (::getifaddrs(&list) != 0) return addresses;
  for (const ifaddrs* one = list; one != nullptr; one = one->ifa_next) {
    if (one->ifa_addr == nullptr) continue;
    SocketAddress address;
    if (one->ifa_addr->sa_family == AF_INET)
      address.length = sizeof(sockaddr_in);
    else if (one->ifa_addr->sa_family == AF_INET6)
      address.length = sizeof(sockaddr_in6);
    else
      continue;
    std::memcpy(&address.storage, one->ifa_addr, address.length);
    addresses.push_back(address.address());
  }
  ::freeifaddrs(list);
  return addresses;
}

}  // namespace userspace
