// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <cstdint>
#include <expected>
#include <string>

namespace config {

/// Why something failed. `code` is a negative errno; line and column (from 1) are set when a configuration is at fault.
struct Error {
  int code = 0;
  std::string message;
  std::uint32_t line = 0;
  std::uint32_t column = 0;
};

/// What every function returns that can fail; exceptions are for bugs and for memory that ran out.
template <class T>
using Result = std::expected<T, Error>;

}  // namespace config
