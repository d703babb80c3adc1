// SPDX-License-Identifier: BSD-2-Clause
#include "run/status.h"

#include <fmt/format.h>

#include <boost/json.hpp>
#include <string>
#include <utility>

#include "cli/pinned.h"
#include "cli/places.h"
#include "cli/text.h"
#include "cli/verbs.h"

namespace cli {

namespace {

namespace po = boost::program_options;
using boost::json::object;

void describe(po::options_description_easy_init add) {
  describe_places(add);
  add("json", po::bool_switch(), "print the status as JSON");
}

std::expected<object, Failure> ask_daemon(userspace::ControlClient& daemon) {
  auto status = daemon.ask({{"request", "status"}});
  if (!status) return std::unexpected(Failure{.message = status.error().message});
  return std::move(*status);
}

std::expected<object, Failure> look_at_pins(const Plugin& plugin, const Given& given, const Places& places) {
  const auto handle = open_pins(plugin, given, places);
  if (!handle) return std::unexpected(handle.error());
  run::Status status;
  status.has_fast_path = true;
  status.pin = places.pin;
  status.canary = run_canary(plugin, handle->get());
  const auto services = see_services(plugin, handle->get());
  if (!services) return std::unexpected(services.error());
  for (const SeenService& service : *services) status.services.push_back(run::to_status(service));
  return run::to_json(status);
}

Exit show(const object& status, bool is_json) {
  if (is_json)
    fmt::print("{}\n", boost::json::serialize(status));
  else
    fmt::print("{}", run::to_text(status, wants_colour(stdout)));
  const auto* canary = status.if_contains("canary");
  const bool has_failed = canary != nullptr && canary->is_object() && !canary->as_object().at("passed").as_bool();
  const auto* cluster = status.if_contains("kubernetes");
  const bool is_to_come = cluster != nullptr && cluster->is_object() && !cluster->as_object().at("complete").as_bool();
  return has_failed || is_to_come ? Exit::failed : Exit::fine;
}

Outcome run(const Plugin& plugin, const Given& given) {
  const auto places = places_of(given);
  if (!places) return std::unexpected(places.error());
  auto daemon = connect_to_daemon(*places);
  if (!daemon) return std::unexpected(daemon.error());
  const auto status = *daemon ? ask_daemon(**daemon) : look_at_pins(plugin, given, *places);
  if (!status) return std::unexpected(status.error());
  const bool is_json = given.options["json"].as<bool>();
  const auto show_it = [&] { return show(*status, is_json); };
  if (!*daemon) return show_it();
  const auto shown = (*daemon)->understand(show_it);
  if (!shown) return std::unexpected(Failure{.message = shown.error().message});
  return *shown;
}

}  // namespace

const Verb status_verb{.name = "status",
                       .usage = "[--config FILE | --control PATH | --pin DIR] [--json]",
                       .argument = {},
                       .summary = "show services, backends, engine and reason, counters, and what the canary saw",
                       .describe = describe,
                       .run = run,
                       .works_without_plugin = true};

}  // namespace cli
