// SPDX-License-Identifier: BSD-2-Clause
#include <fmt/format.h>

#include <algorithm>
#include <string>
#include <tuple>

#include "cli/pinned.h"
#include "cli/verbs.h"
#include "config/printable.h"
#include "config/read_config.h"
#include "fallback_proxy/control_client.h"

namespace cli {

namespace {

namespace po = boost::program_options;

void describe(po::options_description_easy_init add) {
  add("config", po::value<std::string>()->required()->value_name("FILE"), "the configuration");
  add("cgroup", po::value<std::string>()->value_name("DIR"),
      "attach to this cgroup (default: [engine] cgroup, else the root: all processes)");
  add("pin", po::value<std::string>()->value_name("DIR"), "pin to this directory (default: [engine] pin)");
}

/// The other verbs ask it first. It has other pins, or no fast path: with these it would own them, and load have
/// failed.
void warn_of_daemon(const std::string& control, const std::string& pin) {
  const auto daemon = userspace::ControlClient::connect(control);
  if (!daemon || !*daemon) return;
  fmt::print(stderr,
             "warning: a daemon that has nothing to do with this runs at {}: status, trace and resolve ask it, unless "
             "they are given --pin {}\n",
             config::printable(control), config::printable(pin));
}

Outcome run(const Plugin& plugin, const Given& given) {
  const auto& file = given.options["config"].as<std::string>();
  const auto text = config::read_file(file);
  if (!text) return std::unexpected(Failure{.exit = Exit::configuration, .message = text.error().message});
  auto config = read_text(*text, file);
  if (!config) return Exit::configuration;

  // The plugin applies the file; here it is read for what to tell the user, and no longer kept than for that: a large
  // one takes as much memory again.
  auto [cgroup, pin, control] = std::tuple(config->engine.cgroup, config->engine.pin, config->engine.control);
  const bool has_cluster = config->kubernetes.has_value();
  const bool has_health =
      std::ranges::any_of(config->services, [](const auto& service) { return service.health.has_value(); });
  config.reset();
  auto options = sized<clusterip_options>();
  options.flags = CLUSTERIP_ENGINE_TABLE;
  if (given.options.contains("cgroup")) {
    cgroup = given.options["cgroup"].as<std::string>();
    options.cgroup_path = cgroup.c_str();
  }
  if (given.options.contains("pin")) {
    pin = given.options["pin"].as<std::string>();
    options.pin_path = pin.c_str();
  }

  const auto handle = open_handle(plugin, options);
  if (!handle) return std::unexpected(handle.error());
  auto error = sized<clusterip_error>();
  // With the engine table, a path of the file is opened only now: its errors mean what they mean at open.
  if (plugin.load_text(handle->get(), text->data(), text->size(), file.c_str(), &error) < 0) {
    return std::unexpected(failure_of(error, Call::open));
  }
  if (plugin.attach(handle->get(), &error) < 0) return std::unexpected(failure_of(error));

  const Canary canary = run_canary(plugin, handle->get());
  if (!canary.passed) {
    return std::unexpected(
        Failure{.message = fmt::format("the canary failed: {}; the services stay loaded at {}", canary.message, pin)});
  }
  const auto services = see_services(plugin, handle->get());
  if (!services) return std::unexpected(services.error());
  fmt::print("loaded {}; attached to {}; pinned at {}; canary: {}\n", count_services(*services),
             cgroup.empty() ? "the root cgroup" : config::printable(cgroup), config::printable(pin), describe(canary));
  for (const SeenService& service : *services) {
    if (!service.reason.empty()) {
      fmt::print(stderr, "warning: service \"{}\": {}\n", config::printable(service.name),
                 config::printable(service.reason));
    }
  }
  if (has_cluster)
    fmt::print(stderr, "warning: services of Kubernetes are served only while a daemon runs (clusterip run)\n");
  if (has_health) fmt::print(stderr, "warning: health is checked only while a daemon runs (clusterip run)\n");
  warn_of_daemon(control, pin);
  return Exit::fine;
}

}  // namespace

const Verb load_verb{.name = "load",
                     .usage = "--config FILE [--cgroup DIR] [--pin DIR]",
                     .argument = {},
                     .summary = "attach and pin the fast path, prove it, and exit: it stays",
                     .describe = describe,
                     .run = run};

}  // namespace cli
