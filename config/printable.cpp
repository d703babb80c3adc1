// SPDX-License-Identifier: BSD-2-Clause
#include "config/printable.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <iterator>

namespace config {
namespace {

// The length of a well-formed UTF-8 sequence that begins with `lead`; 0: none does.
std::size_t sequence_length(unsigned char lead) {
  if (lead < 0x80) return 1;
  if (lead < 0xc2) return 0;
  if (lead < 0xe0) return 2;
  if (lead < 0xf0) return 3;
  return lead < 0xf5 ? 4 : 0;
}

bool is_visible(std::uint32_t code_point) {
  struct Range {
    std::uint32_t first, last;
  };
  static constexpr Range hidden[] = {
      {0x00, 0x1f},     {0x7f, 0x9f},       // controls
      {0x61c, 0x61c},   {0x200b, 0x200f},   // marks of direction, characters without width
      {0x2028, 0x202e}, {0x2060, 0x206f},   // line separators, overrides of direction
      {0xd800, 0xdfff}, {0xfeff, 0xfeff},   // surrogates, byte order mark
      {0xfff9, 0xfffb}, {0xe0000, 0xe0fff}  // annotations, tags
  };
  return std::ranges::none_of(hidden, [&](Range r) { return r.first <= code_point && code_point <= r.last; });
}

}  // namespace

Character take_character(std::string_view& text) {
  const auto lead = static_cast<unsigned char>(text.front());
  const std::size_t length = sequence_length(lead);
  std::uint32_t code_point = length < 2 ? lead : lead & (0x7fu >> length);
  bool valid = length != 0 && length <= text.size();
  for (std::size_t i = 1; valid && i < length; ++i) {
    const auto byte = static_cast<unsigned char>(text[i]);
    valid = (byte & 0xc0) == 0x80;
    code_point = code_point << 6 | (byte & 0x3f);
  }
  const Character character{text.substr(0, valid ? length : 1), valid && is_visible(code_point)};
  text.remove_prefix(character.bytes.size());
  return character;
}

std::string quoted(std::string_view text, std::size_t max_characters) {
  std::string result = "\"";
  for (std::size_t i = 0; i < max_characters && !text.empty(); ++i) {
    const auto [bytes, visible] = take_character(text);
    if (bytes == "\"" || bytes == "\\") result += '\\';
    if (visible) {
      result += bytes;
    } else {
      for (const char byte : bytes)
        fmt::format_to(std::back_inserter(result), "\\x{:02x}", static_cast<unsigned char>(byte));
    }
  }
  result += text.empty() ? "\"" : "\"...";
  return result;
}

std::string printable(std::string_view text) {
  std::string result;
  while (!text.empty()) {
    const auto [bytes, visible] = take_character(text);
    result += visible ? bytes : "?";
  }
  return result;
}

}  // namespace config
