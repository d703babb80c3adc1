// SPDX-License-Identifier: BSD-2-Clause
//
// A service as one configuration has it, and the choice of a backend for each of its connections. A reload makes a new
// object; connections keep the one that they began with.
#pragma once

#include <spdlog/common.h>

#include <atomic>
#include <boost/container/flat_set.hpp>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <tuple>
#include <vector>

#include "balance/alias_table.h"
#include "config/config.h"
#include "fallback_proxy/affinity.h"
#include "fallback_proxy/backend.h"

namespace userspace {

/// What a service's socket is bound to.
using SocketName = std::tuple<config::Address, std::uint16_t, config::Protocol>;

using BackendPointer = std::shared_ptr<Backend>;
using Random = std::mt19937;

/// What outlives a reload. Used from any thread.
struct ServiceState {
  std::atomic<std::uint32_t> turn = 0;      // round_robin: the next place in the ring
  std::atomic<std::uint64_t> refused = 0;   // connections that no backend took; datagrams that began no flow
  std::atomic<std::uint64_t> denied = 0;    // from addresses that are not served
  std::atomic<std::uint64_t> dropped = 0;   // datagrams for which there was no room
  std::atomic<std::uint64_t> received = 0;  // bytes from clients
  std::atomic<std::uint64_t> sent = 0;      // bytes to clients
  std::mutex ejecting;                      // of two threads that eject at once, one sees what the other did
  Affinity affinity;
  /// A line for the log. Never blocks; set before any thread has the service, or left empty.
  std::function<void(spdlog::level::level_enum, std::string)> report;
};

/// Immutable but for what its state and its backends count: used from any thread.
class Service {
 public:
  /// `backends` are those of settings.backends, in their order.
  Service(config::Service settings, std::vector<BackendPointer> backends, std::shared_ptr<ServiceState> state);

  const config::Service& settings() const { return settings_; }
  ServiceState& state() const { return *state_; }
  const std::shared_ptr<ServiceState>& shared_state() const { return state_; }
  std::span<const BackendPointer> backends() const { return backends_; }

  /// No active backend, nor with `panic` one that is down: nothing can be chosen.
  bool is_empty() const { return active_.empty(); }
  /// A backend for a new connection of `client`, by affinity and policy; one that is marked as dead, or ejected, only
  /// when no other is left. Never one of `tried`; null when all have been tried.
  BackendPointer choose(const SocketAddress& client, std::span<const BackendPointer> tried, Random& random) const;

  /// Tells affinity that `client` has reached `backend`. `limit`: [limits] flows.
  void remember(const SocketAddress& client, const BackendPointer& backend, std::size_t limit) const;

  // What became of an attempt to reach one of its backends. What is new for an operator is reported.

  void reached(Backend& backend) const;
  void failed(Backend& backend, int error, Clock::time_point now,
              Clock::time_point began = Clock::time_point::max()) const;

  bool is_active(const Backend& backend) const { return active_set_.contains(&backend); }

 private:
  void use(config::BackendState state);
  std::size_t draw(Random& random) const;
  const BackendPointer& choose_less_loaded(Random& random) const;
  bool admits(Backend& backend, Clock::time_point now) const;
  std::optional<Clock::duration> eject(Backend& backend, Clock::time_point now) const;
  const BackendPointer& by_policy(const SocketAddress& client, Random& random) const;

  config::Service settings_;
  std::vector<BackendPointer> backends_;
  std::vector<BackendPointer> active_;  // that are chosen from
  std::vector<std::uint32_t> weights_;  // of active_
  boost::container::flat_set<const Backend*> active_set_;
  std::vector<balance::Column> columns_;  // random, least_conn: over active_
  std::vector<std::uint32_t> slots_;      // round_robin: the ring; maglev: its table; of indices of active_
  std::shared_ptr<ServiceState> state_;
};

/// One client to affinity and maglev (`client` of the configuration): its address, with `socket` its port as well.
std::uint64_t client_hash(const SocketAddress& client, config::Client kind);

}  // namespace userspace
