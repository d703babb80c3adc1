// SPDX-License-Identifier: BSD-2-Clause
//
// clusterip.bpf.c as it is compiled in: the definitions of its maps, and its programs.
#pragma once

#include <cstdint>
#include <span>

#include "plugin/fd.h"
#include "plugin/hooks.h"
#include "plugin/system_error.h"

namespace plugin {

/// A map by its name in clusterip.bpf.c, and how large to make it.
struct MapSize {
  const char* name;
  std::uint32_t max_entries;
  bool is_optional;  // a kernel that does not know the type is no failure
};

/// Creates the map. An empty descriptor: it is optional, and this kernel has no such maps.
Result<Fd> create_map(const MapSize& size);

/// The `const volatile` values of clusterip.bpf.c.
struct ProgramConstants {
  bool can_set_errno = false;
  bool can_mark = false;
  bool can_netns_cookie = false;
  bool can_cgroup_id = false;
  bool can_events = false;
  bool can_comm = false;
  bool has_udp = false;
  bool has_sessions = false;
  bool has_sock_ops = false;
  bool has_eject = false;
  std::uint32_t filter_mask = 0;
  std::uint32_t stats_shard_mask = 0;
  std::uint32_t stats_per_shard = 0;
  std::uint32_t stats_backends = 0;
  std::uint64_t draw_seed = 0;
};

/// Loads the programs of these hooks over these maps (names and descriptors in one order; empty ones are not used). A
/// refusal by the verifier is a bug of ours and comes back as -ENOTRECOVERABLE with the verifier's words.
Result<PerHook<Fd>> load_programs(Hooks hooks, std::span<const char* const> names, std::span<const Fd> maps,
                                  const ProgramConstants& constants);

}  // namespace plugin
