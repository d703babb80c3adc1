// SPDX-License-Identifier: BSD-2-Clause
//
// Active health checks: TCP connects to the backends of services that ask for them (`health`), whichever engine carries
// the service. One object checks thousands of backends on one event loop, without a thread for each. It logs nothing: what
// changes is told to its owner.
#pragma once

#include <boost/asio/io_context.hpp>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

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
  /// apply(). All of it runs in the thread of `io`.
  Checker(boost::asio::io_context& io, std::function<void(std::span<const Change>)> changed);
  ~Checker();
  Checker(const Checker&) = delete;
  Checker& operator=(const Checker&) = delete;

  /// Checks what `services` ask for from now on. What stays keeps its state and its schedule; what is new is up until its
  /// checks say otherwise, or, where its state is down in `services`, down until they do. Backends that drain are
  /// not checked.
  void apply(std::span<const config::Service> services);

  /// Whether the backend is known to be down for this service; false when it is not checked.
  bool is_down(const std::string& service, const config::Address& address, std::uint16_t port) const;

  /// Endpoints that are checked. A backend that several services ask for with the same `health` counts once.
  std::size_t checked() const;

 private:
  class Probe;

  boost::asio::io_context& io_;
  std::function<void(std::span<const Change>)> changed_;
};

}  // namespace health
