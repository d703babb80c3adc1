// SPDX-License-Identifier: BSD-2-Clause
#include "config/unsupported.h"

namespace config {

bool is_unsupported(const Engine& engine, std::string_view key) {
  if (key == "mode") return engine.mode == EngineMode::userspace;
  if (key == "on_exit") return engine.on_exit == OnExit::detach;
  if (key == "watch") return engine.watch;
  if (key == "control") return true;
  return false;
}

bool is_unsupported(const Limits&, std::string_view) { return false; }

bool is_unsupported(const Userspace&, std::string_view) { return true; }

bool is_unsupported(const Metrics&, std::string_view key) {
  if (key == "listen") return true;
  return false;
}

bool is_unsupported(const Service& service, std::string_view key) {
  if (key == "panic") return service.panic;
  if (key == "proxy_protocol") return service.proxy_protocol != ProxyProtocol::none;
  if (key == "engine") return service.engine == EngineMode::userspace;
  if (key == "health") return true;
  if (key == "eject") return true;
  return false;
}

}  // namespace config
