// SPDX-License-Identifier: BSD-2-Clause
#include <fmt/format.h>

#include <algorithm>
#include <boost/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "cli/endpoint.h"
#include "cli/pinned.h"
#include "cli/table.h"
#include "cli/text.h"
#include "cli/verbs.h"
#include "config/printable.h"

namespace cli {

namespace {

namespace po = boost::program_options;

void describe(po::options_description_easy_init add) {
  add("pin", po::value<std::string>()->default_value(default_pin())->value_name("DIR"),
      "where the fast path is pinned");
  add("json", po::bool_switch(), "print the status as JSON");
}

/// An errno name, or null where there is none.
boost::json::value name_or_null(const std::string& name) {
  return name.empty() ? boost::json::value(nullptr) : boost::json::value(name);
}

boost::json::object to_json(const SeenBackend& backend) {
  return {{"address", backend.address},         {"port", backend.port},         {"weight", backend.weight},
          {"state", state_name(backend.state)}, {"connects", backend.connects}, {"live", backend.live},
          {"reversed", backend.reversed}};
}

boost::json::object to_json(const SeenService& service) {
  boost::json::array backends;
  backends.reserve(service.backends.size());
  for (const SeenBackend& backend : service.backends) backends.push_back(to_json(backend));
  return {{"name", config::printable(service.name)},
          {"vip", service.vip},
          {"port", service.port},
          {"protocol", protocol_name(service.protocol)},
          {"engine", engine_name(service.engine)},
          {"reason", config::printable(service.reason)},
          {"policy", service.policy},
          {"no_backend", service.no_backend},
          {"connects", service.connects},
          {"refused", service.refused},
          {"live", service.live},
          {"reversed", service.reversed},
          {"backends", std::move(backends)}};
}

boost::json::object to_json(const std::string& pin, const Canary& canary, const std::vector<SeenService>& services) {
  boost::json::array list;
  list.reserve(services.size());
  for (const SeenService& service : services) list.push_back(to_json(service));
  return {{"pin", config::printable(pin)},
          {"canary",
           {{"passed", canary.passed},
            {"rewrite_errno", name_or_null(canary.rewrite)},
            {"refuse_errno", name_or_null(canary.refuse)},
            {"message", config::printable(canary.message)}}},
          {"services", std::move(list)}};
}

std::string to_text(const std::string& pin, const Canary& canary, const std::vector<SeenService>& services) {
  using enum Table::Align;
  Table service_table({{.title = "SERVICE"},
                       {.title = "VIP"},
                       {.title = "ENGINE"},
                       {.title = "POLICY"},
                       {.title = "BACKENDS", .align = right},
                       {.title = "CONNECTS", .align = right},
                       {.title = "REFUSED", .align = right},
                       {.title = "LIVE", .align = right},
                       {.title = "REASON"}});
  Table backend_table({{.title = "SERVICE"},
                       {.title = "BACKEND"},
                       {.title = "WEIGHT", .align = right},
                       {.title = "STATE"},
                       {.title = "CONNECTS", .align = right},
                       {.title = "LIVE", .align = right}});
  for (const SeenService& service : services) {
    const auto active = std::ranges::count(service.backends, CLUSTERIP_ACTIVE, &SeenBackend::state);
    service_table.add(
        {{.text = service.name},
         {.text = fmt::format("{}/{}", address_and_port(service.vip, service.port), protocol_name(service.protocol))},
         {.text = engine_name(service.engine)},
         {.text = service.policy},
         {.text = fmt::format("{}/{}", active, service.backends.size())},
         {.text = fmt::to_string(service.connects)},
         {.text = fmt::to_string(service.refused)},
         {.text = fmt::to_string(service.live)},
         {.text = service.reason}});
    for (const SeenBackend& backend : service.backends) {
      backend_table.add({{.text = service.name},
                         {.text = address_and_port(backend.address, backend.port)},
                         {.text = fmt::to_string(backend.weight)},
                         {.text = state_name(backend.state),
                          .colour = backend.state == CLUSTERIP_ACTIVE ? Colour::none : Colour::yellow},
                         {.text = fmt::to_string(backend.connects)},
                         {.text = fmt::to_string(backend.live)}});
    }
  }
  const bool colour = wants_colour(stdout);
  const std::string canary_text = config::printable(describe(canary));
  return fmt::format("{}; pinned at {}; canary: {}\n\n{}\n{}", count_services(services), config::printable(pin),
                     colour && !canary.passed ? paint(canary_text, Colour::red) : canary_text,
                     service_table.render(colour), backend_table.render(colour));
}

Outcome run(const Plugin& plugin, const Given& given) {
  const auto& pin = given.options["pin"].as<std::string>();
  const auto handle = open_pinned(plugin, pin);
  if (!handle) return std::unexpected(handle.error());
  const Canary canary = run_canary(plugin, handle->get());
  const auto services = see_services(plugin, handle->get());
  if (!services) return std::unexpected(services.error());

  if (given.options["json"].as<bool>()) {
    fmt::print("{}\n", boost::json::serialize(to_json(pin, canary, *services)));
  } else {
    fmt::print("{}", to_text(pin, canary, *services));
  }
  return canary.passed ? Exit::fine : Exit::failed;
}

}  // namespace

const Verb status_verb{.name = "status",
                       .usage = "[--pin DIR] [--json]",
                       .argument = {},
                       .summary = "show services, backends, engine and reason, counters, and what the canary saw",
                       .describe = describe,
                       .run = run};

}  // namespace cli
