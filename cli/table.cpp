// SPDX-License-Identifier: BSD-2-Clause
#include "cli/table.h"

#include <algorithm>
#include <cassert>
#include <utility>

#include "config/printable.h"

namespace cli {

Table::Table(std::vector<Column> columns) : columns_(std::move(columns)) {
  for (const Column& column : columns_) widths_.push_back(width(column.title));
}

void Table::add(std::vector<Cell> row) {
  assert(row.size() == columns_.size());
  for (std::size_t i = 0; i < row.size(); ++i) {
    row[i].text = config::printable(row[i].text);
    widths_[i] = std::max(widths_[i], width(row[i].text));
  }
  rows_.push_back(std::move(row));
}

std::string Table::render(bool colour) const {
  std::string out;
  std::size_t blanks = 0;  // owed before the next text, so that a line never ends in them
  const auto put = [&](std::size_t column, std::string_view text, Colour with) {
    const std::size_t padding = widths_[column] - width(text);
    const bool right = columns_[column].align == Align::right;
    if (right) blanks += padding;
    if (!text.empty()) {
      out.append(blanks, ' ').append(colour ? paint(text, with) : std::string(text));
      blanks = 0;
    }
    if (!right) blanks += padding;
    blanks += 2;
  };
  const auto end_line = [&] {
    out += '\n';
    blanks = 0;
  };

  for (std::size_t i = 0; i < columns_.size(); ++i) put(i, columns_[i].title, Colour::none);
  end_line();
  for (const auto& row : rows_) {
    for (std::size_t i = 0; i < row.size(); ++i) put(i, row[i].text, row[i].colour);
    end_line();
  }
  return out;
}

}  // namespace cli
