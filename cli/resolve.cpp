// SPDX-License-Identifier: BSD-2-Clause
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <boost/json.hpp>
#include <string>
#include <string_view>

#include "cli/endpoint.h"
#include "cli/pinned.h"
#include "cli/places.h"
#include "cli/verbs.h"
#include "config/printable.h"
#include "run/status_fields.h"

namespace cli {

namespace {

namespace po = boost::program_options;
using boost::json::object;

void describe(po::options_description_easy_init add) {
  describe_places(add);
  add("json", po::bool_switch(), "print the answer as JSON");
}

std::string_view verdict_name(std::uint32_t verdict) {
  static constexpr std::array<std::string_view, 4> names{"pass", "rewritten", "no_backend", "no_service"};
  return verdict < names.size() ? names[verdict] : "unknown";
}

/// What a connect() meets while the service has no active backend.
std::string_view meaning_of(std::string_view no_backend) {
  if (no_backend == "pass") return "a connect() passes untouched";
  return no_backend == "unreachable" ? "a connect() fails with EHOSTUNREACH" : "a connect() fails with ECONNREFUSED";
}

object to_json(const Endpoint& asked, const clusterip_resolution& found, const std::string& no_backend) {
  object answer{{"vip", asked.address},
                {"port", asked.port},
                {"protocol", protocol_name(asked.protocol)},
                {"verdict", verdict_name(found.verdict)},
                {"service", nullptr},
                {"engine", nullptr},
                {"active_backends", found.backends},
                {"backend", nullptr},
                {"no_backend", nullptr}};
  if (found.verdict == CLUSTERIP_VERDICT_NO_BACKEND) answer["no_backend"] = no_backend;
  if (found.engine != 0) {
    answer["service"] = config::printable(static_cast<const char*>(found.service));
    answer["engine"] = engine_name(found.engine);
  }
  if (found.verdict == CLUSTERIP_VERDICT_REWRITTEN) {
    const AddressAndPort backend = numeric(found.backend);
    answer["backend"] = {{"address", backend.address}, {"port", backend.port}};
  }
  return answer;
}

std::string to_text(const Endpoint& asked, const clusterip_resolution& found, std::string_view no_backend) {
  const std::string vip =
      fmt::format("{}/{}", address_and_port(asked.address, asked.port), protocol_name(asked.protocol));
  const std::string service = fmt::format(
      "service {}, engine {}", config::printable(static_cast<const char*>(found.service)), engine_name(found.engine));
  switch (found.verdict) {
    case CLUSTERIP_VERDICT_PASS:
      if (found.engine != 0) return fmt::format("{}: {}: a connect() passes untouched", vip, service);
      return fmt::format("{}: not ours, a connect() passes untouched", vip);
    case CLUSTERIP_VERDICT_REWRITTEN: {
      const AddressAndPort backend = numeric(found.backend);
      return fmt::format(
          "{}: {}: a connect() reaches {}, {}", vip, service, address_and_port(backend.address, backend.port),
          found.backends == 1 ? "the only active backend" : fmt::format("one of {} active backends", found.backends));
    }
    case CLUSTERIP_VERDICT_NO_BACKEND:
      if (found.engine == CLUSTERIP_ENGINE_USERSPACE)
        return fmt::format("{}: {}: which does not carry it now: a connect() is refused", vip, service);
      return fmt::format("{}: {}: no backend takes connections, {} (no_backend = \"{}\")", vip, service,
                         meaning_of(no_backend), no_backend);
    case CLUSTERIP_VERDICT_NO_SERVICE:
      return fmt::format("{}: a VIP of ours, but no service has this port and protocol: a connect() is refused", vip);
    default:
      return fmt::format("{}: verdict {}", vip, found.verdict);
  }
}

/// By the rule and the state that the kernel uses.
Outcome resolve_pinned(const Plugin& plugin, clusterip* handle, const Endpoint& asked, bool is_json) {
  auto found = sized<clusterip_resolution>();
  auto error = sized<clusterip_error>();
  const auto* socket_address = reinterpret_cast<const sockaddr*>(&asked.socket_address);
  if (plugin.resolve(handle, socket_address, asked.length, asked.protocol, &found, &error) < 0)
    return std::unexpected(failure_of(error));
  std::string no_backend;
  if (found.verdict == CLUSTERIP_VERDICT_NO_BACKEND) {
    const auto services = see_services(plugin, handle);
    if (!services) return std::unexpected(services.error());
    const auto service = std::ranges::find(*services, std::string_view(found.service), &SeenService::name);
    if (service != services->end()) no_backend = service->no_backend;
  }
  fmt::print("{}\n",
             is_json ? boost::json::serialize(to_json(asked, found, no_backend)) : to_text(asked, found, no_backend));
  return Exit::fine;
}

// --- what the userspace engine of a daemon carries -------------------------------------------------------------------

/// The service of the userspace engine at what is asked for; null: none is there.
const object* proxied_service(const object& status, const Endpoint& asked) {
  for (const boost::json::value& each : status.at("services").as_array()) {
    const object& service = each.as_object();
    if (run::text(service, "engine") == engine_name(CLUSTERIP_ENGINE_USERSPACE) &&
        run::text(service, "vip") == asked.address && run::number(service, "port") == asked.port &&
        run::text(service, "protocol") == protocol_name(asked.protocol))
      return &service;
  }
  return nullptr;
}

void show(const Endpoint& asked, const object& service, bool is_json) {
  const bool is_serving = service.at("serving").as_bool();
  const auto active = static_cast<std::uint64_t>(std::ranges::count_if(
      service.at("backends").as_array(),
      [](const boost::json::value& backend) { return run::text(backend.as_object(), "state") == "active"; }));
  if (is_json) {
    fmt::print("{}\n", boost::json::serialize(object{{"vip", asked.address},
                                                     {"port", asked.port},
                                                     {"protocol", protocol_name(asked.protocol)},
                                                     {"verdict", "pass"},
                                                     {"service", service.at("name")},
                                                     {"engine", service.at("engine")},
                                                     {"active_backends", active},
                                                     {"backend", nullptr},
                                                     {"no_backend", nullptr}}));
    return;
  }
  std::string met =
      fmt::format("the kernel leaves a connect() as it is, the userspace engine accepts it and chooses {}",
                  active == 1 ? "the only active backend" : fmt::format("one of {} active backends", active));
  if (!is_serving) met = "not served: " + run::text(service, "reason");
  if (active == 0) met = "no backend takes connections, a connect() is refused";
  fmt::print("{}/{}: service {}, engine userspace: {}\n", address_and_port(asked.address, asked.port),
             protocol_name(asked.protocol), run::text(service, "name"), met);
}

/// Whether the userspace engine carries it.
bool show_proxied(const object& status, const Endpoint& asked, bool is_json) {
  const object* service = proxied_service(status, asked);
  if (service != nullptr) show(asked, *service, is_json);
  return service != nullptr;
}

// ----------------------------------------------------------------------------------------------------------------------

Outcome run(const Plugin& plugin, const Given& given) {
  const auto asked = parse_endpoint(given.argument);
  if (!asked) {
    return std::unexpected(Failure{
        .exit = Exit::usage,
        .message =
            fmt::format("resolve: expected ADDRESS:PORT, ADDRESS:PORT/udp or [IPV6]:PORT, got '{}'", given.argument)});
  }
  const bool is_json = given.options["json"].as<bool>();
  auto places = places_of(given);
  if (!places) return std::unexpected(places.error());
  auto daemon = connect_to_daemon(*places);
  if (!daemon) return std::unexpected(daemon.error());
  if (*daemon) {
    const auto status = (*daemon)->ask({{"request", "status"}});
    if (!status) return std::unexpected(Failure{.message = status.error().message});
    const auto is_shown = (*daemon)->understand([&] { return show_proxied(*status, *asked, is_json); });
    if (!is_shown) return std::unexpected(Failure{.message = is_shown.error().message});
    if (*is_shown) return Exit::fine;
    const auto* pin = status->if_contains("pin");
    if (pin == nullptr || !pin->is_string()) {
      const clusterip_resolution nothing{};
      fmt::print("{}\n", is_json ? boost::json::serialize(to_json(*asked, nothing, "")) : to_text(*asked, nothing, ""));
      return Exit::fine;
    }
    places->pin = run::text(*status, "pin");
    if (const auto something = anything_pinned(places->pin); something && !*something)
      return std::unexpected(
          Failure{.message = fmt::format("the daemon (pid {}) serves, but its pins at {} were removed: restart it",
                                         (*daemon)->pid(), places->pin)});
  }
  const auto handle = open_pins(plugin, given, *places);
  if (!handle) return std::unexpected(handle.error());
  return resolve_pinned(plugin, handle->get(), *asked, is_json);
}

}  // namespace

const Verb resolve_verb{.name = "resolve",
                        .usage = "VIP:PORT[/udp] [--config FILE | --control PATH | --pin DIR] [--json]",
                        .argument = "VIP:PORT",
                        .summary = "show which backend a connect() would reach, and by which engine",
                        .describe = describe,
                        .run = run,
                        .works_without_plugin = true};

}  // namespace cli
