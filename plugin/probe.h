// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <functional>
#include <string>

#include "config/config.h"
#include "plugin/hooks.h"
#include "plugin/system_error.h"

namespace plugin {

/// What this kernel and these privileges can do; each was tried. clusterip.h says what each is for.
struct Capabilities {
  Hooks hooks;
  bool map_memory = false;
  bool set_errno = false;
  bool link = false;
  bool membarrier = false;
  bool batch = false;
  bool sessions = false;       // socket storage, where a session is kept
  bool mark = false;           // bpf_setsockopt in connect hooks
  bool netns_client = false;   // bpf_get_netns_cookie
  bool cgroup_client = false;  // bpf_get_current_cgroup_id
  bool events = false;         // ring buffer, and who the caller is
  bool comm = false;           // its name, too: CAP_PERFMON
  std::string reason;          // why there is no fast path; empty when there is one

  bool fast_path() const { return hooks.contains(Hook::connect4) && map_memory && sessions; }
  bool udp() const { return hooks.contains(Hook::sendmsg4) && hooks.contains(Hook::recvmsg4); }

  /// Why the fast path cannot carry this service; empty when it can.
  std::string reason_against(const config::Service& service) const;

  /// What the fast path cannot do here beside that; empty when nothing is missing. `peer_names` is that of the engine;
  /// `can_end_sockets` is asked when it matters: it takes some milliseconds.
  std::string shortcoming(const config::Service& service, bool peer_names,
                          const std::function<bool()>& can_end_sockets) const;
};

/// Uses bpf() itself, not libbpf, which would write to stderr where something is missing. Fails with -EPERM when
/// privileges are missing to find out. An answer is kept, for this process with the capabilities that it has: it takes
/// some thirty programs. From any thread.
Result<Capabilities> probe();

}  // namespace plugin
