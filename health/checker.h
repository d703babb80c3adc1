// SPDX-License-Identifier: BSD-2-Clause
//
// Active health checks: TCP connects to the backends of services that ask for them (`health`), whichever engine carries
// the service. One object checks thousands of backends on one event loop, without a thread for each. It logs nothing:
// what changes is told to its owner.
#pragma once

#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <unordered_map>
#include <utility>

#include "config/config.h"

namespace health {

/// A backend of a service has become healthy or unhealthy.
struct Change {
  std::string service;
  config::Address address;
  std::uint16_t port = 0;
  bool is_up = true;
  std::string reason;  // why it is down: "connection refused, 3 times in a row"; empty when it is up
};

class Checker {
 public:
  /// `changed` gets the changes that one result brings for all services that share the backend at once; it may call
  /// apply(), and may destroy this object. All of it runs in the thread of `io`, which must outlive this object.
  Checker(boost::asio::io_context& io, std::function<void(std::span<const Change>)> changed);
  ~Checker();
  Checker(const Checker&) = delete;
  Checker& operator=(const Checker&) = delete;

  /// Checks what `services` ask for from now on. What stays keeps its state and its schedule, whatever the state in
  /// `services`; what is new is up until its checks say otherwise, or, where its state is down in `services`, down
  /// until they do. Backends that drain are not checked. Nothing of this is told to `changed`: ask is_down().
  void apply(std::span<const config::Service> services);

  /// Whether the backend is known to be down for this service; false when it is not checked.
  bool is_down(const std::string& service, const config::Address& address, std::uint16_t port) const;

  /// Endpoints that are checked. A backend that several services ask for with the same `health` counts once.
  std::size_t checked() const { return probes_.size(); }

 private:
  class Probe;
  using Endpoint = std::pair<config::Address, std::uint16_t>;
  /// Services that ask for the same share one probe.
  struct Target {
    config::Address address;
    std::uint16_t port;
    config::Health health;
    bool operator<(const Target& other) const;
  };

  void enqueue(std::weak_ptr<Probe> probe);
  void begin_queued();
  void pause();
  void ended();

  boost::asio::io_context& io_;
  const std::shared_ptr<const std::function<void(std::span<const Change>)>> changed_;
  std::map<Target, std::shared_ptr<Probe>> probes_;  // handlers hold them only while they run
  std::unordered_map<std::string, std::map<Endpoint, std::shared_ptr<Probe>>> services_;
  std::deque<std::weak_ptr<Probe>> queue_;  // whose time for a check has come
  std::size_t under_way_ = 0;
  const std::size_t most_under_way_;
  boost::asio::steady_timer pause_;
  bool is_paused_ = false;
  const std::shared_ptr<const bool> alive_ = std::make_shared<bool>(true);  // a handler of pause_ may outlive this
  std::minstd_rand random_;
};

}  // namespace health
