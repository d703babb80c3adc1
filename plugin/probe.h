// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <string>

#include "plugin/system_error.h"

namespace plugin {

/// What this kernel and these privileges can do; each was tried. clusterip.h says what each is for.
struct Capabilities {
  bool connect4 = false;
  bool map_memory = false;
  bool set_errno = false;
  bool link = false;
  bool membarrier = false;
  bool batch = false;
  std::string reason;  // why there is no fast path; empty when there is one

  bool fast_path() const { return connect4 && map_memory; }
};

/// Uses bpf() itself, not libbpf, which would write to stderr where something is missing. Fails with -EPERM when
/// privileges are missing to find out.
Result<Capabilities> probe();

}  // namespace plugin
