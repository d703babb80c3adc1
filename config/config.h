// SPDX-License-Identifier: BSD-2-Clause
//
// The plain model of a configuration: what the TOML file says, with its defaults filled in. There is no second model:
// both engines, the health checks and every other source of services speak in these types. Addresses and ports are in
// host byte order; meaning of each key: docs/configuration.md.
#pragma once

#include <boost/asio/ip/address.hpp>
#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace config {

using Address = boost::asio::ip::address;

/// Where something stands in the file, from 1. 0: not from a file.
struct Position {
  std::uint32_t line = 0;
  std::uint32_t column = 0;
  bool operator==(const Position&) const = default;
};

enum class Protocol : std::uint8_t { tcp = 6, udp = 17 };  // the IP protocol numbers
enum class Policy : std::uint8_t { random, round_robin, least_conn, maglev };
enum class Client : std::uint8_t { cgroup, netns, socket };
enum class NoBackend : std::uint8_t { refuse, unreachable, pass };
enum class ProxyProtocol : std::uint8_t { none, v1, v2 };
enum class OnRemove : std::uint8_t { keep, drain, reset };
enum class OnExit : std::uint8_t { keep, detach };
enum class EngineMode : std::uint8_t { automatic, bpf, userspace };  // `automatic` is spelt "auto"
enum class BackendState : std::uint8_t { active, drain, down };      // `down` is said by health checks, not by the file

inline constexpr std::uint32_t max_weight = 65535;
inline constexpr std::size_t max_backends_per_service = 65535;
inline constexpr std::size_t max_name_length = 159;
inline constexpr std::size_t max_socket_path = 107;        // sockaddr_un::sun_path without the NUL
inline constexpr std::uint32_t reserved_vip = 0xc0000008;  // 192.0.0.8 (RFC 7600): the canary's, no service may have it

struct Backend {
  Address address;
  std::uint16_t port = 0;
  std::uint32_t weight = 1;  // 1 to max_weight
  BackendState state = BackendState::active;
  Position position;
  bool operator==(const Backend&) const = default;
};

struct Health {
  std::chrono::milliseconds interval{2000};
  std::chrono::milliseconds timeout{500};
  std::uint32_t rise = 2;
  std::uint32_t fall = 3;
  bool operator==(const Health&) const = default;
};

struct Eject {
  std::uint32_t failures = 3;
  std::chrono::milliseconds time{10000};
  bool operator==(const Eject&) const = default;
};

struct Service {
  std::string name;
  Address vip;
  std::uint16_t port = 0;
  Protocol protocol = Protocol::tcp;
  Policy policy = Policy::random;
  std::optional<std::chrono::milliseconds> affinity;
  Client client = Client::cgroup;
  bool panic = false;
  std::uint32_t mark = 0;
  ProxyProtocol proxy_protocol = ProxyProtocol::none;
  NoBackend no_backend = NoBackend::refuse;
  EngineMode engine = EngineMode::automatic;
  std::optional<Health> health;
  std::optional<Eject> eject;
  OnRemove on_remove = OnRemove::drain;
  std::vector<Backend> backends;
  Position position;
  bool operator==(const Service&) const = default;
};

struct Engine {
  EngineMode mode = EngineMode::automatic;
  std::string cgroup;  // empty: "auto", the root of the cgroup2 mount
  std::string pin = "/sys/fs/bpf/clusterip";
  OnExit on_exit = OnExit::keep;
  bool peer_names = true;
  bool watch = false;
  std::string control = "/run/clusterip/control.sock";
};

/// What a configuration may hold. Backends count over all services.
struct Limits {
  std::uint32_t services = 65536;
  std::uint32_t backends = 262144;
  std::uint32_t flows = 131072;
};

struct Userspace {
  std::uint32_t threads = 0;  // 0: one per CPU
  std::chrono::milliseconds connect_timeout{2000};
  std::chrono::milliseconds idle_timeout{0};  // 0: none
  std::chrono::milliseconds drain_timeout{30000};
  std::chrono::milliseconds udp_timeout{60000};
  bool local_vips = true;
  std::vector<std::string> allow_from;  // networks, "10.244.0.0/16"
};

struct Metrics {
  std::optional<std::string> listen;  // "address:port"
};

/// A Kubernetes API server to take services from, and which of them.
struct Kubernetes {
  std::string kubeconfig;               // a file; empty: `server`, or the pod that this runs in
  std::string context;                  // of the kubeconfig; empty: its current one
  std::string server;                   // "https://10.0.0.1:6443"
  std::string ca_file;                  // who signs its certificate; empty: the pod's, else the system's authorities
  std::string token_file;               // empty: the pod's
  std::vector<std::string> namespaces;  // empty: all
  std::string selector;                 // labels of services, "app=web,tier!=test"
  std::string node;                     // this machine's, for what is local and for hints; empty: none
  std::string zone;                     // the node's; empty: none
  std::string proxy_name;               // serve services with this service-proxy-name; empty: those without one
  bool external_ips = false;
  bool load_balancer_ips = false;
  bool operator==(const Kubernetes&) const = default;
};

struct Config {
  Engine engine;
  Limits limits;
  Userspace userspace;
  Metrics metrics;
  std::optional<Kubernetes> kubernetes;
  std::vector<Service> services;
};

}  // namespace config
