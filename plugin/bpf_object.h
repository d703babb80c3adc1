// SPDX-License-Identifier: BSD-2-Clause
//
// clusterip.bpf.c as it is compiled in: the definitions of its maps, and its program.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "plugin/fd.h"
#include "plugin/system_error.h"

namespace plugin {

/// A map by its name in clusterip.bpf.c, and how large to make it.
struct MapSize {
  const char* name;
  std::uint32_t max_entries;
};

/// Creates the maps, in this order.
Result<std::vector<Fd>> create_maps(std::span<const MapSize> sizes);

/// The `const volatile` values of clusterip.bpf.c.
struct ProgramConstants {
  bool can_set_errno = false;
  std::uint32_t stats_shard_mask = 0;
  std::uint32_t stats_per_shard = 0;
  std::uint32_t stats_backends = 0;
};

/// Loads sock4_connect over these maps (names and descriptors in one order). A refusal by the verifier is a bug of ours
/// and comes back as -ENOTRECOVERABLE with the verifier's words.
Result<Fd> load_program(std::span<const char* const> names, std::span<const Fd> maps,
                        const ProgramConstants& constants);

}  // namespace plugin
