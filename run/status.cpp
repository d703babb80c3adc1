// SPDX-License-Identifier: BSD-2-Clause
#include "run/status.h"

#include <fmt/chrono.h>
#include <fmt/format.h>
#include <netinet/in.h>

#include <algorithm>
#include <boost/json.hpp>
#include <limits>
#include <utility>

#include "cli/table.h"
#include "cli/text.h"
#include "config/names.h"
#include "config/printable.h"
#include "run/status_fields.h"

namespace run {
namespace {

using boost::json::object;
using boost::json::value;
using cli::Cell;
using cli::Colour;

value or_null(const std::string& text) { return text.empty() ? value(nullptr) : value(text); }

template <class T>
value or_null(const std::optional<T>& known) {
  return known ? value(*known) : value(nullptr);
}

std::string time_text(std::chrono::system_clock::time_point time) {
  return fmt::format("{:%Y-%m-%dT%H:%M:%SZ}", std::chrono::floor<std::chrono::seconds>(time));
}

object to_json(const BackendStatus& backend) {
  return {{"address", backend.address},
          {"port", backend.port},
          {"weight", backend.weight},
          {"state", backend.state},
          {"reason", config::printable(backend.reason)},
          {"marked", or_null(backend.is_marked)},
          {"ejected_ms", backend.ejected_ms},
          {"connects", backend.connects},
          {"failures", backend.failures},
          {"live", backend.live},
          {"reversed", or_null(backend.reversed)}};
}

Cell count_cell(const object& of, std::string_view key) {
  const value& count = of.at(key);
  return {count.is_null() ? "-" : fmt::to_string(count.to_number<std::uint64_t>())};
}

Cell rate_cell(const object& service) {
  const value& rate = service.at("connects_per_second");
  return {rate.is_null() ? "-" : fmt::format("{:.1f}", rate.to_number<double>())};
}

Cell state_cell(const object& backend) {
  const std::string state = text(backend, "state");
  if (state == "ejected")
    return {fmt::format("ejected {:.1f}s", static_cast<double>(number(backend, "ejected_ms")) / 1000), Colour::red};
  if (state == "down") return {state, Colour::red};
  if (const value& marked = backend.at("marked"); marked.is_bool() && marked.as_bool()) return {"dead", Colour::red};
  return {state, state == "active" ? Colour::none : Colour::yellow};
}

std::string canary_text(const object& canary, bool colour) {
  if (canary.at("passed").as_bool()) return "canary: rewritten, refused with " + text(canary, "refuse_errno");
  const std::string failed = "canary: FAILED: " + text(canary, "message");
  return colour ? cli::paint(failed, Colour::red) : failed;
}

std::string cluster_text(const object& cluster, bool colour) {
  const std::uint64_t left_out = number(cluster, "left_out");
  if (cluster.at("current").as_bool())
    return fmt::format("kubernetes: current, {} from {}{}", cli::count(number(cluster, "services"), "service"),
                       text(cluster, "server"),
                       left_out == 0 ? "" : fmt::format(", {} left out: the log says why", left_out));
  std::string stale = cluster.at("complete").as_bool()
                          ? fmt::format("kubernetes: NOT CURRENT for {:.0f} s", cluster.at("age_s").to_number<double>())
                          : std::string("kubernetes: NOT LISTED YET");
  if (!cluster.at("problem").is_null()) stale += ": " + text(cluster, "problem");
  return colour ? cli::paint(stale, Colour::red) : stale;
}

/// The line above the tables: which process, which engines, what the canary saw.
std::string head(const object& status, std::size_t backends, bool colour) {
  std::string head = fmt::format("{}, {}", cli::count(status.at("services").as_array().size(), "service"),
                                 cli::count(backends, "backend"));
  if (!status.at("pid").is_null()) {
    head += fmt::format("; {} {}, pid {}, since {}", text(status, "program"), text(status, "version"),
                        number(status, "pid"), text(status, "since"));
  }
  if (!status.at("pin").is_null()) head += fmt::format("; pinned at {}", text(status, "pin"));
  if (const value& why = status.at("no_fast_path"); !why.is_null())
    head += fmt::format("; no fast path: {}", text(status, "no_fast_path"));
  if (const value& canary = status.at("canary"); canary.is_object())
    head += "; " + canary_text(canary.as_object(), colour);
  if (const value& last = status.at("last_reload_good"); last.is_bool() && !last.as_bool()) {
    const std::string failed = "the last reload FAILED, what was read before serves on";
    head += "; " + (colour ? cli::paint(failed, Colour::red) : failed);
  }
  if (const value* cluster = status.if_contains("kubernetes"); cluster != nullptr && cluster->is_object())
    head += "; " + cluster_text(cluster->as_object(), colour);
  return head;
}

}  // namespace

ServiceStatus to_status(const cli::SeenService& seen) {
  ServiceStatus service{
      .name = seen.name,
      .vip = seen.vip,
      .port = seen.port,
      .protocol = seen.protocol == IPPROTO_UDP ? config::Protocol::udp : config::Protocol::tcp,
      .policy = seen.policy,
      .no_backend = seen.no_backend,
      .engine = seen.engine == CLUSTERIP_ENGINE_BPF ? config::EngineMode::bpf : config::EngineMode::userspace,
      .reason = seen.reason,
      .connects = seen.connects,
      .refused = seen.refused,
      .live = seen.live,
      .connects_per_second = {},
      .reversed = seen.reversed,
      .proxied = {},
      .backends = {}};
  service.backends.reserve(seen.backends.size());
  for (const cli::SeenBackend& backend : seen.backends) {
    service.backends.push_back({.address = backend.address,
                                .port = backend.port,
                                .weight = backend.weight,
                                .state = backend.ejected_ms > 0 ? "ejected" : cli::state_name(backend.state),
                                .reason = {},
                                .connects = backend.connects,
                                .failures = backend.failures,
                                .live = backend.live,
                                .ejected_ms = backend.ejected_ms,
                                .reversed = backend.reversed,
                                .is_marked = {}});
  }
  return service;
}

ServiceStatus to_status(const userspace::ServiceStatus& seen) {
  ServiceStatus service{.name = seen.name,
                        .vip = seen.vip.to_string(),
                        .port = seen.port,
                        .protocol = seen.protocol,
                        .policy = std::string(config::name_of(config::policy_names, seen.policy)),
                        .no_backend = std::string(config::name_of(config::no_backend_names, config::NoBackend::refuse)),
                        .engine = config::EngineMode::userspace,
                        .reason = seen.reason,
                        .connects = 0,
                        .refused = seen.refused,
                        .live = 0,
                        .connects_per_second = {},
                        .reversed = {},
                        .proxied = ProxiedStatus{.is_serving = seen.is_serving,
                                                 .denied = seen.denied,
                                                 .dropped = seen.dropped,
                                                 .received = seen.received,
                                                 .sent = seen.sent},
                        .backends = {}};
  service.backends.reserve(seen.backends.size());
  for (const userspace::BackendStatus& backend : seen.backends) {
    service.connects += backend.connects;
    service.live += backend.live;
    const std::string_view state =
        backend.state == config::BackendState::down ? "down" : config::name_of(config::state_names, backend.state);
    service.backends.push_back({.address = backend.address.to_string(),
                                .port = backend.port,
                                .weight = backend.weight,
                                .state = backend.ejected.count() > 0 ? "ejected" : state,
                                .reason = {},
                                .connects = backend.connects,
                                .failures = backend.failures,
                                .live = backend.live,
                                .ejected_ms = static_cast<std::uint32_t>(std::min<std::int64_t>(
                                    backend.ejected.count(), std::numeric_limits<std::uint32_t>::max())),
                                .reversed = {},
                                .is_marked = backend.is_marked});
  }
  return service;
}

object to_json(const ServiceStatus& service) {
  boost::json::array backends;
  backends.reserve(service.backends.size());
  for (const BackendStatus& backend : service.backends) backends.push_back(to_json(backend));
  const auto& proxied = service.proxied;
  const auto of_proxy = [&](auto member) { return proxied ? value((*proxied).*member) : value(nullptr); };
  return {{"name", config::printable(service.name)},
          {"vip", service.vip},
          {"port", service.port},
          {"protocol", config::name_of(config::protocol_names, service.protocol)},
          {"engine", config::name_of(config::engine_names, service.engine)},
          {"reason", config::printable(service.reason)},
          {"policy", service.policy},
          {"no_backend", service.no_backend},
          {"serving", of_proxy(&ProxiedStatus::is_serving)},
          {"connects", service.connects},
          {"connects_per_second", or_null(service.connects_per_second)},
          {"refused", service.refused},
          {"live", service.live},
          {"reversed", or_null(service.reversed)},
          {"denied", of_proxy(&ProxiedStatus::denied)},
          {"dropped", of_proxy(&ProxiedStatus::dropped)},
          {"received", of_proxy(&ProxiedStatus::received)},
          {"sent", of_proxy(&ProxiedStatus::sent)},
          {"backends", std::move(backends)}};
}

object to_json(const cli::Canary& canary) {
  return {{"passed", canary.passed},
          {"rewrite_errno", or_null(canary.rewrite)},
          {"refuse_errno", or_null(canary.refuse)},
          {"message", config::printable(canary.message)}};
}

object to_json(const ClusterStatus& cluster) {
  return {{"server", cluster.server},
          {"complete", cluster.is_complete},
          {"current", cluster.is_current},
          {"age_s", cluster.age},
          {"problem", or_null(config::printable(cluster.problem))},
          {"services", cluster.services},
          {"slices", cluster.slices},
          {"left_out", cluster.left_out},
          {"lists", cluster.lists},
          {"events", cluster.events},
          {"failures", cluster.failures}};
}

object to_json(const Status& status) {
  boost::json::array services;
  services.reserve(status.services.size());
  for (const ServiceStatus& service : status.services) services.push_back(to_json(service));
  const bool is_running = status.pid != 0;
  const auto if_running = [is_running](const auto& known) { return is_running ? value(known) : value(nullptr); };
  object result{{"program", or_null(status.program)},
                {"version", or_null(status.version)},
                {"pid", if_running(status.pid)},
                {"since", if_running(time_text(status.since))},
                {"config", or_null(config::printable(status.file))},
                {"pin", status.has_fast_path ? value(config::printable(status.pin)) : value(nullptr)},
                {"cgroup", or_null(config::printable(status.cgroup))},
                {"no_fast_path", or_null(config::printable(status.no_fast_path))},
                {"canary", status.canary ? value(to_json(*status.canary)) : value(nullptr)},
                {"lost_events", if_running(status.lost_events)},
                {"threads", if_running(status.threads)},
                {"connections", if_running(status.connections)},
                {"connection_limit", if_running(status.connection_limit)},
                {"reloads", if_running(status.reloads.succeeded)},
                {"failed_reloads", if_running(status.reloads.failed)},
                {"last_reload_good", if_running(status.reloads.is_last_good)},
                {"checked_backends", if_running(status.checked_backends)},
                {"services", std::move(services)}};
  if (status.kubernetes) result["kubernetes"] = to_json(*status.kubernetes);
  return result;
}

std::string to_text(const object& status, bool colour) {
  using enum cli::Table::Align;
  cli::Table services({{"SERVICE"},
                       {"VIP"},
                       {"ENGINE"},
                       {"POLICY"},
                       {"BACKENDS", right},
                       {"CONNECTS", right},
                       {"PER S", right},
                       {"REFUSED", right},
                       {"LIVE", right},
                       {"REASON"}});
  cli::Table backends({{"SERVICE"},
                       {"BACKEND"},
                       {"WEIGHT", right},
                       {"STATE"},
                       {"CONNECTS", right},
                       {"FAILURES", right},
                       {"LIVE", right},
                       {"REASON"}});
  std::size_t backend_count = 0;
  for (const value& entry : status.at("services").as_array()) {
    const object& service = entry.as_object();
    const auto& list = service.at("backends").as_array();
    std::size_t active = 0;
    for (const value& each : list) {
      const object& backend = each.as_object();
      ++backend_count;
      if (text(backend, "state") == "active") ++active;
      backends.add({{text(service, "name")},
                    {endpoint(backend, "address")},
                    count_cell(backend, "weight"),
                    state_cell(backend),
                    count_cell(backend, "connects"),
                    count_cell(backend, "failures"),
                    count_cell(backend, "live"),
                    {text(backend, "reason")}});
    }
    const value& serving = service.at("serving");
    const bool is_wrong = serving.is_bool() && !serving.as_bool();
    services.add({{text(service, "name")},
                  {fmt::format("{}/{}", endpoint(service, "vip"), text(service, "protocol"))},
                  {text(service, "engine")},
                  {text(service, "policy")},
                  {fmt::format("{}/{}", active, list.size())},
                  count_cell(service, "connects"),
                  rate_cell(service),
                  count_cell(service, "refused"),
                  count_cell(service, "live"),
                  {text(service, "reason"), is_wrong ? Colour::red : Colour::none}});
  }
  return fmt::format("{}\n\n{}\n{}", head(status, backend_count, colour), services.render(colour),
                     backends.render(colour));
}

}  // namespace run
