// SPDX-License-Identifier: BSD-2-Clause
//
// How the command ends: an exit code and, when something failed, one line that says why.
#pragma once

#include <cstdint>
#include <expected>
#include <string>

namespace cli {

/// Exit codes, a contract: docs/cli.md.
enum class Exit : std::uint8_t { fine = 0, failed = 1, usage = 2, configuration = 3, unsupported = 4 };

struct Failure {
  Exit exit = Exit::failed;
  std::string message;  // one line, without the leading "clusterip: "
};

using Outcome = std::expected<Exit, Failure>;

/// Which call of the plugin an error comes from, where that decides about its meaning.
enum class Call : std::uint8_t { open, other };

/// The exit code for a negative errno of the plugin.
Exit exit_for(int error, Call call = Call::other);

}  // namespace cli
