// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <boost/json/object.hpp>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace kubernetes {

/// A label selector, to look again at what an API server takes for selected: "app=web,tier in (a, b),!test".
class Selector {
 public:
  /// Empty, or something that is none, which the API server refuses: then it matches everything.
  explicit Selector(std::string_view text);

  /// `labels`: metadata.labels of an object.
  [[nodiscard]] bool matches(const boost::json::object& labels) const;

 private:
  enum class Rule : std::uint8_t { is, is_not, exists, is_missing, is_more, is_less };
  struct Term {
    std::string key;
    Rule rule = Rule::exists;
    std::vector<std::string> values;
  };

  std::vector<Term> terms_;  // all of them have to be met
};

}  // namespace kubernetes
