// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <string>
#include <string_view>

namespace cli {

enum class Colour : std::uint8_t { none, red, yellow };

/// Number of code points: the width of what our names, addresses and messages are made of.
std::size_t width(std::string_view text);

/// `text` in colour.
std::string paint(std::string_view text, Colour colour);

/// Does this stream want colour: a terminal that is not dumb, and no NO_COLOR (no-color.org).
bool wants_colour(std::FILE* stream);

/// "1 service", "2 services".
std::string count(std::uint64_t number, std::string_view noun);

}  // namespace cli
