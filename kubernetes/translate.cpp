// SPDX-License-Identifier: BSD-2-Clause
#include "kubernetes/translate.h"

#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <map>
#include <set>
#include <string_view>
#include <tuple>
#include <utility>

#include "config/names.h"

namespace kubernetes {
namespace {

// Of one object, beyond what any cluster has; without a bound, a few megabytes of text would become gigabytes.
constexpr std::size_t max_services = 16384;
constexpr std::size_t max_endpoints = 65536;  // of all its addresses and ports; each is kept

/// An endpoint of one port of the service, with the port that the pod has.
struct Candidate {
  const Endpoint* endpoint;
  std::uint16_t port;
};

bool is_last_resort(const Endpoint& endpoint) { return endpoint.is_serving && endpoint.is_terminating; }

/// Where slices have a port of this name and protocol, and under which number.
using Places =
    std::map<std::pair<std::string_view, config::Protocol>, std::vector<std::pair<const Slice*, std::uint16_t>>>;

Places places_of(const Service& service, std::span<const Slice* const> slices) {
  Places places;
  for (const ServicePort& port : service.ports) places.try_emplace({port.name, port.protocol});
  for (const Slice* slice : slices) {
    for (const ServicePort& one : slice->ports)
      if (const auto found = places.find({one.name, one.protocol}); found != places.end())
        found->second.emplace_back(slice, one.port);
  }
  return places;
}

/// A slice has addresses of one.
bool is_of_family(const Slice& slice, bool is_v4) {
  return !slice.endpoints.empty() && slice.endpoints.front().address.is_v4() == is_v4;
}

/// Sorted by address and port, each once: while a controller moves an endpoint it is in two slices. The better one
/// counts.
std::vector<Candidate> candidates(std::span<const std::pair<const Slice*, std::uint16_t>> places, bool is_v4) {
  std::vector<Candidate> found;
  for (const auto& [slice, port] : places) {
    if (!is_of_family(*slice, is_v4)) continue;
    for (const Endpoint& endpoint : slice->endpoints) found.push_back({.endpoint = &endpoint, .port = port});
  }
  const auto order = [](const Candidate& one) {
    const Endpoint& e = *one.endpoint;
    return std::tuple(e.address, one.port, !e.is_ready, !is_last_resort(e), !e.is_local, !e.is_for_node, !e.is_for_zone,
                      e.has_node_hints, e.has_zone_hints);
  };
  std::ranges::sort(found, std::less(), order);
  const auto rest = std::ranges::unique(
      found, std::equal_to(), [](const Candidate& one) { return std::pair(one.endpoint->address, one.port); });
  found.erase(rest.begin(), rest.end());
  return found;
}

enum class Topology : std::uint8_t { any, node, zone };

/// Hints count when each ready endpoint has one, and one of them is for us; the node's go before the zone's.
Topology topology(std::span<const Candidate> all) {
  bool any_ready = false;
  bool have_node_hints = true;
  bool have_zone_hints = true;
  bool any_for_node = false;
  bool any_for_zone = false;
  for (const auto& [endpoint, port] : all) {
    if (!endpoint->is_ready) continue;
    any_ready = true;
    have_node_hints = have_node_hints && endpoint->has_node_hints;
    have_zone_hints = have_zone_hints && endpoint->has_zone_hints;
    any_for_node = any_for_node || endpoint->is_for_node;
    any_for_zone = any_for_zone || endpoint->is_for_zone;
  }
  if (any_ready && have_node_hints && any_for_node) return Topology::node;
  if (any_ready && have_zone_hints && any_for_zone) return Topology::zone;
  return Topology::any;
}

/// Those that are ready, and near enough; without any, those that end but still serve. Whatever else ends drains.
std::vector<config::Backend> backends(std::span<const Candidate> all, bool is_local) {
  const Topology near = is_local ? Topology::any : topology(all);
  const auto is_reachable = [&](const Endpoint& endpoint) { return !is_local || endpoint.is_local; };
  const auto is_chosen = [&](const Endpoint& endpoint) {
    return endpoint.is_ready && is_reachable(endpoint) && (near != Topology::node || endpoint.is_for_node) &&
           (near != Topology::zone || endpoint.is_for_zone);
  };
  const bool any = std::ranges::any_of(all, [&](const Candidate& one) { return is_chosen(*one.endpoint); });
  std::vector<config::Backend> result;
  result.reserve(all.size());
  for (const auto& [endpoint, port] : all) {
    const bool is_active = any ? is_chosen(*endpoint) : is_reachable(*endpoint) && is_last_resort(*endpoint);
    const bool is_draining = endpoint->is_terminating && is_reachable(*endpoint);
    if (!is_active && !is_draining) continue;
    result.push_back({.address = endpoint->address,
                      .port = port,
                      .weight = 1,
                      .state = is_active ? config::BackendState::active : config::BackendState::drain,
                      .position = {}});
  }
  return result;
}

class Translator {
 public:
  Translator(const Service& service, std::span<const Slice* const> slices)
      : service_(service), places_(places_of(service, slices)) {}

