// SPDX-License-Identifier: BSD-2-Clause
#include "config/nesting.h"

#include <algorithm>
#include <array>

namespace config {
namespace {

// From behind the opening quote to behind the closing one. A string that is not closed ends where the parser, too, sees
// the mistake: at the end of its line or of the text.
std::size_t skip_string(std::string_view text, std::size_t at, char quote) {
  const bool multi_line = text.substr(at, 2) == std::string_view{quote == '"' ? "\"\"" : "''"};
  if (multi_line) at += 2;
  for (; at < text.size(); ++at) {
    if (text[at] == '\\' && quote == '"') {
      ++at;
    } else if (text[at] == '\n' && !multi_line) {
      return at;
    } else if (text[at] == quote) {
      if (!multi_line) return at + 1;
      // Up to five quotes in a row end the string: its last two may be part of the text.
      const std::string_view head = text.substr(at, 5);
      const std::size_t run = std::min(head.find_first_not_of(quote), head.size());
      if (run >= 3) return at + run;
      at += run - 1;
    }
  }
  return text.size();
}

}  // namespace

std::optional<Position> find_deep_nesting(std::string_view text) {
  std::array<std::size_t, max_nesting + 1> dots{};  // per open bracket: dots of the key that stands before it
  std::size_t brackets = 0;
  std::size_t depth = 0;  // brackets, and dots of all keys that are open
  std::uint32_t line = 1;
  std::size_t line_start = text.starts_with("\xef\xbb\xbf") ? 3 : 0;

  for (std::size_t at = line_start; at < text.size();) {
    const char c = text[at];
    switch (c) {
      case '\n':
        ++line;
        line_start = at + 1;
        [[fallthrough]];
      case ',':
        depth -= dots[brackets];
        dots[brackets] = 0;
        break;
      case '#':
        at = std::min(text.find('\n', at), text.size());
        continue;
      case '"':
      case '\'': {
        const std::size_t end = skip_string(text, at + 1, c);
        for (; at < end; ++at) {
          if (text[at] != '\n') continue;
          ++line;
          line_start = at + 1;
        }
        continue;
      }
      case '.':
      case '[':
      case '{':
        if (++depth > max_nesting) {
          const auto is_start = [](char byte) { return (static_cast<unsigned char>(byte) & 0xc0) != 0x80; };
          const auto before = std::ranges::count_if(text.substr(line_start, at - line_start), is_start);
          return Position{line, static_cast<std::uint32_t>(before) + 1};
        }
        if (c == '.')
          ++dots[brackets];
        else
          dots[++brackets] = 0;
        break;
      case ']':
      case '}':
        if (brackets > 0) {
          depth -= dots[brackets] + 1;
          dots[brackets--] = 0;
        }
        break;
      default:
        break;
    }
    ++at;
  }
  return std::nullopt;
}

}  // namespace config
