// SPDX-License-Identifier: BSD-2-Clause
#include "run/status.h"

#include <fmt/format.h>

#include <boost/json.hpp>
#include <boost/system/system_error.hpp>
#include <optional>
#include <string>
#include <utility>

#include "cli/pinned.h"
#include "cli/text.h"
#include "cli/verbs.h"
#include "config/config.h"
#include "fallback_proxy/control_client.h"

namespace cli {

namespace {

namespace po = boost::program_options;
using boost::json::object;

void describe(po::options_description_easy_init add) {
  add("control", po::value<std::string>()->default_value(config::Engine().control)->value_name("PATH"),
      "the control socket of the running service");
  add("pin", po::value<std::string>()->value_name("DIR"),
      "look at what is pinned there instead; so it is without a running service, too");
  add("json", po::bool_switch(), "print the status as JSON");
}

/// Nothing: no service runs.
std::expected<std::optional<object>, Failure> ask_service(const std::string& control) {
  auto client = userspace::ControlClient::connect(control);
  if (!client)
    return std::unexpected(Failure{.exit = exit_for(client.error().code), .message = client.error().message});
  if (!*client) return std::nullopt;
  auto status = (*client)->ask({{"request", "status"}});
  if (!status) return std::unexpected(Failure{.message = status.error().message});
  return std::move(*status);
}

std::expected<object, Failure> look_at_pins(const Plugin& plugin, const Given& given) {
  const auto handle = open_pins(plugin, given);
  if (!handle) return std::unexpected(handle.error());
  run::Status status;
  status.has_fast_path = true;
  status.pin = pin_of(given);
  status.canary = run_canary(plugin, handle->get());
  const auto services = see_services(plugin, handle->get());
  if (!services) return std::unexpected(services.error());
  for (const SeenService& service : *services) status.services.push_back(run::to_status(service));
  return run::to_json(status);
}

Outcome run(const Plugin& plugin, const Given& given) {
  std::optional<object> status;
  if (!given.options.contains("pin")) {
    auto answer = ask_service(given.options["control"].as<std::string>());
    if (!answer) return std::unexpected(answer.error());
    if (!*answer && !given.options["control"].defaulted()) return std::unexpected(nobody_listens(given));
    status = std::move(*answer);
  }
  if (!status) {
    auto found = look_at_pins(plugin, given);
    if (!found) return std::unexpected(found.error());
    status = std::move(*found);
  }
  try {
    if (given.options["json"].as<bool>())
      fmt::print("{}\n", boost::json::serialize(*status));
    else
      fmt::print("{}", run::to_text(*status, wants_colour(stdout)));
    const auto* canary = status->if_contains("canary");
    const bool has_failed = canary != nullptr && canary->is_object() && !canary->as_object().at("passed").as_bool();
    return has_failed ? Exit::failed : Exit::fine;
  } catch (const boost::system::system_error& error) {
    return std::unexpected(Failure{
        .message = fmt::format("the service has answered what this version does not understand: {}", error.what())});
  }
}

}  // namespace

std::string pin_of(const Given& given) {
  return given.options.contains("pin") ? given.options["pin"].as<std::string>() : default_pin();
}

std::expected<Handle, Failure> open_pins(const Plugin& plugin, const Given& given) {
  if (!plugin.library) return std::unexpected(Failure{.message = given.plugin_problem});
  const std::string pin = pin_of(given);
  const auto something = anything_pinned(pin);
  if (!given.options.contains("pin") && something && !*something) {
    return std::unexpected(
        Failure{.message = fmt::format("{}, and nothing is loaded at {}", nobody_listens(given).message, pin)});
  }
  return open_pinned(plugin, pin);
}

const Verb status_verb{.name = "status",
                       .usage = "[--control PATH | --pin DIR] [--json]",
                       .argument = {},
                       .summary = "show services, backends, engine and reason, counters, and what the canary saw",
                       .describe = describe,
                       .run = run,
                       .works_without_plugin = true};

}  // namespace cli
