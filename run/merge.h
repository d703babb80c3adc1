// SPDX-License-Identifier: BSD-2-Clause
//
// The services of the file and those of a cluster, as one configuration. Pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "cli/pinned.h"
#include "config/config.h"

namespace run {

/// By the name that the cluster has for them, "namespace/name".
using ClusterServices = std::map<std::string, std::vector<config::Service>>;

/// An address, a port and a protocol: of a VIP, or of a backend.
using MergedKey = std::tuple<config::Address, std::uint16_t, config::Protocol>;

struct Merged {
  config::Config config;              // the file's services, then the cluster's
  std::string text;                   // that says the same
  std::vector<std::string> problems;  // what was left out, a line each
  std::size_t left_out = 0;           // services of the cluster that are not served
  bool is_short = false;              // something had no room
  std::set<MergedKey> contested;      // endpoints that kept an external address from being served
};

/// What there is no room for, or what collides, is left out: the file's services are served in any case, those of
/// the cluster that are in `serving` before others. `text` is what `own` was read from.
Merged merge(const config::Config& own, std::string_view text, const ClusterServices& cluster,
             std::span<const config::Service> serving);

/// What of a fast path that an earlier process left is a cluster's.
ClusterServices cluster_services(const std::vector<cli::SeenService>& seen);

/// The form that names of a cluster's services have: "namespace/name:80/tcp".
bool is_cluster_name(std::string_view name);

}  // namespace run
