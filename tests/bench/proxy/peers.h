// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace bench {

/// An IPv4 address and a port.
struct Endpoint {
  std::string address;
  std::uint16_t port = 0;
};

/// What a proxy is to do: the same for all of them.
struct Task {
  std::vector<std::string> vips;  // all on vip_port
  unsigned threads = 0;
};

/// Below the ports that clients are given. Every VIP leads to the one backend.
inline constexpr std::uint16_t vip_port = 800;
inline const Endpoint backend = {.address = "127.0.0.1", .port = 900};

/// One who takes part.
struct Peer {
  std::string name;
  std::string program = {};                             // empty: the client connects to the backend itself
  std::function<std::string(const Task&)> config = {};  // the text of its configuration
  std::vector<std::string> (*arguments)(const std::string& file) = nullptr;
  std::string network = "127.96";          // of its VIPs
  std::vector<std::string> measures = {};  // in which it takes part; empty: in all

  bool is_direct() const { return program.empty(); }
  bool takes_part(const std::string& measure) const;
  std::vector<std::string> vips(std::size_t count) const;
};

/// Everybody whom this program can measure, in the order of the tables. `fallback_proxy` is its path.
std::vector<Peer> all_peers(const std::string& fallback_proxy);

/// A running proxy. Its processes are ended with it.
class Proxy {
 public:
  /// Returns when bytes pass through the first and the last VIP, and all VIPs have a listener. Throws when it ends
  /// before, with what it wrote.
  Proxy(const Peer& peer, const Task& task);
  ~Proxy();
  Proxy(const Proxy&) = delete;
  Proxy& operator=(const Proxy&) = delete;

  double seconds_until_ready() const { return seconds_until_ready_; }

  /// CPU seconds of all its processes so far, to the nanosecond.
  double cpu_seconds() const;

  /// KiB, from smaps_rollup: "Rss" counts pages that its processes share in each of them, "Pss" once.
  double memory(const std::string& kind) const;

 private:
  pid_t pid_ = -1;
  std::vector<pid_t> processes_;  // with its children
  double seconds_until_ready_ = 0;
};

}  // namespace bench
