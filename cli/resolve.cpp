// SPDX-License-Identifier: BSD-2-Clause
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <boost/json.hpp>
#include <string>
#include <string_view>

#include "cli/endpoint.h"
#include "cli/pinned.h"
#include "cli/verbs.h"
#include "config/printable.h"

namespace cli {

namespace {

namespace po = boost::program_options;

void describe(po::options_description_easy_init add) {
  add("pin", po::value<std::string>()->default_value(default_pin())->value_name("DIR"),
      "where the fast path is pinned");
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

boost::json::object to_json(const Endpoint& asked, const clusterip_resolution& found, const std::string& no_backend) {
  boost::json::object answer{{"vip", asked.address},
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
      return fmt::format("{}: {}: no backend takes connections, {} (no_backend = \"{}\")", vip, service,
                         meaning_of(no_backend), no_backend);
    case CLUSTERIP_VERDICT_NO_SERVICE:
      return fmt::format("{}: a VIP of ours, but no service has this port and protocol: a connect() is refused", vip);
    default:
      return fmt::format("{}: verdict {}", vip, found.verdict);
  }
}

Outcome run(const Plugin& plugin, const Given& given) {
  const auto asked = parse_endpoint(given.argument);
  if (!asked) {
    return std::unexpected(Failure{
        .exit = Exit::usage,
        .message =
            fmt::format("resolve: expected ADDRESS:PORT, ADDRESS:PORT/udp or [IPV6]:PORT, got '{}'", given.argument)});
  }
  const auto handle = open_pinned(plugin, given.options["pin"].as<std::string>());
  if (!handle) return std::unexpected(handle.error());

  auto found = sized<clusterip_resolution>();
  auto error = sized<clusterip_error>();
  const auto* socket_address = reinterpret_cast<const sockaddr*>(&asked->socket_address);
  if (plugin.resolve(handle->get(), socket_address, asked->length, asked->protocol, &found, &error) < 0) {
    return std::unexpected(failure_of(error));
  }
  std::string no_backend;
  if (found.verdict == CLUSTERIP_VERDICT_NO_BACKEND) {
    const auto services = see_services(plugin, handle->get());
    if (!services) return std::unexpected(services.error());
    const auto service = std::ranges::find(*services, std::string_view(found.service), &SeenService::name);
    if (service != services->end()) no_backend = service->no_backend;
  }
  if (given.options["json"].as<bool>()) {
    fmt::print("{}\n", boost::json::serialize(to_json(*asked, found, no_backend)));
  } else {
    fmt::print("{}\n", to_text(*asked, found, no_backend));
  }
  return Exit::fine;
}

}  // namespace

const Verb resolve_verb{.name = "resolve",
                        .usage = "VIP:PORT[/udp] [--pin DIR] [--json]",
                        .argument = "VIP:PORT",
                        .summary = "show which backend a connect() would reach, and by which engine",
                        .describe = describe,
                        .run = run};

}  // namespace cli
