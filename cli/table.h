// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "cli/text.h"

namespace cli {

struct Cell {
  std::string text;
  Colour colour = Colour::none;
};

/// Rows of aligned columns, two blanks apart, without trailing blanks. Cells are made printable.
class Table {
 public:
  enum class Align : std::uint8_t { left, right };
  struct Column {
    std::string_view title;
    Align align = Align::left;
  };

  explicit Table(std::vector<Column> columns);

  /// One cell for each column.
  void add(std::vector<Cell> row);

  /// The title line, then a line for each row.
  [[nodiscard]] std::string render(bool colour) const;

 private:
  std::vector<Column> columns_;
  std::vector<std::size_t> widths_;
  std::vector<std::vector<Cell>> rows_;
};

}  // namespace cli
