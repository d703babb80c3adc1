// SPDX-License-Identifier: BSD-2-Clause
#include "config/did_you_mean.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

namespace config {
namespace {

constexpr std::size_t longest_word = 32;

char folded(char c) {
  if (c == '-') return '_';
  return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
}

// How many letters must be changed, added, left out or exchanged with their neighbour (optimal string alignment).
std::size_t distance(std::string_view a, std::string_view b) {
  std::array<std::array<std::size_t, longest_word + 1>, longest_word + 1> cost;
  for (std::size_t i = 0; i <= a.size(); ++i) {
    for (std::size_t j = 0; j <= b.size(); ++j) {
      if (i == 0 || j == 0) {
        cost[i][j] = i + j;
        continue;
      }
      const bool same = folded(a[i - 1]) == folded(b[j - 1]);
      cost[i][j] = std::min({cost[i - 1][j] + 1, cost[i][j - 1] + 1, cost[i - 1][j - 1] + (same ? 0 : 1)});
      if (i > 1 && j > 1 && folded(a[i - 1]) == folded(b[j - 2]) && folded(a[i - 2]) == folded(b[j - 1]))
        cost[i][j] = std::min(cost[i][j], cost[i - 2][j - 2] + 1);
    }
  }
  return cost[a.size()][b.size()];
}

// "addr" for "address". It counts as one letter that is wrong.
bool is_prefix(std::string_view word, std::string_view candidate) {
  return word.size() >= 3 && (candidate.starts_with(word) || word.starts_with(candidate));
}

}  // namespace

std::string did_you_mean(std::string_view word, std::span<const std::string_view> words) {
  std::string_view best;
  std::size_t least = std::max<std::size_t>(1, (word.size() + 1) / 3) + 1;
  for (const std::string_view candidate : words) {
    if (word.size() > longest_word || candidate.size() > longest_word) continue;
    const std::size_t d = is_prefix(word, candidate) ? 1 : distance(word, candidate);
    if (d < least && d < std::max(word.size(), candidate.size())) {
      least = d;
      best = candidate;
    }
  }
  return best.empty() ? "" : fmt::format(", did you mean \"{}\"?", best);
}

}  // namespace config
