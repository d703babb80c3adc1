// SPDX-License-Identifier: BSD-2-Clause
#include "run/merge.h"

#include <fmt/format.h>
#include <netinet/in.h>

#include <algorithm>
#include <boost/asio/ip/address.hpp>
#include <chrono>
#include <iterator>
#include <set>
#include <tuple>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "config/names.h"
#include "config/printable.h"
#include "config/values.h"

namespace run {
namespace {

using Key = MergedKey;

Key key_of(const config::Service& service) { return {service.vip, service.port, service.protocol}; }

/// With all that a service of a cluster says; the rest are defaults.
void append(std::string& text, const config::Service& service) {
  auto out = std::back_inserter(text);
  fmt::format_to(out, "[[service]]\nname = \"{}\"\nvip = \"{}\"\nport = {}\nprotocol = \"{}\"\nclient = \"{}\"\n",
                 service.name, service.vip.to_string(), service.port,
                 config::name_of(config::protocol_names, service.protocol),
                 config::name_of(config::client_names, service.client));
  if (service.affinity) fmt::format_to(out, "affinity = \"{}ms\"\n", service.affinity->count());
  text += "backends = [";
  for (const config::Backend& backend : service.backends) {
    if (backend.state == config::BackendState::drain)
      fmt::format_to(out, "{{address = \"{}\", port = {}, state = \"drain\"}},", backend.address.to_string(),
                     backend.port);
    else
      fmt::format_to(out, "\"{}\",", config::to_text(backend.address, backend.port));
  }
  text += "]\n";
}

std::string endpoint(const config::Service& service) {
  return fmt::format("{}/{}", config::to_text(service.vip, service.port),
                     config::name_of(config::protocol_names, service.protocol));
}

/// A service of the cluster that wants to be served.
struct Candidate {
  const config::Service* service = nullptr;
  std::string_view space;  // the namespace
  bool is_external = false;
  bool serves = false;       // already
  std::size_t services = 0;  // of its namespace, up to and with it
  std::size_t backends = 0;  // theirs
  std::size_t room = 0;      // so many backends it may have
  std::string problem;       // why it is not to be served
};

/// A ClusterIP is the cluster's to give; an external address is what somebody has written down.
bool is_external(std::string_view name) {
  const std::size_t at = name.find('@');
  return at != std::string_view::npos && name.substr(at) != "@ipv4" && name.substr(at) != "@ipv6";
}

std::vector<Candidate> candidates_of(const ClusterServices& cluster, std::span<const config::Service> serving) {
  std::unordered_set<std::string_view> names;
  for (const config::Service& service : serving) names.insert(service.name);
  std::vector<Candidate> candidates;
  for (const auto& [name, services] : cluster) {
    for (const config::Service& service : services)
      candidates.push_back({.service = &service,
                            .space = std::string_view(name).substr(0, name.find('/')),
                            .is_external = is_external(service.name),
                            .serves = names.contains(service.name),
                            .problem = {}});
  }
  return candidates;
}

/// Those which have no problem, by a key; of equals, the first by name.
std::vector<Candidate*> sorted(std::vector<Candidate>& candidates, auto key) {
  std::vector<Candidate*> order;
  for (Candidate& candidate : candidates)
    if (candidate.problem.empty()) order.push_back(&candidate);
  std::ranges::sort(order, {}, [&](const Candidate* candidate) { return std::pair(key(*candidate), candidate); });
  return order;
}

/// Who has which VIP.
struct Vips {
  std::map<Key, std::string> owners;  // in words
  std::set<Key> contested;            // endpoints that kept an external address from being served
};

/// The file, then ClusterIPs, then external addresses; of equals, who serves, then the first by name. An external
/// address that is new takes nobody's endpoints either.
Vips give_vips(const config::Config& own, const ClusterServices& cluster, std::vector<Candidate>& candidates) {
  Vips vips;
  std::map<Key, std::string> endpoints;  // that are to be no VIPs
  std::set<std::string_view> names;
  for (const config::Service& service : own.services) {
    const std::string of =
        fmt::format("service {} of the file, line {}", config::printable(service.name), service.position.line);
    vips.owners.emplace(key_of(service), of);
    for (const config::Backend& backend : service.backends)
      endpoints.try_emplace({backend.address, backend.port, service.protocol}, of);
    names.insert(service.name);
  }
  const auto give = [&](Candidate& candidate) {
    const config::Service& service = *candidate.service;
    const Key key = key_of(service);
    if (names.contains(service.name)) {
      candidate.problem = "a service of the file has its name";
    } else if (const auto found = endpoints.find(key); found != endpoints.end()) {
      candidate.problem = fmt::format("its vip {} is a backend of {}", endpoint(service), found->second);
      vips.contested.insert(key);
    } else {
      const auto [owner, is_free] = vips.owners.try_emplace(key, fmt::format("service {} of Kubernetes", service.name));
      if (!is_free) candidate.problem = fmt::format("its vip {} is that of {}", endpoint(service), owner->second);
    }
  };
  const auto order = sorted(candidates, [](const Candidate& one) { return std::pair(one.is_external, !one.serves); });
  const auto others =
      std::ranges::find_if(order, [](const Candidate* one) { return one->is_external && !one->serves; });
  std::for_each(order.begin(), others, [&](Candidate* candidate) { give(*candidate); });
  if (others == order.end()) return vips;
  for (const auto& [name, services] : cluster) {
    for (const config::Service& service : services) {
      for (const config::Backend& backend : service.backends)
        endpoints.try_emplace({backend.address, backend.port, service.protocol},
                              fmt::format("service {} of Kubernetes", service.name));
    }
  }
  std::for_each(others, order.end(), [&](Candidate* candidate) { give(*candidate); });
  return vips;
}

/// Up to an equal share, a namespace has what it wants. What serves beyond that comes next, then what is new, in turns
/// of the namespaces: no matter how much one of them wants, others' come first. True when there was too little.
bool give_room(const config::Config& own, std::vector<Candidate>& candidates, Vips& vips) {
  struct Used {
    std::size_t services = 0;
    std::size_t backends = 0;
  };
  std::unordered_map<std::string_view, Used> used;
  // Of what serves, the small ones first: what grows takes no other's place.
  const auto order = [](const Candidate& one) {
    return std::pair(!one.serves, one.serves ? one.service->backends.size() : 0);
  };
  for (Candidate* candidate : sorted(candidates, order)) {
    Used& of = used[candidate->space];
    candidate->services = ++of.services;
    candidate->backends = of.backends += candidate->service->backends.size();
  }
  std::size_t services = own.limits.services - own.services.size();
  std::size_t backends = own.limits.backends;
  for (const config::Service& service : own.services) backends -= service.backends.size();
  const Used share{.services = services / std::max<std::size_t>(used.size(), 1),
                   .backends = backends / std::max<std::size_t>(used.size(), 1)};
  const auto turn = [&](const Candidate& one) {
    const bool is_within = one.services <= share.services && one.backends <= share.backends;
    const int rank = is_within ? 0 : one.serves ? 1 : 2;
    return std::pair(rank, one.services + one.backends);
  };
  bool is_short = false;
  for (Candidate* candidate : sorted(candidates, turn)) {
    const std::size_t wanted = candidate->service->backends.size();
    candidate->room = std::min(wanted, backends);
    is_short = is_short || services == 0 || wanted > backends;
    if (services == 0) {
      candidate->problem = fmt::format("there are {} services already (limits.services)", own.limits.services);
    } else if (wanted > backends && (!candidate->serves || backends == 0)) {
      candidate->problem = fmt::format("there would be more than {} backends (limits.backends)", own.limits.backends);
    } else {
      --services;
      backends -= candidate->room;
      continue;
    }
    vips.owners.erase(key_of(*candidate->service));
  }
  return is_short;
}

/// Those that take new connections stay first.
void trim(std::vector<config::Backend>& backends, std::size_t room) {
  std::vector<config::Backend> kept;
  for (const bool is_active : {true, false}) {
    for (const config::Backend& backend : backends)
      if ((backend.state == config::BackendState::active) == is_active && kept.size() < room) kept.push_back(backend);
  }
  backends = std::move(kept);
}

}  // namespace

bool is_cluster_name(std::string_view name) {
  const std::size_t slash = name.find('/');
  const std::size_t colon = name.find(':');
  if (slash == 0 || slash == std::string_view::npos || colon == std::string_view::npos || colon < slash + 2)
    return false;
  std::string_view rest = name.substr(colon + 1);
  rest = rest.substr(0, rest.find('@'));
  const std::size_t end = rest.find('/');
  if (end == 0 || end == std::string_view::npos) return false;
  const bool is_port = rest.substr(0, end).find_first_not_of("0123456789") == std::string_view::npos;
  return is_port && (rest.substr(end) == "/tcp" || rest.substr(end) == "/udp");
}

Merged merge(const config::Config& own, std::string_view text, const ClusterServices& cluster,
             std::span<const config::Service> serving) {
  Merged merged;
  merged.config = own;
  merged.text = text;
  if (!merged.text.ends_with('\n')) merged.text += '\n';
  std::vector<Candidate> candidates = candidates_of(cluster, serving);
  Vips vips = give_vips(own, cluster, candidates);
  merged.is_short = give_room(own, candidates, vips);
  merged.contested = std::move(vips.contested);
  const auto tell = [&](const config::Service& service, std::string_view what) {
    merged.problems.push_back(fmt::format("service {} of Kubernetes: {}", service.name, what));
  };
  for (const Candidate& candidate : candidates) {
    if (!candidate.problem.empty()) {
      ++merged.left_out;
      tell(*candidate.service, candidate.problem + ": it is not served");
      continue;
    }
    config::Service& service = merged.config.services.emplace_back(*candidate.service);
    if (candidate.room < service.backends.size()) {
      tell(service,
           fmt::format("there would be more than {} backends (limits.backends): {} of its {} are left out",
                       own.limits.backends, service.backends.size() - candidate.room, service.backends.size()));
      trim(service.backends, candidate.room);
    }
    std::erase_if(service.backends, [&](const config::Backend& backend) {
      const auto found = vips.owners.find({backend.address, backend.port, service.protocol});
      if (found == vips.owners.end()) return false;
      tell(service, fmt::format("its backend {} is the vip of {}: it is left out",
                                config::to_text(backend.address, backend.port), found->second));
      return true;
    });
    append(merged.text, service);
  }
  return merged;
}

ClusterServices cluster_services(const std::vector<cli::SeenService>& seen) {
  ClusterServices services;
  for (const cli::SeenService& one : seen) {
    if (!is_cluster_name(one.name)) continue;
    config::Service service;
    service.name = one.name;
    service.vip = boost::asio::ip::make_address(one.vip);
    service.port = one.port;
    service.protocol = one.protocol == IPPROTO_UDP ? config::Protocol::udp : config::Protocol::tcp;
    service.client = config::Client::netns;
    if (one.affinity_ms != 0) service.affinity = std::chrono::milliseconds(one.affinity_ms);
    for (const cli::SeenBackend& backend : one.backends) {
      service.backends.push_back(
          {.address = boost::asio::ip::make_address(backend.address),
           .port = backend.port,
           .weight = 1,
           .state = backend.state == CLUSTERIP_DRAIN ? config::BackendState::drain : config::BackendState::active,
           .position = {}});
    }
    services[one.name.substr(0, one.name.find(':'))].push_back(std::move(service));
  }
  return services;
}

}  // namespace run
