// SPDX-License-Identifier: BSD-2-Clause
//
// Whom the proxy serves: this host, and the networks of `allow_from`. A VIP that is a local address can be reached by
// whoever can send packets to this host; without this check it would be open to them.
#pragma once

#include <boost/asio/ip/network_v4.hpp>
#include <boost/asio/ip/network_v6.hpp>
#include <boost/unordered/unordered_flat_set.hpp>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "config/config.h"
#include "fallback_proxy/backend.h"

namespace userspace {

class Allowed {
 public:
  /// `networks` as in the configuration; `own` are this host's addresses, besides the loopback networks.
  Allowed(std::span<const std::string> networks, std::span<const config::Address> own);

  bool contains(const SocketAddress& client) const;
  /// An address of this host.
  bool is_own(const SocketAddress& client) const;

 private:
  std::vector<boost::asio::ip::network_v4> networks_v4_;
  std::vector<boost::asio::ip::network_v6> networks_v6_;
  boost::unordered_flat_set<std::string> own_;
};

using AllowedPointer = std::shared_ptr<const Allowed>;

/// The addresses of this network namespace's devices. Empty when the kernel does not tell.
std::vector<config::Address> own_addresses();

}  // namespace userspace
