// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "config/read_config.h"

namespace config {

/// The first `max_shown_mistakes` by position; of the others, how many there are.
inline constexpr std::size_t max_shown_mistakes = 100;

class Mistakes {
 public:
  void add(Position position, std::string_view key, std::string_view what);
  [[nodiscard]] std::size_t count() const { return count_; }

  /// In the order of the text; what was left out is one last line without a position.
  std::vector<Mistake> take();

 private:
  struct Entry {
    Mistake mistake;
    std::size_t order;  // of mistakes at one position, the first to be added comes first
  };
  static bool is_before(const Entry& a, const Entry& b);

  std::vector<Entry> first_;  // a heap, the last by position on top
  std::size_t count_ = 0;
};

}  // namespace config
