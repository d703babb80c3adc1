// SPDX-License-Identifier: BSD-2-Clause
#include "kubernetes/splitter.h"

#include <utility>

namespace kubernetes {

void Splitter::keep(std::string_view text) {
  if (!is_in_object_) {
    if (envelope_.size() + text.size() <= max_envelope) envelope_.append(text);
    if (is_in_string_ && depth_ == 1 && key_.size() <= max_envelope) key_.append(text);
    return;
  }
  if (is_too_large_) return;
  if (object_.size() + text.size() <= max_object) {
    object_.append(text);
    return;
  }
  is_too_large_ = true;
  object_.resize(beginning);
  object_.shrink_to_fit();
}

void Splitter::end_object() {
  is_in_object_ = false;
  visit_(object_, !is_too_large_);
  object_.clear();
  is_too_large_ = false;
}

/// Outside strings.
bool Splitter::take(char c) {
  const int object_depth = form_ == Form::values ? 0 : 2;
  switch (c) {
    case '{':
    case '[':
      if (!is_in_object_ && c == '{' && depth_ == object_depth && (form_ == Form::values || is_in_items_))
        is_in_object_ = true;
      else if (form_ == Form::values && depth_ == 0)
        return false;
      if (!is_in_object_ && c == '[' && depth_ == 1) is_in_items_ = key_ == "items\"";
      ++depth_;
      break;
    case '}':
    case ']':
      if (--depth_ < 0) return false;
      break;
    case '"':
      is_in_string_ = true;
      if (!is_in_object_ && depth_ == 1) key_.clear();
      break;
    default:
      if (depth_ == 0 && c != ' ' && c != '\n' && c != '\r' && c != '\t') return false;
  }
  // What stands between items is commas.
  if (is_in_object_ || !is_in_items_ || depth_ < 2 || (c == '[' && depth_ == 2)) {
    const bool was_string = std::exchange(is_in_string_, false);
    keep(std::string_view(&c, 1));
    is_in_string_ = was_string;
  }
  if (is_in_object_ && depth_ == object_depth) end_object();
  if (is_in_items_ && depth_ == 1) is_in_items_ = false;
  return true;
}

bool Splitter::feed(std::string_view text) {
  while (!text.empty()) {
    if (!is_in_string_) {
      if (!take(text.front())) return false;
      text.remove_prefix(1);
      continue;
    }
    if (std::exchange(is_escaped_, false)) {
      keep(text.substr(0, 1));
      text.remove_prefix(1);
      continue;
    }
    const std::size_t end = text.find_first_of("\"\\");
    const std::size_t length = end == std::string_view::npos ? text.size() : end + 1;
    keep(text.substr(0, length));
    if (end != std::string_view::npos) {
      is_escaped_ = text[end] == '\\';
      is_in_string_ = is_escaped_;
    }
    text.remove_prefix(length);
  }
  return true;
}

}  // namespace kubernetes
