// SPDX-License-Identifier: BSD-2-Clause
#include "kubernetes/selector.h"

#include <algorithm>
#include <boost/json/string.hpp>
#include <boost/json/value.hpp>
#include <charconv>
#include <cstdint>
#include <functional>
#include <optional>
#include <utility>

namespace kubernetes {
namespace {

/// Words and signs, one behind the other; each is empty at the end.
class Tokens {
 public:
  explicit Tokens(std::string_view text) : rest_(text) {}

  [[nodiscard]] std::string_view peek() {
    rest_.remove_prefix(std::min(rest_.find_first_not_of(" \t"), rest_.size()));
    if (rest_.empty()) return {};
    for (const std::string_view sign : {"==", "!=", "=", "!", ",", "(", ")", ">", "<"})
      if (rest_.starts_with(sign)) return rest_.substr(0, sign.size());
    return rest_.substr(0, rest_.find_first_of(" \t=!,()<>"));
  }
  std::string_view take() {
    const std::string_view token = peek();
    rest_.remove_prefix(token.size());
    return token;
  }
  bool take_if(std::string_view token) { return peek() == token && !take().empty(); }
  /// Empty: there is none.
  std::string_view take_word() {
    return peek().find_first_of("=!,()<>") == std::string_view::npos ? take() : std::string_view();
  }

 private:
  std::string_view rest_;
};

std::optional<std::int64_t> number(std::string_view text) {
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size()) return {};
  return value;
}

}  // namespace

Selector::Selector(std::string_view text) {
  Tokens tokens(text);
  std::vector<Term> terms;
  while (!tokens.peek().empty()) {
    if (!terms.empty() && !tokens.take_if(",")) return;
    Term term;
    if (tokens.take_if("!")) term.rule = Rule::is_missing;
    term.key = tokens.take_word();
    if (term.key.empty()) return;
    const std::string_view next = tokens.peek();
    if (term.rule != Rule::is_missing && !next.empty() && next != ",") {
      const std::string_view sign = tokens.take();
      if (sign == "in" || sign == "notin") {
        term.rule = sign == "in" ? Rule::is : Rule::is_not;
        if (!tokens.take_if("(")) return;
        do term.values.emplace_back(tokens.take_word());
        while (tokens.take_if(","));
        if (!tokens.take_if(")")) return;
      } else {
        if (sign == "=" || sign == "==")
          term.rule = Rule::is;
        else if (sign == "!=")
          term.rule = Rule::is_not;
        else if (sign == ">" || sign == "<")
          term.rule = sign == ">" ? Rule::is_more : Rule::is_less;
        else
          return;
        term.values.emplace_back(tokens.take_word());
      }
    }
    terms.push_back(std::move(term));
  }
  terms_ = std::move(terms);
}

bool Selector::matches(const boost::json::object& labels) const {
  return std::ranges::all_of(terms_, [&labels](const Term& term) {
    const auto* label = labels.if_contains(term.key);
    const bool exists = label != nullptr && label->is_string();
    const std::string_view value = exists ? std::string_view(label->get_string()) : std::string_view();
    const bool is_one = exists && std::ranges::find(term.values, value) != term.values.end();
    const auto compared = [&](auto less) {
      const auto ours = number(value);
      const auto bound = number(term.values.front());
      return ours && bound && less(*ours, *bound);
    };
    switch (term.rule) {
      case Rule::is:
        return is_one;
      case Rule::is_not:
        return !is_one;
      case Rule::exists:
        return exists;
      case Rule::is_missing:
        return !exists;
      case Rule::is_more:
        return compared(std::greater<>());
      case Rule::is_less:
        return compared(std::less<>());
    }
    return true;
  });
}

}  // namespace kubernetes
