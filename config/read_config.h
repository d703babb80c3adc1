// SPDX-License-Identifier: BSD-2-Clause
//
// From the TOML text to the plain model.
#pragma once

#include <sys/stat.h>

#include <expected>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "config/config.h"
#include "config/result.h"

namespace config {

/// One mistake in a configuration. `message` reads "key: what was expected, got what".
struct Mistake {
  Position position;
  std::string message;
};

/// Files larger than this are refused before they are parsed.
inline constexpr std::size_t max_text_size = std::size_t{256} * 1024 * 1024;

/// Parse and validate `text`. Of a syntax error the parser tells the first; of mistakes of meaning, all are returned,
/// in the order of the text (after 100, a last one without a position says how many more there are). Pure, may be
/// called from any thread.
std::expected<Config, std::vector<Mistake>> read_config(std::string_view text);

/// What is wrong with one service's backends when they come from elsewhere than a file (clusterip_set_backends): the
/// same rules, without positions. Costs what the list is long; that no backend is some service's VIP is the caller's to
/// check.
std::vector<Mistake> check_backends(const Service& service, std::span<const Backend> backends);

/// Read the whole file: a regular one, or a pipe that somebody writes to, with some seconds of patience. The error's
/// message names the path and the reason. `status`, where it is given, becomes that of the very file that was read.
Result<std::string> read_file(const std::string& path, struct stat* status = nullptr);

/// "file:line:column: message", then the line of `text` and a caret under the column: how compilers show a mistake.
/// Lines are cut to 120 columns and shown without control characters. No newline at the end.
std::string render(const Mistake& mistake, std::string_view text, std::string_view name);

}  // namespace config
