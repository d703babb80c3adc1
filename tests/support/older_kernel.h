// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <linux/bpf.h>

#include <functional>
#include <set>
#include <string>

namespace support {

/// What a kernel may lack.
struct Lacking {
  std::set<bpf_attach_type> hooks = {};
  std::set<bpf_func_id> helpers = {};
  std::set<bpf_map_type> maps = {};
};

/// Runs a function in a forked copy of this process (see in_child), to which this kernel seems to lack these: seccomp
/// hands each bpf() of it to a thread, which refuses programs of the hooks and maps of the types with EINVAL, and gives
/// the helpers in a program a number that no kernel knows, before the verifier looks at it. So a program that can reach
/// the call is refused as an older kernel would refuse it, and one that cannot is loaded.
std::string in_child_without(const Lacking& lacking, const std::function<void()>& body);

}  // namespace support
