// SPDX-License-Identifier: BSD-2-Clause
#include <fmt/format.h>

#include <filesystem>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "cli/pinned.h"
#include "cli/places.h"
#include "cli/verbs.h"
#include "config/printable.h"
#include "config/read_config.h"
#include "fallback_proxy/local_vips.h"

namespace cli {

namespace {

namespace po = boost::program_options;

void describe(po::options_description_easy_init add) {
  add("config", po::value<std::string>()->value_name("FILE"), "what is pinned where this configuration says");
  add("pin", po::value<std::string>()->value_name("DIR"),
      fmt::format("what is pinned there (default: {})", config::Engine().pin).c_str());
  add("on-exit", po::value<std::string>()->value_name("FILE"),
      "behind a service that has ended: unload only if FILE says on_exit = \"detach\"; remove the local routes that a "
      "killed one has left");
}

/// `elsewhere` says how to name another place.
Outcome unload(const Plugin& plugin, const std::string& pin, std::string_view elsewhere = "") {
  const auto something = anything_pinned(pin);
  if (!something) return std::unexpected(something.error());
  if (!*something) {
    fmt::print("nothing is loaded at {}{}\n", config::printable(pin), elsewhere);
    return Exit::fine;
  }

  const auto handle = open_pinned(plugin, pin);
  if (!handle) return std::unexpected(handle.error());
  // Only for the message: what cannot be listed is removed all the same.
  const auto services = see_services(plugin, handle->get());
  auto error = sized<clusterip_error>();
  if (plugin.detach(handle->get(), &error) < 0) return std::unexpected(failure_of(error));
  const std::string what = services ? count_services(*services) : "the fast path";
  std::error_code unknown;
  if (std::filesystem::exists(pin, unknown)) {
    fmt::print("unloaded {}; detached; {} stays, with what somebody else has put there\n", what,
               config::printable(pin));
  } else {
    fmt::print("unloaded {}; detached and removed {}\n", what, config::printable(pin));
  }
  return Exit::fine;
}

/// Local routes of a userspace engine that was killed. One that runs has locked them: nothing is done.
void remove_routes() {
  auto vips = userspace::LocalVips::open();
  if (vips && vips->warning().empty()) (void)vips->reconcile({});
}

/// What a userspace engine that was killed has served is nobody's now: a connect to it would leave the host.
void refuse_left_out(const Plugin& plugin, const std::string& pin) {
  if (const auto something = anything_pinned(pin); something && !*something) return;
  auto error = sized<clusterip_error>();
  const auto handle = open_pinned(plugin, pin);
  if (handle && plugin.refuse_left_out(handle->get(), &error) == 0) return;
  fmt::print(stderr, "warning: connects to what the userspace engine has served may leave this machine: {}\n",
             config::printable(handle ? static_cast<const char*>(error.message) : handle.error().message));
}

/// Never a failure for want of a good file: then the fast path stays.
Outcome act_on_exit(const Plugin& plugin, const std::string& file) {
  const auto text = config::read_file(file);
  const auto config = text ? config::read_config(*text) : std::unexpected(std::vector<config::Mistake>());
  if (!config) {
    // The routes as well: they have connects to what the userspace engine has served refused.
    fmt::print("{} is missing or not valid: the fast path and local routes stay as they are\n",
               config::printable(file));
    return Exit::fine;
  }
  if (config->engine.on_exit == config::OnExit::keep) refuse_left_out(plugin, config->engine.pin);
  remove_routes();
  if (config->engine.on_exit == config::OnExit::keep) {
    fmt::print("on_exit is \"keep\": the fast path stays as it is\n");
    return Exit::fine;
  }
  return unload(plugin, config->engine.pin);
}

Outcome run(const Plugin& plugin, const Given& given) {
  const auto& options = given.options;
  if (options.count("config") + options.count("pin") + options.count("on-exit") > 1)
    return std::unexpected(Failure{.exit = Exit::usage, .message = "--config, --pin, --on-exit: give one of them"});
  if (options.contains("on-exit")) return act_on_exit(plugin, options["on-exit"].as<std::string>());
  if (options.contains("pin")) return unload(plugin, options["pin"].as<std::string>());
  if (!options.contains("config")) return unload(plugin, config::Engine().pin, " (--config FILE: look elsewhere)");
  const auto engine = engine_of(options["config"].as<std::string>());
  return engine ? unload(plugin, engine->pin) : std::unexpected(engine.error());
}

}  // namespace

const Verb unload_verb{.name = "unload",
                       .usage = "[--config FILE | --pin DIR | --on-exit FILE]",
                       .argument = {},
                       .summary = "detach and unpin the fast path, all of it",
                       .describe = describe,
                       .run = run};

}  // namespace cli
