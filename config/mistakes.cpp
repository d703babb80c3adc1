// SPDX-License-Identifier: BSD-2-Clause
#include "config/mistakes.h"

#include <fmt/format.h>

#include <algorithm>
#include <tuple>
#include <utility>

namespace config {

bool Mistakes::is_before(const Entry& a, const Entry& b) {
  return std::tie(a.mistake.position.line, a.mistake.position.column, a.order) <
         std::tie(b.mistake.position.line, b.mistake.position.column, b.order);
}

void Mistakes::add(Position position, std::string_view key, std::string_view what) {
  ++count_;
  first_.push_back({{position, fmt::format("{}: {}", key, what)}, count_});
  std::ranges::push_heap(first_, is_before);
  if (first_.size() > max_shown_mistakes) {
    std::ranges::pop_heap(first_, is_before);
    first_.pop_back();
  }
}

std::vector<Mistake> Mistakes::take() {
  std::ranges::sort_heap(first_, is_before);
  std::vector<Mistake> result;
  result.reserve(first_.size() + 1);
  for (Entry& entry : first_) result.push_back(std::move(entry.mistake));
  if (count_ > result.size()) result.push_back({{}, fmt::format("and {} more", count_ - result.size())});
  return result;
}

}  // namespace config
