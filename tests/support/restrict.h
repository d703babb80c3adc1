// SPDX-License-Identifier: BSD-2-Clause
//
// Take rights from this process, for good: only to be called in a child.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace support {

/// A system call that fails with `error`; with `command`, only when that is its first argument.
struct Forbidden {
  long system_call;
  std::optional<std::uint32_t> command;
  int error;
};

void forbid(const std::vector<Forbidden>& calls);

/// All capabilities, also those that a program run by root would regain.
void drop_capabilities();

}  // namespace support
