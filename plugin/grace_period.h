// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <cstdint>

#include "plugin/fd.h"
#include "plugin/system_error.h"

namespace plugin {

/// Waits until every run of a BPF program that was under way has ended, so that what it may have read can be reused.
/// The torture test links one that does not wait in its place, to see that it notices.
class GracePeriod {
 public:
  static Result<GracePeriod> create();

  /// Blocks for one RCU grace period: 8 ms on average, over 100 ms at times.
  Result<void> wait() const;

  /// Whether so much of a pool waits to become free that a grace period should be spent on it now.
  static bool is_worth_it(std::uint64_t retired, std::uint64_t capacity);

 private:
  GracePeriod() = default;

  Fd outer_;  // both only where the kernel has no MEMBARRIER_CMD_GLOBAL
  Fd inner_;
};

}  // namespace plugin
