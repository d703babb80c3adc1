// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <span>
#include <string>
#include <string_view>

namespace config {

/// `, did you mean "..."?` with the one of `words` that `word` is nearly; empty when it is near none.
std::string did_you_mean(std::string_view word, std::span<const std::string_view> words);

}  // namespace config
