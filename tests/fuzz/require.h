// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <cstdlib>

/// What must be so, whatever the input: libFuzzer reports an abort with the input that led to it.
inline void require(bool condition) {
  if (!condition) std::abort();
}
