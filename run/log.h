// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <string>
#include <string_view>

namespace run {

/// The levels of --log-level, for messages.
inline constexpr std::string_view log_levels = "debug, info, warning, error";

/// Sets the default logger: lines on stderr, or, when stderr is the journal's (systemd), entries of it with their
/// priority and no time of our own. False when `level` is none.
bool start_log(const std::string& name, std::string_view level);

}  // namespace run
