// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <cstddef>
#include <optional>
#include <string_view>

#include "config/config.h"

namespace config {

/// How deep tables, arrays and the parts of dotted keys may nest, all counted together; the schema needs five.
inline constexpr std::size_t max_nesting = 32;

/// Where `text` first nests deeper. The parser limits the depth of brackets, but not the parts of a key, and destroys
/// what it has built recursively: a key of 300,000 parts overflows the stack. So this looks before it parses.
std::optional<Position> find_deep_nesting(std::string_view text);

}  // namespace config
