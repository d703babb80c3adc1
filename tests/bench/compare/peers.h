// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <netinet/in.h>

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "tests/bench/compare/stage.h"

namespace bench {

/// Below the ports that clients are given.
inline constexpr std::uint16_t vip_port = 800;
inline constexpr std::uint16_t backend_port = 900;

/// What a peer is to do: the same for all of them. Backends are numbered through: the first service has 0 to
/// `backends` - 1.
struct Task {
  std::uint32_t services = 1;
  std::uint32_t backends = 1;  // of each service
  bool udp = false;
  unsigned threads = 0;                                   // of each proxy
  std::function<bool(const sockaddr_in&)> answered = {};  // whether a VIP leads to a backend

  const char* protocol() const { return udp ? "udp" : "tcp"; }
};

std::string dotted(std::uint32_t address);
std::uint32_t vip(std::uint32_t service);
std::uint32_t backend(std::uint32_t number);
sockaddr_in vip_endpoint(std::uint32_t service);
sockaddr_in backend_endpoint(std::uint32_t number);

/// What takes a configuration, and has done its work at the end.
struct Job {
  double seconds = 0;
  double cpu_seconds = 0;
  double peak_mib = 0;             // resident
  double maps_mib = not_measured;  // of the kernel's, for BPF
};

/// What leads from the VIPs to the backends, up and running. Ends with this object.
class Running {
 public:
  Running() = default;
  virtual ~Running() = default;
  Running(const Running&) = delete;
  Running& operator=(const Running&) = delete;

  double seconds_until_ready() const { return seconds_until_ready_; }

  /// CPU seconds of processes of its own so far, to the nanosecond; NaN when it has none.
  virtual double cpu_seconds() const { return not_measured; }
  /// KiB of these, from smaps_rollup: "Rss" counts pages that they share in each of them, "Pss" once.
  virtual double memory([[maybe_unused]] const std::string& kind) const { return not_measured; }

  /// The one backend of `service` leaves, and `number` comes in its place.
  virtual void replace_backend(std::uint32_t service, std::uint32_t number);

  /// The whole configuration again, while it serves, with `number` for the last backend of `service`.
  virtual Job reload(std::uint32_t service, std::uint32_t number);

 protected:
  double seconds_until_ready_ = 0;
};

/// One who takes part.
struct Peer {
  std::string name;
  std::vector<std::string> needs = {};  // programs and modules that have to be there
  /// Within the stage's process. Returns when bytes pass through the first and the last VIP. Empty for `direct`.
  std::function<std::unique_ptr<Running>(const Place&, const Task&)> start = {};
  /// From nothing to all services served, by programs of its own, or empty.
  std::function<Job(const Place&, const Task&)> start_up = {};
  std::vector<std::string> measures = {};  // in which it takes part; empty: in all that it can
  std::uint32_t most_services = std::numeric_limits<std::uint32_t>::max();
  std::uint32_t most_backends = std::numeric_limits<std::uint32_t>::max();  // in all
  bool proxy = false;                                                       // processes in the path
  bool udp = true;                                                          // serves that, too
  bool replaces = false;                                                    // one backend, without all else
  bool reloads = false;                                                     // all of it, while it serves

  bool is_direct() const { return !start; }
};

/// The whole work of a host that has the plugin serve this file: the `start_up` of the fast path, in a process of its
/// own. Throws what the plugin says.
void serve_as_host(const char* file, const char* cgroup);
inline constexpr const char* host_command = "serve-as-host";

/// Everybody whom this program can measure, in the order of the tables.
std::vector<Peer> all_peers();

}  // namespace bench
