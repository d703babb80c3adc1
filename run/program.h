// SPDX-License-Identifier: BSD-2-Clause
//
// The running service: what `clusterip run` and `fallback_proxy` have in common. It reads the configuration, lets the
// fast path carry what it can and the userspace engine the rest, checks health, reloads, and tells of itself.
#pragma once

#include <optional>
#include <string>

#include "cli/outcome.h"
#include "cli/plugin.h"
#include "config/config.h"
#include "run/cluster.h"

namespace run {

struct Settings {
  std::string program;                       // "clusterip", "fallback_proxy": how it calls itself
  std::string file;                          // the configuration
  std::optional<config::EngineMode> engine;  // instead of [engine] mode
  std::optional<std::string> control;        // the socket, instead of [engine] control
  bool take_over = false;                    // replace the process at the control socket; without a fast path only
  FollowCluster follow_cluster = nullptr;    // null: it follows none, and refuses [kubernetes]
};

/// Serves until a signal ends it. `plugin` null: there is no fast path, for the reason `no_plugin`, or, without one,
/// since the program has none. Logs; a failure is what kept it from serving.
cli::Outcome serve(const Settings& settings, const cli::Plugin* plugin, const std::string& no_plugin);

/// [engine] control of the configuration; logs its mistakes.
std::optional<std::string> control_path(const std::string& file);

}  // namespace run
