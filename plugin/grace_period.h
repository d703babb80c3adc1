// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include "plugin/fd.h"
#include "plugin/system_error.h"

namespace plugin {

/// Waits until every run of a BPF program that was under way has ended, so that what it may have read can be reused.
class GracePeriod {
 public:
  static Result<GracePeriod> create();

  /// Blocks for one RCU grace period: 8 ms on average, over 100 ms at times.
  Result<void> wait() const;

 private:
  GracePeriod() = default;

  Fd outer_;  // both only where the kernel has no MEMBARRIER_CMD_GLOBAL
  Fd inner_;
};

}  // namespace plugin
