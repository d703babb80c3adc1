// SPDX-License-Identifier: BSD-2-Clause
#include <fmt/format.h>

#include <string>

#include "cli/pinned.h"
#include "cli/verbs.h"
#include "config/printable.h"

namespace cli {

namespace {

namespace po = boost::program_options;

void describe(po::options_description_easy_init add) {
  add("pin", po::value<std::string>()->default_value(default_pin())->value_name("DIR"),
      "where the fast path is pinned");
}

Outcome run(const Plugin& plugin, const Given& given) {
  const auto& pin = given.options["pin"].as<std::string>();
  const auto something = anything_pinned(pin);
  if (!something) return std::unexpected(something.error());
  if (!*something) {
    fmt::print("nothing is loaded at {}\n", config::printable(pin));
    return Exit::fine;
  }

  const auto handle = open_pinned(plugin, pin);
  if (!handle) return std::unexpected(handle.error());
  // Only for the message: what cannot be listed is removed all the same.
  const auto services = see_services(plugin, handle->get());
  auto error = sized<clusterip_error>();
  if (plugin.detach(handle->get(), &error) < 0) return std::unexpected(failure_of(error));
  fmt::print("unloaded {}; detached and removed {}\n", services ? count_services(*services) : "the fast path",
             config::printable(pin));
  return Exit::fine;
}

}  // namespace

const Verb unload_verb{.name = "unload",
                       .usage = "[--pin DIR]",
                       .argument = {},
                       .summary = "detach and unpin the fast path, all of it",
                       .describe = describe,
                       .run = run};

}  // namespace cli
