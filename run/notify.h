// SPDX-License-Identifier: BSD-2-Clause
//
// What the service manager is told (sd_notify(3)). Without a manager that asks, nothing happens.
#pragma once

#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <chrono>
#include <string>

namespace run {

class Notify {
 public:
  /// Answers the manager's watchdog (WatchdogSec=) for as long as `io` runs: a thread that hangs does not.
  explicit Notify(boost::asio::io_context& io);

  /// Serving. `status` is shown by systemctl status.
  static void ready(const std::string& status);
  static void reloading();
  static void stopping(const std::string& status);

 private:
  void answer_watchdog();

  boost::asio::steady_timer timer_;
  std::chrono::microseconds period_{0};
};

}  // namespace run
