// SPDX-License-Identifier: BSD-2-Clause
//
// The fast path that an earlier `clusterip load` left pinned.
#pragma once

#include <string>
#include <vector>

#include "cli/plugin.h"

namespace cli {

/// Is anything at `pin`? The failure says why that cannot be told.
std::expected<bool, Failure> anything_pinned(const std::string& pin);

/// Open what is pinned at `pin`; nothing there is a failure.
std::expected<Handle, Failure> open_pinned(const Plugin& plugin, const std::string& pin);

/// What clusterip_visit_services tells of one backend and one service, to be kept.
struct SeenBackend {
  std::string address;
  std::uint16_t port = 0;
  std::uint32_t weight = 0;
  std::uint32_t state = CLUSTERIP_ACTIVE;
  std::uint64_t connects = 0;
  std::uint64_t live = 0;
  std::uint64_t reversed = 0;
  std::uint64_t failures = 0;
  std::uint32_t ejected_ms = 0;
};
struct SeenService {
  std::string name, vip, policy, no_backend, reason;
  std::uint16_t port = 0;
  int protocol = 0;
  std::uint32_t engine = 0;
  std::uint64_t connects = 0;
  std::uint64_t refused = 0;
  std::uint64_t live = 0;
  std::uint64_t reversed = 0;
  std::uint64_t affinity_ms = 0;
  std::vector<SeenBackend> backends;
};

std::expected<std::vector<SeenService>, Failure> see_services(const Plugin& plugin, clusterip* handle);

/// "2 services, 4 backends".
std::string count_services(const std::vector<SeenService>& services);

/// What the canary saw.
struct Canary {
  bool passed = false;
  bool is_detached = false;  // nothing, or not all, is attached
  std::string rewrite;       // errno name of the connect() that must be rewritten; empty: rewritten
  std::string refuse;        // errno name that the refused connect() got; empty: not refused
  std::string message;       // why it did not pass
};

Canary run_canary(const Plugin& plugin, clusterip* handle);

/// "rewritten, refused with ECONNREFUSED", or why not.
std::string describe(const Canary& canary);

/// "active", "drain", "down".
const char* state_name(std::uint32_t state);

/// "bpf", "userspace"; empty for neither.
const char* engine_name(std::uint32_t engine);

}  // namespace cli
