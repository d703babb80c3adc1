// SPDX-License-Identifier: BSD-2-Clause
//
// What an application may observe, row by row. docs/engines.md shows the same rows; a test compares.
#pragma once

#include <ostream>
#include <span>
#include <string>

#include "tests/parity/stage.h"

namespace parity {

struct Row {
  const char* name;  // of the test
  const char* what;  // happens; Markdown
  /// What the application sees: on either engine, or, when `userspace` is not empty, on the fast path.
  const char* seen;
  const char* userspace;
  /// Why the engines differ here. Empty when they do not.
  const char* reason;
  void (*check)(Stage&);

  bool differs() const { return *userspace != '\0'; }
};

inline std::ostream& operator<<(std::ostream& out, const Row& row) { return out << row.name; }

std::span<const Row> rows();

/// Both tables of docs/engines.md.
std::string same_rows_as_markdown();
std::string differing_rows_as_markdown();

}  // namespace parity
