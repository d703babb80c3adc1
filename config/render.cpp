// SPDX-License-Identifier: BSD-2-Clause
#include <fmt/format.h>

#include <algorithm>
#include <vector>

#include "config/printable.h"
#include "config/read_config.h"

namespace config {
namespace {

constexpr std::size_t max_columns = 120;
constexpr std::string_view ellipsis = "...";

// Line `number` (from 1) without its end; empty when there is none.
std::string_view find_line(std::string_view text, std::uint32_t number) {
  if (text.starts_with("\xef\xbb\xbf")) text.remove_prefix(3);
  for (; number > 1; --number) {
    const std::size_t end = text.find('\n');
    if (end == std::string_view::npos) return "";
    text.remove_prefix(end + 1);
  }
  text = text.substr(0, text.find('\n'));
  if (text.ends_with('\r')) text.remove_suffix(1);
  return text;
}

// What of a very long line can come near character `at`, which is moved along. Whatever is cut off would not be shown.
std::string_view shorten(std::string_view line, std::size_t& at) {
  constexpr std::size_t near = 2 * max_columns;
  constexpr std::size_t longest = 8 * near;  // in bytes: room for the longest characters
  if (line.size() <= longest) return line;
  std::size_t start = 0;
  for (; at > near && start < line.size(); --at) {
    do ++start;
    while (start < line.size() && (static_cast<unsigned char>(line[start]) & 0xc0) == 0x80);
  }
  return line.substr(start, longest);
}

// One element per character, as it is shown.
std::vector<std::string_view> split(std::string_view line) {
  std::vector<std::string_view> characters;
  while (!line.empty()) {
    const auto [bytes, visible] = take_character(line);
    characters.push_back(visible || bytes == "\t" ? bytes : "?");
  }
  return characters;
}

std::string join(auto first, auto last) {
  std::string result;
  for (; first != last; ++first) result += *first;
  return result;
}

std::string blank(std::string_view character) { return character == "\t" ? "\t" : " "; }

// The line and, below it, the caret under character `at` (from 0). Tabs are kept and repeated below, so that the caret
// stands right however wide the terminal shows them, unless the line must be cut.
std::string excerpt(std::vector<std::string_view> line, std::size_t at) {
  std::string caret;
  const auto tabs = static_cast<std::size_t>(std::ranges::count(line, "\t"));
  if (line.size() + 7 * tabs <= max_columns) {
    for (std::size_t i = 0; i < at; ++i) caret += blank(line[i]);
    return fmt::format("{}\n{}^", join(line.begin(), line.end()), caret);
  }
  std::ranges::replace(line, "\t", " ");
  const std::size_t room = max_columns - 2 * ellipsis.size();
  const std::size_t start = std::min(at - std::min(at, room / 2), line.size() - std::min(line.size(), room));
  const std::size_t end = std::min(start + room, line.size());
  const auto begin = line.begin();
  return fmt::format("{}{}{}\n{:>{}}", start > 0 ? ellipsis : "",
                     join(begin + static_cast<std::ptrdiff_t>(start), begin + static_cast<std::ptrdiff_t>(end)),
                     end < line.size() ? ellipsis : "", '^', at - start + (start > 0 ? ellipsis.size() : 0) + 1);
}

}  // namespace

std::string render(const Mistake& mistake, std::string_view text, std::string_view name) {
  const auto [line, column] = mistake.position;
  if (line == 0) return fmt::format("{}: {}", printable(name), mistake.message);
  std::string head = fmt::format("{}:{}:{}: {}", printable(name), line, column, mistake.message);
  std::size_t at = column - std::min(column, 1u);
  const auto characters = split(shorten(find_line(text, line), at));
  if (characters.empty()) return head;
  return fmt::format("{}\n{}", head, excerpt(characters, std::min(at, characters.size())));
}

}  // namespace config
