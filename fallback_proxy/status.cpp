// SPDX-License-Identifier: BSD-2-Clause
#include "fallback_proxy/status.h"

#include <fmt/chrono.h>

#include <boost/json.hpp>
#include <string_view>
#include <utility>

#include "config/names.h"
#include "config/printable.h"

namespace userspace {
namespace {

boost::json::object to_json(const BackendStatus& backend) {
  // The file has no word for what only health checks say.
  const bool is_down = backend.state == config::BackendState::down;
  const std::string_view state = is_down ? "down" : config::name_of(config::state_names, backend.state);
  return {{"address", backend.address.to_string()},
          {"port", backend.port},
          {"weight", backend.weight},
          {"state", state},
          {"marked", backend.is_marked},
          {"ejected_ms", backend.ejected.count()},
          {"live", backend.live},
          {"connects", backend.connects},
          {"failures", backend.failures}};
}

boost::json::object to_json(const ServiceStatus& service) {
  boost::json::array backends;
  backends.reserve(service.backends.size());
  for (const BackendStatus& backend : service.backends) backends.push_back(to_json(backend));
  return {{"name", config::printable(service.name)},
          {"vip", service.vip.to_string()},
          {"port", service.port},
          {"protocol", config::name_of(config::protocol_names, service.protocol)},
          {"policy", config::name_of(config::policy_names, service.policy)},
          {"serving", service.is_serving},
          {"reason", config::printable(service.reason)},
          {"refused", service.refused},
          {"denied", service.denied},
          {"dropped", service.dropped},
          {"received", service.received},
          {"sent", service.sent},
          {"backends", std::move(backends)}};
}

}  // namespace

boost::json::object to_json(const Status& status) {
  boost::json::array services;
  services.reserve(status.services.size());
  for (const ServiceStatus& service : status.services) services.push_back(to_json(service));
  const auto since = std::chrono::floor<std::chrono::seconds>(status.since);
  return {{"version", status.version},
          {"pid", status.pid},
          {"since", fmt::format("{:%Y-%m-%dT%H:%M:%SZ}", since)},
          {"threads", status.threads},
          {"connections", status.connections},
          {"connection_limit", status.connection_limit},
          {"services", std::move(services)}};
}

}  // namespace userspace
