// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "tests/support/named_server.h"

namespace support {

struct Backend {
  std::string address;
  std::uint16_t port;
  std::uint32_t weight = 1;
  std::string state = "active";
};

inline Backend backend(const NamedUdpServer& server, std::uint32_t weight = 1, std::string state = "active") {
  return {server.address(), server.port(), weight, std::move(state)};
}

inline Backend backend(const NamedServer& server, std::uint32_t weight = 1, std::string state = "active") {
  return {server.address(), server.port(), weight, std::move(state)};
}

struct Service {
  std::string name;
  std::string vip;
  std::uint16_t port;
  std::vector<Backend> backends;
  std::string no_backend = "refuse";
  std::string more = {};  // other keys, as lines: "policy = \"maglev\"\n"
};

struct Limits {
  std::uint32_t services = 256;
  std::uint32_t backends = 4096;
  std::uint32_t flows = 0;  // 0: the default; the fast path has no such limit
};

/// The table [userspace]. Not those of the engine, but what suits tests: 127.0.0.0/8 is local already, and few threads.
struct Userspace {
  std::uint32_t threads = 2;
  std::string connect_timeout = "2s";
  std::string idle_timeout = "0s";
  std::string drain_timeout = "30s";
  std::string udp_timeout = "60s";
  bool local_vips = false;
  std::vector<std::string> allow_from = {};
};

/// Services "more-0", "more-1", ... with VIPs in 10.98.0.0/16: with enough of them, the kernel's maps are outgrown.
std::vector<Service> more_services(std::uint32_t count, const Backend& backend);

/// The configuration's text.
std::string toml(const std::vector<Service>& services, Limits limits = {});
/// The same for the userspace engine.
std::string proxy_toml(const std::vector<Service>& services, const Userspace& userspace = {}, Limits limits = {});

}  // namespace support
