// SPDX-License-Identifier: BSD-2-Clause
#include "run/notify.h"

#include <fmt/format.h>
#include <systemd/sd-daemon.h>

#include <cstdint>
#include <ctime>

namespace run {

Notify::Notify(boost::asio::io_context& io) : timer_(io) {
  std::uint64_t timeout = 0;
  if (::sd_watchdog_enabled(0, &timeout) <= 0) return;
  period_ = std::chrono::microseconds(timeout / 2);  // as the manual advises
  answer_watchdog();
}

void Notify::ready(const std::string& status) { ::sd_notifyf(0, "READY=1\nSTATUS=%s", status.c_str()); }

void Notify::reloading() {
  timespec now{};
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  // The time is for Type=notify-reload (systemd 253).
  ::sd_notify(0, fmt::format("RELOADING=1\nMONOTONIC_USEC={}", now.tv_sec * 1'000'000 + now.tv_nsec / 1000).c_str());
}

void Notify::stopping(const std::string& status) { ::sd_notifyf(0, "STOPPING=1\nSTATUS=%s", status.c_str()); }

void Notify::answer_watchdog() {
  ::sd_notify(0, "WATCHDOG=1");
  timer_.expires_after(period_);
  timer_.async_wait([this](const boost::system::error_code& error) {
    if (!error) answer_watchdog();
  });
}

}  // namespace run
