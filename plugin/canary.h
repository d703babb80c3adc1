// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <cstdint>

#include "plugin/cgroup.h"
#include "plugin/system_error.h"

namespace plugin {

/// What the canary's connects were seen to do; see clusterip_canary_result.
struct CanaryResult {
  int rewrite_errno = 0;
  int refuse_errno = 0;
};

/// Runs a short-lived child inside `cgroup` that connects UDP sockets to the reserved VIP. No packet is sent. Where it
/// may not be moved there, what it saw counts only as a proof. Fails when the child could not be run, or has proved
/// nothing there; what it saw is the result.
Result<CanaryResult> run_canary(const Cgroup& cgroup);

}  // namespace plugin
