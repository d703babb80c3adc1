// SPDX-License-Identifier: BSD-2-Clause
//
// clusterip: load, inspect and remove the fast path. See docs/cli.md.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <boost/program_options.hpp>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <exception>
#include <iostream>
#include <iterator>
#include <new>
#include <span>
#include <string>
#include <vector>

#include "cli/outcome.h"
#include "cli/plugin.h"
#include "cli/verbs.h"
#include "config/printable.h"

namespace po = boost::program_options;

namespace cli {
namespace {

constexpr std::array verbs{&run_verb,    &check_verb,  &probe_verb, &load_verb,
                           &unload_verb, &status_verb, &trace_verb, &resolve_verb};

// Options spelt in full: an abbreviation that works today would be ambiguous after the next option.
constexpr int option_style = po::command_line_style::unix_style & ~po::command_line_style::allow_guessing;

void describe_common(po::options_description& options) {
  options.add_options()("plugin", po::value<std::string>()->value_name("PATH"),
                        "the plugin to load (default: found next to this command)")("help,h", "show this text");
}

po::options_description describe_global() {
  po::options_description options("Options", 100);
  describe_common(options);
  options.add_options()("version", "show the versions of the command and of the plugin");
  return options;
}

Failure usage_failure(std::string_view message) {
  return {.exit = Exit::usage, .message = fmt::format("{} (see clusterip --help)", message)};
}

Failure usage_failure(const Verb& verb, std::string_view message) {
  return {.exit = Exit::usage,
          .message = fmt::format("{}: {} (usage: clusterip {} {})", verb.name, message, verb.name, verb.usage)};
}

template <class Value>
Value value_or_default(const po::variables_map& options, const char* name) {
  return options.contains(name) ? options[name].as<Value>() : Value{};
}

Outcome show_help() {
  fmt::print("Usage: clusterip [OPTION...] VERB [ARGUMENT...]\n\nVerbs:\n");
  for (const Verb* verb : verbs) fmt::print("  {:<7}  {}\n", verb->name, verb->summary);
  std::cout << '\n' << describe_global();
  fmt::print(
      "\nclusterip VERB --help has the options of a verb. Exit: 0 fine, 1 failed, 2 usage, 3 configuration,\n"
      "4 this kernel or these privileges cannot.\n");
  return Exit::fine;
}

Outcome show_version(const std::string& plugin_path) {
  fmt::print("clusterip {}\n", CLUSTERIP_VERSION);
  const auto plugin = load_plugin(plugin_path);
  if (!plugin) return std::unexpected(plugin.error());
  const std::uint32_t abi = plugin->abi_version();
  fmt::print("libclusterip {}, ABI {}.{}, {}\n", plugin->version_string(), abi >> 16U, abi & 0xffffU, plugin->path);
  return Exit::fine;
}

Outcome run_verb(const Verb& verb, std::span<const std::string> words) {
  po::options_description options("Options", 100);
  if (verb.describe != nullptr) verb.describe(options.add_options());
  describe_common(options);

  po::variables_map given;
  std::vector<std::string> arguments;
  try {
    const auto parsed = po::command_line_parser(std::vector<std::string>(words.begin(), words.end()))
                            .options(options)
                            .style(option_style)
                            .run();
    po::store(parsed, given);
    arguments = po::collect_unrecognized(parsed.options, po::include_positional);
    if (given.contains("help")) {
      fmt::print("Usage: clusterip {} {}\n\n{}\n\n", verb.name, verb.usage, verb.summary);
      std::cout << options;
      return Exit::fine;
    }
    po::notify(given);
    for (const auto& [name, value] : given) {
      const auto* text = boost::any_cast<std::string>(&value.value());
      // What an unset shell variable leaves. For --cgroup, taking it for "none" would mean the whole machine.
      if (text != nullptr && text->empty()) {
        return std::unexpected(usage_failure(verb, fmt::format("--{} is empty", name)));
      }
    }
  } catch (const po::error& error) {
    return std::unexpected(usage_failure(verb, error.what()));
  }
  const std::size_t wanted = verb.argument.empty() ? 0 : 1;
  if (arguments.size() < wanted) {
    return std::unexpected(usage_failure(verb, fmt::format("{} is missing", verb.argument)));
  }
  if (arguments.size() > wanted) {
    return std::unexpected(usage_failure(verb, fmt::format("unexpected argument '{}'", arguments[wanted])));
  }

  const auto plugin = load_plugin(value_or_default<std::string>(given, "plugin"));
  if (!plugin && !verb.works_without_plugin) return std::unexpected(plugin.error());
  const Plugin none;
  return verb.run(plugin ? *plugin : none, {.options = given,
                                            .argument = wanted == 0 ? std::string() : arguments.front(),
                                            .plugin_problem = plugin ? std::string() : plugin.error().message});
}

Outcome run(std::span<const std::string> words) {
  // Options of the command itself stand before the verb.
  std::size_t own = 0;
  while (own < words.size() && words[own].starts_with('-')) own += words[own] == "--plugin" ? 2 : 1;
  own = std::min(own, words.size());

  po::variables_map given;
  try {
    po::store(po::command_line_parser(std::vector<std::string>(words.begin(), words.begin() + static_cast<long>(own)))
                  .options(describe_global())
                  .style(option_style)
                  .run(),
              given);
  } catch (const po::error& error) {
    return std::unexpected(usage_failure(error.what()));
  }
  if (given.contains("help") || (own < words.size() && words[own] == "help")) return show_help();
  if (given.contains("version")) return show_version(value_or_default<std::string>(given, "plugin"));

  if (own == words.size()) return std::unexpected(usage_failure("a verb is missing"));
  const auto* const verb = std::ranges::find(verbs, words[own], [](const Verb* candidate) { return candidate->name; });
  if (verb == verbs.end()) {
    return std::unexpected(usage_failure(fmt::format("unknown verb '{}'", words[own])));
  }
  std::vector<std::string> rest(words.begin() + static_cast<long>(own) + 1, words.end());
  if (given.contains("plugin")) rest.insert(rest.begin(), {"--plugin", given["plugin"].as<std::string>()});
  return run_verb(**verb, rest);
}

int finish(const Outcome& outcome) {
  // A full disk or a closed pipe must not look like success.
  std::cout.flush();
  if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0 || !std::cout) {
    fmt::print(stderr, "clusterip: standard output: {}\n", std::strerror(errno));
    return static_cast<int>(Exit::failed);
  }
  if (outcome) return static_cast<int>(*outcome);
  fmt::print(stderr, "clusterip: {}\n", config::printable(outcome.error().message));
  return static_cast<int>(outcome.error().exit);
}

}  // namespace
}  // namespace cli

int main(int argc, char** argv) {
  try {
    const std::vector<std::string> words(argv + std::min(argc, 1), argv + argc);
    return cli::finish(cli::run(words));
  } catch (const std::bad_alloc&) {
    std::fputs("clusterip: not enough memory\n", stderr);
    return static_cast<int>(cli::Exit::failed);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "clusterip: %s\n", error.what());
    return static_cast<int>(cli::Exit::failed);
  }
}
