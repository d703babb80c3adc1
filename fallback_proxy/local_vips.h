// SPDX-License-Identifier: BSD-2-Clause
//
// VIPs as addresses of this host: one route each, `local VIP dev lo table local proto 96 src 127.0.0.1` (or ::1).
// Sockets can then be bound to the VIP, and the kernel delivers to it.
//
// A route, not an address: it is announced to nobody, changes no choice of source addresses, and carries a protocol
// number by which ours are told from everybody else's, in particular after a crash. One for each VIP, since a route for
// a range would take VIPs that nobody serves. And with a preferred source: a client would otherwise speak to the VIP
// from the VIP, and where nobody listens, from among its own ephemeral ports it can connect to itself (a simultaneous
// open).
//
// Needs CAP_NET_ADMIN in the network namespace's user namespace, and uses the network namespace of the thread that
// opened it.
#pragma once

#include <linux/rtnetlink.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "config/config.h"
#include "config/fd.h"
#include "config/result.h"

struct mnl_socket;

namespace userspace {

/// The protocol of our routes (rtm_protocol in rtnetlink(7)). Neither in rt_protos of iproute2 nor among those of FRR
/// (186 to 196); `ip route show table local proto 96` shows ours.
inline constexpr std::uint8_t route_protocol = 96;

/// Whether a route, as rtnetlink tells of it, is in table local. A kernel without CONFIG_IPV6_MULTIPLE_TABLES has one
/// table for all of IPv6, and calls it main (RT6_TABLE_LOCAL in include/net/ip6_fib.h).
bool is_in_table_local(const rtmsg& route);

struct VipFailure {
  config::Address vip;
  std::string reason;
};

class LocalVips {
 public:
  /// -EBUSY: another process of this network namespace has one, and would take our routes for stale ones of its own. To
  /// hand over, destroy it: the routes stay. The process counts when it is root's or this user's own.
  static config::Result<LocalVips> open();
  /// Who was passed over, in words for the log; empty as a rule.
  const std::string& warning() const { return warning_; }

  /// Makes `wanted` local, then removes every other route of ours but for those of `kept`, which are not added: with
  /// neither, all. A VIP that this host has anyway, as the address of a device, is left as it is.
  ///
  /// Returns the VIPs for which that cannot be, each with its reason, for example since another owner has a route for
  /// them; that one is left alone. The others are served. -EPERM, CAP_NET_ADMIN is missing: the message has the VIPs
  /// that are not local for want of it; those that were stay so. Another error: anything may be done or not, and a
  /// later call sets it right.
  ///
  /// Connections to a VIP that ceases to be local freeze: close its listeners, and let its connections end, before.
  /// Takes about 10 us for each change, and 1 us for each VIP.
  config::Result<std::vector<VipFailure>> reconcile(std::span<const config::Address> wanted,
                                                    std::span<const config::Address> kept = {});
  /// How many routes the last reconcile() has added.
  std::size_t added() const { return added_; }

 private:
  /// A route of table local.
  struct Route {
    config::Address destination;
    std::uint8_t length = 0;
    std::uint8_t type = 0;
    std::uint8_t protocol = 0;

    /// The kernel's own, for the address of a device.
    bool is_address() const;
  };
  /// What the kernel answered to one of many requests.
  struct Refusal {
    std::size_t index = 0;
    int error = 0;  // the positive errno
    std::string reason;
  };
  struct Close {
    void operator()(mnl_socket* socket) const;
  };

  LocalVips(config::Fd lock, mnl_socket* socket);

  config::Result<std::vector<VipFailure>> try_reconcile(std::span<const config::Address> wanted,
                                                        std::span<const config::Address> kept);
  config::Result<std::vector<Route>> routes();
  config::Result<void> read_routes(std::uint8_t family, std::vector<Route>& routes);
  config::Result<bool> try_read_routes(std::uint8_t family, std::vector<Route>& routes);
  config::Result<std::vector<Refusal>> change(std::uint16_t type, std::span<const config::Address> vips);
  config::Result<std::size_t> receive();

  config::Fd lock_;
  std::string warning_;
  std::unique_ptr<mnl_socket, Close> socket_;
  std::size_t added_ = 0;
  std::uint32_t sequence_ = 0;
  std::size_t batch_ = 128;  // requests in one system call; all answers to them wait in the receive buffer
  std::vector<char> buffer_;
};

}  // namespace userspace
