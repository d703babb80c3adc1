// SPDX-License-Identifier: BSD-2-Clause
//
// Ends connected sockets of backends that have left: a connected UDP socket would go on sending to nobody. Runs the
// iterators of bpf/socket_sweep.bpf.c in each network namespace.
#pragma once

#include <string>

#include "plugin/maps.h"

namespace plugin {

/// Which sockets to look at.
struct Sweep {
  bool udp = false;
  bool tcp = false;
};

/// Whether this kernel and these privileges can end sockets: it has bpf_sock_destroy() and BTF that tells of it, and
/// lets us load a tracing program.
bool can_end_sockets();

/// Ends the sockets whose backend has left, in every network namespace that has a process; those of services that want
/// them kept, and those that have connected elsewhere since, are spared. The programs that may still choose a backend
/// that has left must have ended. Returns why some sockets may still be there; empty when none are.
std::string end_sockets(const Maps& maps, const Sweep& sweep);

}  // namespace plugin
