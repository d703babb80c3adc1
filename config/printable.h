// SPDX-License-Identifier: BSD-2-Clause
//
// Text from a file must not steer the terminal that a message is shown on.
#pragma once

#include <string>
#include <string_view>

namespace config {

/// One character of UTF-8 text. Not `visible`: a control character, one that changes the direction of writing or takes
/// no room, or a byte that is no UTF-8.
struct Character {
  std::string_view bytes;
  bool visible;
};

/// Take the first character off `text`, which must not be empty.
Character take_character(std::string_view& text);

/// `text` in double quotes, what is not visible as \xNN, cut after `max_characters`.
std::string quoted(std::string_view text, std::size_t max_characters = 60);

/// `text` with '?' for each character that is not visible.
std::string printable(std::string_view text);

}  // namespace config
