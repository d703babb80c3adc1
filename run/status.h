// SPDX-License-Identifier: BSD-2-Clause
//
// What a running service tells of itself: the services of both engines, side by side. The JSON form is a contract:
// docs/cli.md.
#pragma once

#include <sys/types.h>

#include <boost/json/object.hpp>
#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cli/pinned.h"
#include "config/config.h"
#include "fallback_proxy/status.h"

namespace run {

/// A backend, as the engine that carries its service knows it.
struct BackendStatus {
  std::string address;
  std::uint16_t port = 0;
  std::uint32_t weight = 1;
  std::string_view state;  // "active", "drain", "down", "ejected"
  std::string reason;      // why it is down
  std::uint64_t connects = 0;
  std::uint64_t failures = 0;
  std::uint64_t live = 0;
  std::uint32_t ejected_ms = 0;
  std::optional<std::uint64_t> reversed;  // of the fast path
  std::optional<bool> is_marked;          // of the userspace engine: found dead, skipped for a moment
};

/// What only the userspace engine knows of a service.
struct ProxiedStatus {
  bool is_serving = false;
  std::uint64_t denied = 0;
  std::uint64_t dropped = 0;
  std::uint64_t received = 0;
  std::uint64_t sent = 0;
};

struct ServiceStatus {
  std::string name;
  std::string vip;
  std::uint16_t port = 0;
  config::Protocol protocol = config::Protocol::tcp;
  std::string policy;
  std::string no_backend;
  config::EngineMode engine = config::EngineMode::bpf;  // bpf or userspace
  std::string reason;                                   // why this engine; or what is wrong
  std::uint64_t connects = 0;
  std::uint64_t refused = 0;
  std::uint64_t live = 0;
  std::optional<double> connects_per_second;  // since the last look
  std::optional<std::uint64_t> reversed;      // of the fast path
  std::optional<ProxiedStatus> proxied;
  std::vector<BackendStatus> backends;
};

struct Reloads {
  std::uint64_t succeeded = 0;
  std::uint64_t failed = 0;
  bool is_last_good = true;
  std::chrono::system_clock::time_point last_good;  // when the configuration that serves was read
};

/// What is known of the cluster whose services are served.
struct ClusterStatus {
  std::string server;
  bool is_complete = false;  // all was listed once; until then, what an earlier process left serves
  bool is_current = false;   // its changes come as they happen
  double age = 0;            // seconds since they did for the last time
  std::string problem;       // why they do not
  std::size_t services = 0;  // Kubernetes' objects
  std::size_t slices = 0;
  std::size_t left_out = 0;  // of ours: what the log says is not served
  std::uint64_t lists = 0;
  std::uint64_t events = 0;
  std::uint64_t failures = 0;
};

struct Status {
  std::string program;
  std::string version;
  pid_t pid = 0;
  std::chrono::system_clock::time_point since;
  std::string file;
  bool has_fast_path = false;
  std::string no_fast_path;  // why there is none
  std::string pin;           // with a fast path
  std::string cgroup;
  std::optional<cli::Canary> canary;
  std::uint64_t lost_events = 0;
  std::size_t threads = 0;
  std::uint64_t connections = 0;
  std::uint64_t connection_limit = 0;
  Reloads reloads;
  std::size_t checked_backends = 0;
  std::uint64_t went_up = 0;  // health transitions
  std::uint64_t went_down = 0;
  std::optional<ClusterStatus> kubernetes;
  std::vector<ServiceStatus> services;
};

/// What the fast path tells of a service.
ServiceStatus to_status(const cli::SeenService& seen);
/// What the userspace engine tells of it.
ServiceStatus to_status(const userspace::ServiceStatus& seen);

boost::json::object to_json(const ServiceStatus& service);
boost::json::object to_json(const cli::Canary& canary);
boost::json::object to_json(const ClusterStatus& cluster);
boost::json::object to_json(const Status& status);

/// Tables for people, of what to_json() made, here or in another process. Throws boost::system::system_error where that
/// is of another version, and lacks something.
std::string to_text(const boost::json::object& status, bool colour);

}  // namespace run
