// SPDX-License-Identifier: BSD-2-Clause
#include "config/unsupported.h"

namespace config {

bool is_unsupported(const Engine& engine, std::string_view key, Carrier carrier) {
  if (key == "on_exit") return engine.on_exit == OnExit::detach;
  if (key == "watch") return engine.watch;
  if (key == "mode") return carrier == Carrier::fast_path && engine.mode == EngineMode::userspace;
  return false;
}

bool is_unsupported(const Metrics&, std::string_view key, Carrier) { return key == "listen"; }

bool is_unsupported(const Service& service, std::string_view key, Carrier carrier) {
  if (key == "panic") return service.panic;
  if (key == "health") return true;
  if (key == "eject") return true;
  if (carrier == Carrier::fast_path) {
    if (key == "proxy_protocol") return service.proxy_protocol != ProxyProtocol::none;
    if (key == "engine") return service.engine == EngineMode::userspace;
    return false;
  }
  // "protocol" has been read before: a datagram carries no PROXY header.
  return key == "proxy_protocol" && service.protocol == Protocol::udp && service.proxy_protocol != ProxyProtocol::none;
}

}  // namespace config