  /// What is sent to an external address from here is for any endpoint, as kube-proxy has it: externalTrafficPolicy is
  /// about what comes from outside.
  void add(const config::Address& vip, const std::string& suffix, bool is_local) {
    for (const ServicePort& port : service_.ports) {
      if (is_full_) return;
      std::string name = fmt::format("{}:{}/{}{}", service_.name, port.port,
                                     config::name_of(config::protocol_names, port.protocol), suffix);
      if (name.size() > config::max_name_length) {
        if (!std::exchange(has_told_of_names_, true))
          result_.problems.push_back(
              fmt::format("service {}: expected a name of at most {} characters, got {}: skipped", service_.name,
                          config::max_name_length, name));
        continue;
      }
      const auto& places = places_.at({port.name, port.protocol});
      for (const auto& [slice, number] : places)
        if (is_of_family(*slice, vip.is_v4())) endpoints_ += slice->endpoints.size();
      const bool is_first = result_.services.empty();  // which has a bound of its own, and is served as far as that
      if (result_.services.size() == max_services || (endpoints_ > max_endpoints && !is_first)) {
        is_full_ = true;
        result_.problems.push_back(fmt::format(
            "service {}: expected at most {} addresses times ports, and {} endpoints of them all: {} and the "
            "rest of them are skipped",
            service_.name, max_services, max_endpoints, name));
        return;
      }
      config::Service& added = result_.services.emplace_back();
      added.name = std::move(name);
      added.vip = vip;
      added.port = port.port;
      added.protocol = port.protocol;
      added.affinity = service_.affinity;
      added.client = config::Client::netns;  // a pod's address is its network namespace's
      added.backends = backends(candidates(places, vip.is_v4()), is_local);
      if (added.backends.size() > config::max_backends_per_service) {
        result_.problems.push_back(fmt::format("service {}: expected at most {} endpoints, got {}: the rest is skipped",
                                               added.name, config::max_backends_per_service, added.backends.size()));
        added.backends.resize(config::max_backends_per_service);
      }
    }
  }

  Translation take() { return std::move(result_); }

 private:
  const Service& service_;
  const Places places_;
  Translation result_;
  std::size_t endpoints_ = 0;  // that were looked at
  bool is_full_ = false;
  bool has_told_of_names_ = false;
};

}  // namespace

Translation translate(const Service& service, std::span<const Slice* const> slices) {
  Translator translator(service, slices);
  for (const config::Address& vip : service.cluster_ips) {
    const bool is_first = &vip == &service.cluster_ips.front();
    translator.add(vip, is_first ? "" : vip.is_v4() ? "@ipv4" : "@ipv6", service.is_local);
  }
  std::set<config::Address> seen(service.cluster_ips.begin(), service.cluster_ips.end());
  for (const auto* external : {&service.external_ips, &service.load_balancer_ips}) {
    for (const config::Address& vip : *external)
      if (seen.insert(vip).second) translator.add(vip, "@" + vip.to_string(), false);
  }
  return translator.take();
}

}  // namespace kubernetes
