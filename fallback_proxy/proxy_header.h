// SPDX-License-Identifier: BSD-2-Clause
//
// The PROXY protocol (HAProxy, "The PROXY protocol, versions 1 & 2", 2020): the first bytes towards a backend tell it
// who the client is.
#pragma once

#include <string>

#include "config/config.h"
#include "fallback_proxy/backend.h"

namespace userspace {

/// The header for a TCP connection from `client` to `vip`, which are of one family. `version` is v1 or v2.
std::string proxy_header(config::ProxyProtocol version, const SocketAddress& client, const SocketAddress& vip);

}  // namespace userspace
