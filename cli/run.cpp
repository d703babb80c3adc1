// SPDX-License-Identifier: BSD-2-Clause
#include <fmt/format.h>

#include <algorithm>
#include <string>

#include "cli/verbs.h"
#include "config/names.h"
#include "config/values.h"
#include "run/cluster.h"
#include "run/log.h"
#include "run/program.h"

namespace cli {

namespace {

namespace po = boost::program_options;

void describe(po::options_description_easy_init add) {
  add("config", po::value<std::string>()->required()->value_name("FILE"), "the configuration");
  add("engine", po::value<std::string>()->value_name("ENGINE"),
      "auto, bpf or userspace, instead of [engine] mode; bpf: fail rather than do without the fast path");
  add("control", po::value<std::string>()->value_name("PATH"), "the control socket (default: [engine] control)");
  add("log-level", po::value<std::string>()->default_value("info")->value_name("LEVEL"),
      fmt::format("{}", run::log_levels).c_str());
}

std::unexpected<Failure> misuse(std::string message) {
  return std::unexpected(Failure{.exit = Exit::usage, .message = "run: " + std::move(message)});
}

Outcome run_service(const Plugin& plugin, const Given& given) {
  run::Settings settings{.program = "clusterip",
                         .file = given.options["config"].as<std::string>(),
                         .engine = {},
                         .control = {},
                         .take_over = false,
                         .follow_cluster = run::follow_kubernetes};
  if (given.options.contains("engine")) {
    const auto& engine = given.options["engine"].as<std::string>();
    const auto* const name = std::ranges::find(config::engine_names, engine, &config::Name<config::EngineMode>::text);
    if (name == std::end(config::engine_names))
      return misuse(fmt::format("--engine: expected auto, bpf or userspace, got '{}'", engine));
    settings.engine = name->value;
  }
  if (given.options.contains("control")) {
    auto path = config::parse_path(given.options["control"].as<std::string>(), config::max_socket_path);
    if (!path) return misuse(fmt::format("--control: expected {}", path.error()));
    settings.control = std::move(*path);
  }
  const auto& level = given.options["log-level"].as<std::string>();
  if (!run::start_log("clusterip", level))
    return misuse(fmt::format("--log-level: expected one of {}, got '{}'", run::log_levels, level));
  return run::serve(settings, plugin.library ? &plugin : nullptr, given.plugin_problem);
}

}  // namespace

const Verb run_verb{.name = "run",
                    .usage = "--config FILE [--engine auto|bpf|userspace] [--control PATH] [--log-level LEVEL]",
                    .argument = {},
                    .summary = "serve: the fast path carries what it can, the userspace engine the rest",
                    .describe = describe,
                    .run = run_service,
                    .works_without_plugin = true};

}  // namespace cli
