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
#include <utility>

#include "config/names.h"
#include "config/printable.h"
#include "config/values.h"

namespace run {
namespace {

using Key = std::tuple<config::Address, std::uint16_t, config::Protocol>;

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

Merged merge(const config::Config& own, std::string_view text, const ClusterServices& cluster) {
  Merged merged{.config = own, .text = std::string(text), .problems = {}};
  if (!merged.text.ends_with('\n')) merged.text += '\n';
  std::map<Key, std::string> taken;
  std::set<std::string> names;
  std::size_t backends = 0;
  for (const config::Service& service : own.services) {
    taken.emplace(key_of(service), fmt::format("service {} of the file, line {}", config::printable(service.name),
                                               service.position.line));
    names.insert(service.name);
    backends += service.backends.size();
  }
  const auto leave_out = [&](const config::Service& service, std::string_view why) {
    merged.problems.push_back(fmt::format("service {} of Kubernetes: {}: it is not served", service.name, why));
  };
  std::vector<config::Service> added;
  for (const auto& [name, services] : cluster) {
    for (const config::Service& service : services) {
      const auto [first, is_free] =
          taken.try_emplace(key_of(service), fmt::format("service {} of Kubernetes", service.name));
      if (!is_free) {
        leave_out(service, fmt::format("its vip {} is that of {}", endpoint(service), first->second));
      } else if (names.contains(service.name)) {
        taken.erase(first);
        leave_out(service, "a service of the file has its name");
      } else if (own.services.size() + added.size() >= own.limits.services) {
        taken.erase(first);
        leave_out(service, fmt::format("there are {} services already (limits.services)", own.limits.services));
      } else if (backends + service.backends.size() > own.limits.backends) {
        taken.erase(first);
        leave_out(service, fmt::format("there would be more than {} backends (limits.backends)", own.limits.backends));
      } else {
        backends += service.backends.size();
        added.push_back(service);
      }
    }
  }
  for (config::Service& service : added) {
    std::erase_if(service.backends, [&](const config::Backend& backend) {
      const auto found = taken.find({backend.address, backend.port, service.protocol});
      if (found == taken.end()) return false;
      merged.problems.push_back(fmt::format("service {} of Kubernetes: its backend {} is the vip of {}: it is left out",
                                            service.name, config::to_text(backend.address, backend.port),
                                            found->second));
      return true;
    });
    append(merged.text, service);
  }
  std::ranges::move(added, std::back_inserter(merged.config.services));
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
