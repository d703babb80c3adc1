// SPDX-License-Identifier: BSD-2-Clause
//
// The rules that kube-proxy writes in its two modes, for a cluster whose pods are in 10.0.0.0/8: so the client counts
// as a pod, and its connections are not masqueraded, which is the cheapest case. Without node ports, affinity and IPv6.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace bench {

struct Task;

namespace kube_proxy {

struct Mode {
  std::string program;
  std::string whole;              // option before a file that replaces all
  std::vector<std::string> part;  // options before one that does not
  /// For so many services.
  std::string (*all)(const Task& task);
  /// Backend `before` of `service`, its only one, leaves, and `after` comes.
  std::string (*change)(const Task& task, std::uint32_t service, std::uint32_t before, std::uint32_t after);
};

/// A verdict map from (address, protocol, port) to the chain of the service, which draws the chain of the endpoint from
/// another one.
extern const Mode nftables;

/// A list of all services, for each of which a chain draws the chain of the endpoint by one `statistic` rule after the
/// other. Written by Debian's iptables-restore, which keeps them in nftables.
extern const Mode iptables;

}  // namespace kube_proxy
}  // namespace bench
