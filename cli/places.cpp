// SPDX-License-Identifier: BSD-2-Clause
#include "cli/places.h"

#include <fmt/format.h>

#include <utility>

#include "cli/pinned.h"
#include "config/printable.h"
#include "config/read_config.h"
#include "config/values.h"

namespace cli {

namespace po = boost::program_options;

void describe_places(po::options_description_easy_init add) {
  add("config", po::value<std::string>()->value_name("FILE"),
      "look where this configuration says: [engine] control, pin");
  add("control", po::value<std::string>()->value_name("PATH"), "ask the daemon that listens at this control socket");
  add("pin", po::value<std::string>()->value_name("DIR"), "ask no daemon, look at what is pinned there");
}

std::expected<config::Engine, Failure> engine_of(const std::string& file) {
  const auto text = config::read_file(file);
  if (!text) return std::unexpected(Failure{.exit = Exit::configuration, .message = text.error().message});
  auto config = config::read_config(*text);
  if (config) return std::move(config->engine);
  const config::Mistake& first = config.error().front();
  return std::unexpected(Failure{
      .exit = Exit::configuration,
      .message = fmt::format("{}:{}:{}: {} (clusterip check shows every mistake; --pin DIR does without the file)",
                             file, first.position.line, first.position.column, first.message)});
}

std::expected<Places, Failure> places_of(const Given& given) {
  const auto& options = given.options;
  if (options.count("config") + options.count("control") + options.count("pin") > 1)
    return std::unexpected(Failure{.exit = Exit::usage, .message = "--config, --control, --pin: give one of them"});
  if (options.contains("control")) {
    auto path = config::parse_path(options["control"].as<std::string>(), config::max_socket_path);
    if (!path) return std::unexpected(Failure{.exit = Exit::usage, .message = "--control: expected " + path.error()});
    return Places{.control = std::move(*path), .pin = {}};
  }
  if (options.contains("pin")) return Places{.control = {}, .pin = options["pin"].as<std::string>()};
  const bool are_default = !options.contains("config");
  auto engine = are_default ? config::Engine() : engine_of(options["config"].as<std::string>());
  if (!engine) return std::unexpected(engine.error());
  return Places{.control = std::move(engine->control), .pin = std::move(engine->pin), .are_default = are_default};
}

std::expected<std::optional<userspace::ControlClient>, Failure> connect_to_daemon(const Places& places) {
  if (places.control.empty()) return std::nullopt;
  auto client = userspace::ControlClient::connect(places.control);
  if (!client)
    return std::unexpected(Failure{.exit = exit_for(client.error().code), .message = client.error().message});
  if (!*client && places.pin.empty()) return std::unexpected(Failure{.message = "nobody listens at " + places.control});
  return std::move(*client);
}

std::expected<Handle, Failure> open_pins(const Plugin& plugin, const Given& given, const Places& places) {
  if (!plugin.library) return std::unexpected(Failure{.message = given.plugin_problem});
  if (const auto something = anything_pinned(places.pin); !places.control.empty() && something && !*something) {
    return std::unexpected(
        Failure{.message = fmt::format("nobody listens at {}, and nothing is loaded at {}{}", places.control,
                                       places.pin, places.are_default ? " (--config FILE: look elsewhere)" : "")});
  }
  return open_pinned(plugin, places.pin);
}

}  // namespace cli
