// SPDX-License-Identifier: BSD-2-Clause
//
// The metrics in Prometheus' text format. Names and labels are a contract: docs/metrics.md.
#pragma once

#include <prometheus/exposer.h>

#include <boost/asio/io_context.hpp>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "config/fail.h"
#include "fallback_proxy/backend.h"
#include "run/status.h"

namespace run {

class Metrics {
 public:
  /// Serves http://`listen`/metrics by two threads of its own, until the end of the object. `status` is called in the
  /// thread of `io`. -EADDRINUSE and the like: another program has the port.
  static config::Result<std::unique_ptr<Metrics>> serve(boost::asio::io_context& io, const std::string& listen,
                                                        std::function<Status()> status);
  ~Metrics();
  Metrics(const Metrics&) = delete;
  Metrics& operator=(const Metrics&) = delete;

 private:
  class Collector;
  Metrics(std::shared_ptr<Collector> collector, const std::string& listen, const userspace::SocketAddress& address);

  const userspace::SocketAddress address_;
  std::shared_ptr<Collector> collector_;
  std::optional<prometheus::Exposer> exposer_;
};

}  // namespace run
