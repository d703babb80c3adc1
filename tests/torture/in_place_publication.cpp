// SPDX-License-Identifier: BSD-2-Clause
//
// A planted fault, linked in place of plugin/publication.cpp: publishes by changing the value in the hash.
#include <bpf/bpf.h>

#include "plugin/publication.h"

namespace plugin {

void publish(const Maps& maps, const Key& key, std::uint32_t /*record*/, const Block& block) {
  maps.slots()[block.header].header.mark = block.slots;  // that it is no mark, its flags say
  bpf_map_update_elem(maps.fds().front().get(), &key, &block.header, BPF_ANY);
}

void withdraw(const Maps& /*maps*/, const Key& /*key*/, std::uint32_t /*record*/) {}

}  // namespace plugin
