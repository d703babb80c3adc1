// SPDX-License-Identifier: BSD-2-Clause
#include "config/unsupported.h"

namespace config {

bool is_unsupported(const Engine& engine, std::string_view key, Carrier carrier) {
  if (key == "on_exit") return engine.on_exit == OnExit::detach;
  if (key == "watch") return engine.watch;
  if (carrier == Carrier::userspace) return false;
  if (key == "mode") return engine.mode == EngineMode::userspace;
  if (key == "peer_names") return engine.peer_names;
  if (key == "control") return true;
  return false;
}

bool is_unsupported(const Limits&, std::string_view key, Carrier carrier) {
  return carrier == Carrier::fast_path && key == "flows";
}

bool is_unsupported(const Userspace&, std::string_view, Carrier carrier) { return carrier == Carrier::fast_path; }

bool is_unsupported(const Metrics&, std::string_view key, Carrier) { return key == "listen"; }

bool is_unsupported(const Service& service, std::string_view key, Carrier carrier) {
  if (key == "panic") return service.panic;
  if (key == "health") return true;
  if (key == "eject") return true;
  if (carrier == Carrier::userspace) {
    // "protocol" has been read before: a datagram carries no PROXY header.
    return key == "proxy_protocol" && service.protocol == Protocol::udp &&
           service.proxy_protocol != ProxyProtocol::none;
  }
  if (key == "vip") return service.vip.is_v6();
  if (key == "protocol") return service.protocol == Protocol::udp;
  if (key == "policy") return service.policy != Policy::random;
  if (key == "affinity") return true;
  if (key == "client") return service.client != Client::cgroup;
  if (key == "mark") return service.mark != 0;
  if (key == "proxy_protocol") return service.proxy_protocol != ProxyProtocol::none;
  if (key == "engine") return service.engine == EngineMode::userspace;
  if (key == "on_remove") return service.on_remove == OnRemove::reset;
  return false;
}

}  // namespace config
