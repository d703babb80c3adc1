// SPDX-License-Identifier: BSD-2-Clause
//
// What `clusterip` can do: one table, one file for each verb.
#pragma once

#include <boost/program_options/options_description.hpp>
#include <boost/program_options/variables_map.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "cli/outcome.h"
#include "cli/plugin.h"
#include "config/config.h"

namespace cli {

/// What a verb was called with.
struct Given {
  const boost::program_options::variables_map& options;
  std::string argument;        // the one argument that is no option; empty for verbs without one
  std::string plugin_problem;  // why there is no plugin, for verbs that work without
};

struct Verb {
  std::string_view name;
  std::string_view usage;     // what stands after the name
  std::string_view argument;  // what the one argument that is no option stands for; empty: the verb has none
  std::string_view summary;
  void (*describe)(boost::program_options::options_description_easy_init add);  // null: no options of its own
  Outcome (*run)(const Plugin& plugin, const Given& given);
  bool works_without_plugin = false;  // then `plugin.library` may be null
};

extern const Verb check_verb, probe_verb, load_verb, unload_verb, run_verb, status_verb, trace_verb, resolve_verb;

/// What `text` says, with each warning shown on stderr. Nothing: it has mistakes, and each was shown there.
std::optional<config::Config> read_text(std::string_view text, const std::string& name);

}  // namespace cli
