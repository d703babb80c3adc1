// SPDX-License-Identifier: BSD-2-Clause
#include <fmt/format.h>

#include <array>
#include <boost/json.hpp>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cli/verbs.h"
#include "config/printable.h"
#include "config/read_config.h"

namespace cli {

namespace {

namespace po = boost::program_options;

void describe(po::options_description_easy_init add) { add("json", po::bool_switch(), "print the result as JSON"); }

std::expected<std::string, Failure> read_standard_input() {
  std::string text;
  std::array<char, 65536> chunk{};
  while (text.size() <= config::max_text_size) {
    const std::size_t length = std::fread(chunk.data(), 1, chunk.size(), stdin);
    text.append(chunk.data(), length);
    if (length < chunk.size()) break;
  }
  if (std::ferror(stdin) != 0) {
    return std::unexpected(
        Failure{.exit = Exit::configuration, .message = fmt::format("standard input: {}", std::strerror(errno))});
  }
  return text;
}

std::vector<config::Mistake> mistakes_in(const Plugin& plugin, std::string_view text, const std::string& name) {
  std::vector<config::Mistake> mistakes;
  const auto keep = [](const clusterip_error* mistake, void* user) noexcept {
    static_cast<std::vector<config::Mistake>*>(user)->push_back(
        {.position = {.line = mistake->line, .column = mistake->column},
         .message = static_cast<const char*>(mistake->message)});
  };
  const int status = plugin.check_text(text.data(), text.size(), name.c_str(), keep, &mistakes);
  // A refusal without a visit must not pass for validity.
  if (status != 0 && mistakes.empty()) mistakes.push_back({.position = {}, .message = std::strerror(-status)});
  return mistakes;
}

std::vector<std::string> warnings_about(const config::Config& config, const std::string& name) {
  std::vector<std::string> warnings;
  for (const auto& service : config.services) {
    const auto warn = [&](std::string_view key, std::string_view what) {
      warnings.push_back(fmt::format("{}:{}:{}: warning: service \"{}\": {}: {}", config::printable(name),
                                     service.position.line, service.position.column, config::printable(service.name),
                                     key, what));
    };
    if (service.mark != 0)
      warn("mark",
           "what a rule for this mark keeps from a sidecar also bypasses its mTLS, authorization and telemetry");
    if (const std::string vip = service.vip.to_string(); vip == "127.0.0.1" || vip == "::1")
      warn("vip", "connects to every other port of it are refused, those to local servers included");
    const bool is_proxied = config.engine.mode == config::EngineMode::userspace ||
                            service.engine == config::EngineMode::userspace ||
                            service.proxy_protocol != config::ProxyProtocol::none;
    if (is_proxied && service.no_backend != config::NoBackend::refuse)
      warn("no_backend", "the userspace engine refuses, whatever this says");
  }
  return warnings;
}

void show(const std::vector<config::Mistake>& mistakes, std::string_view text, const std::string& name) {
  for (const config::Mistake& mistake : mistakes) {
    std::string shown = config::render(mistake, text, name);
    if (!shown.ends_with('\n')) shown += '\n';
    fmt::print(stderr, "{}", shown);
  }
}

boost::json::object to_json(const std::vector<config::Mistake>& mistakes, const std::vector<std::string>& warnings,
                            const std::string& name) {
  boost::json::array list;
  for (const config::Mistake& mistake : mistakes) {
    list.push_back({{"line", mistake.position.line},
                    {"column", mistake.position.column},
                    {"message", config::printable(mistake.message)}});
  }
  return {{"file", config::printable(name)},
          {"valid", mistakes.empty()},
          {"mistakes", std::move(list)},
          {"warnings", boost::json::value_from(warnings)}};
}

Outcome run(const Plugin& plugin, const Given& given) {
  const bool standard_input = given.argument == "-";
  const std::string name = standard_input ? "<stdin>" : given.argument;
  std::string text;
  if (standard_input) {
    auto read = read_standard_input();
    if (!read) return std::unexpected(read.error());
    text = std::move(*read);
  } else {
    auto read = config::read_file(given.argument);
    if (!read) return std::unexpected(Failure{.exit = Exit::configuration, .message = read.error().message});
    text = std::move(*read);
  }

  const auto mistakes = mistakes_in(plugin, text, name);
  const auto config = config::read_config(text);
  const auto warnings = config ? warnings_about(*config, name) : std::vector<std::string>();
  if (given.options["json"].as<bool>()) {
    fmt::print("{}\n", boost::json::serialize(to_json(mistakes, warnings, name)));
  } else if (mistakes.empty()) {
    for (const std::string& warning : warnings) fmt::print(stderr, "{}\n", warning);
    fmt::print("{}: valid\n", config::printable(name));
  } else {
    show(mistakes, text, name);
  }
  return mistakes.empty() ? Exit::fine : Exit::configuration;
}

}  // namespace

std::optional<config::Config> read_text(std::string_view text, const std::string& name) {
  auto config = config::read_config(text);
  if (!config) {
    show(config.error(), text, name);
    return {};
  }
  for (const std::string& warning : warnings_about(*config, name)) fmt::print(stderr, "{}\n", warning);
  return std::move(*config);
}

const Verb check_verb{.name = "check",
                      .usage = "FILE [--json]",
                      .argument = "FILE",
                      .summary = "show every mistake of a configuration; '-' reads standard input",
                      .describe = describe,
                      .run = run};

}  // namespace cli
