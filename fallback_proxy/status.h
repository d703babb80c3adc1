// SPDX-License-Identifier: BSD-2-Clause
//
// What the userspace engine tells about itself.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "config/config.h"

namespace userspace {

struct BackendStatus {
  config::Address address;
  std::uint16_t port = 0;
  std::uint32_t weight = 1;
  config::BackendState state = config::BackendState::active;
  bool is_marked = false;                  // found dead: no connection tries it for now
  std::chrono::milliseconds ejected = {};  // for so long still, by `eject`
  std::uint32_t live = 0;
  std::uint64_t connects = 0;
  std::uint64_t failures = 0;
};

struct ServiceStatus {
  std::string name = {};
  config::Address vip;
  std::uint16_t port = 0;
  config::Protocol protocol = config::Protocol::tcp;
  config::Policy policy = config::Policy::random;
  bool is_serving = false;
  std::string reason = {};     // why not; or what is wrong although it serves
  std::uint64_t refused = 0;   // connections that no backend took
  std::uint64_t denied = 0;    // connections from addresses that are not served
  std::uint64_t dropped = 0;   // datagrams for which there was no room
  std::uint64_t received = 0;  // bytes from clients
  std::uint64_t sent = 0;      // bytes to clients
  std::vector<BackendStatus> backends = {};
};

struct Status {
  std::string version = {};
  pid_t pid = 0;
  std::chrono::system_clock::time_point since;
  std::size_t threads = 0;
  std::uint64_t connections = 0;
  std::uint64_t connection_limit = 0;
  std::vector<ServiceStatus> services = {};  // in the order of the file
};

}  // namespace userspace
