// SPDX-License-Identifier: BSD-2-Clause
#include "run/decisions.h"

#include <fcntl.h>
#include <fmt/chrono.h>
#include <fmt/format.h>
#include <unistd.h>

#include <boost/json.hpp>
#include <cerrno>
#include <chrono>
#include <ctime>
#include <string_view>
#include <utility>

#include "cli/endpoint.h"
#include "config/fd.h"
#include "config/printable.h"

namespace run {
namespace {

using boost::json::object;
using boost::json::value;

// The kernel writes events for so long after each renewal.
constexpr std::uint32_t enabled_seconds = 10;
constexpr auto renewal_pause = std::chrono::seconds(4);

std::string_view verdict_name(std::uint32_t verdict) {
  switch (verdict) {
    case CLUSTERIP_VERDICT_PASS:
      return "pass";
    case CLUSTERIP_VERDICT_REWRITTEN:
      return "rewritten";
    case CLUSTERIP_VERDICT_NO_BACKEND:
      return "no_backend";
    case CLUSTERIP_VERDICT_NO_SERVICE:
      return "no_service";
    case CLUSTERIP_VERDICT_CONTENDED:
      return "contended";
    case CLUSTERIP_VERDICT_EJECTED:
      return "ejected";
    default:
      return "unknown";
  }
}

std::string_view reason_name(std::uint32_t reason) {
  switch (reason) {
    case CLUSTERIP_REASON_POLICY:
      return "policy";
    case CLUSTERIP_REASON_AFFINITY:
      return "affinity";
    default:
      return "";
  }
}

/// Events have the time since the boot; people want that of the day, in microseconds since the epoch.
std::int64_t to_epoch_us(std::uint64_t monotonic_ns) {
  const auto now = [](clockid_t clock) {
    timespec time{};
    ::clock_gettime(clock, &time);
    return std::int64_t{time.tv_sec} * 1'000'000 + time.tv_nsec / 1000;
  };
  return now(CLOCK_REALTIME) - now(CLOCK_MONOTONIC) + static_cast<std::int64_t>(monotonic_ns / 1000);
}

value endpoint(const sockaddr_storage& socket_address) {
  const auto [address, port] = cli::numeric(socket_address);
  return address.empty() ? value(nullptr) : value(cli::address_and_port(address, port));
}

std::string text(const object& of, std::string_view key) {
  const value& found = of.at(key);
  return found.is_null() ? std::string() : value_to<std::string>(found);
}

std::uint64_t number(const object& of, std::string_view key) { return of.at(key).to_number<std::uint64_t>(); }

}  // namespace

object to_json(const clusterip_event& event) {
  return {{"time", to_epoch_us(event.time)},
          {"service", config::printable(static_cast<const char*>(event.service))},
          {"vip", endpoint(event.vip)},
          {"protocol", cli::protocol_name(event.protocol)},
          {"verdict", verdict_name(event.verdict)},
          {"reason", reason_name(event.reason)},
          {"backend", endpoint(event.backend)},
          {"backends", event.backends},
          {"errno", event.error},
          {"pid", event.pid},
          {"comm", config::printable(static_cast<const char*>(event.comm))},
          {"cgroup", event.cgroup},
          {"cookie", event.cookie}};
}

std::string to_line(const object& decision) {
  if (const auto* lost = decision.if_contains("lost"))
    return fmt::format("{} decisions were lost: this is read too slowly", lost->to_number<std::uint64_t>());
  const std::chrono::system_clock::time_point time{
      std::chrono::microseconds(decision.at("time").to_number<std::int64_t>())};
  const auto whole = std::chrono::floor<std::chrono::seconds>(time);
  std::string line = fmt::format("{:%H:%M:%S}.{:06} ", fmt::localtime(std::chrono::system_clock::to_time_t(whole)),
                                 std::chrono::duration_cast<std::chrono::microseconds>(time - whole).count());
  const std::string service = text(decision, "service");
  const std::string verdict = text(decision, "verdict");
  const std::string vip = text(decision, "vip") + (text(decision, "protocol") == "udp" ? "/udp" : "");
  line += service.empty() ? fmt::format("vip {}", vip) : fmt::format("service {} {}", service, vip);
  const std::uint64_t backends = number(decision, "backends");
  if (verdict == "rewritten") {
    line += fmt::format(" -> {}, 1 of {} backend{}", text(decision, "backend"), backends, backends == 1 ? "" : "s");
    if (text(decision, "reason") == "affinity") line += ", by affinity";
  } else if (verdict == "ejected") {
    return line + fmt::format(": backend {} is ejected, its connects fail", text(decision, "backend"));
  } else if (verdict == "pass") {
    line += ": passes untouched";
  } else {
    const std::string_view why = verdict == "no_backend"   ? "no backend"
                                 : verdict == "no_service" ? "no service has this port"
                                                           : "it changed again and again";
    const char* name = ::strerrorname_np(static_cast<int>(number(decision, "errno")));
    line += fmt::format(": {}, refused with {}", why, name != nullptr ? name : "an errno");
  }
  const std::string comm = text(decision, "comm");
  return line + fmt::format(", {}[{}]", comm.empty() ? "?" : comm, number(decision, "pid"));
}

Decisions::~Decisions() { descriptor_.close(); }

config::Result<std::shared_ptr<void>> Decisions::subscribe(FastPath* fast_path, Tell tell) {
  if (fast_path == nullptr)
    return config::fail(-EOPNOTSUPP, "there is no fast path, and only its decisions are traced");
  fast_path_ = fast_path;
  is_first_ = is_first_ || subscribers_->empty();
  if (auto renewed = renew(); !renewed) return std::unexpected(renewed.error());
  subscribers_->push_back(std::move(tell));
  // The list lives as long as a subscription: the end of this object may come first.
  return std::shared_ptr<void>(&subscribers_->back(), [list = subscribers_](void* tell_of_it) {
    list->remove_if([&](const Tell& each) { return &each == tell_of_it; });
  });
}

/// Keeps events coming. Ends with the last subscriber: then the kernel's own limit stops them.
config::Result<void> Decisions::renew() {
  renewal_.expires_after(renewal_pause);
  renewal_.async_wait([this](const boost::system::error_code& error) {
    if (error) return;
    if (!subscribers_->empty()) {
      (void)renew();  // a failure shows as silence; the canary tells why
      return;
    }
    boost::system::error_code ignored;
    descriptor_.close(ignored);
    watched_ = -1;
  });
  const auto events = fast_path_->enable_events(enabled_seconds);
  if (!events) return config::fail(-EIO, events.error().message);
  return watch(*events);
}

void Decisions::fast_path_changed() {
  if (!subscribers_->empty() && fast_path_ != nullptr) {
    watched_ = -1;  // the number may be the same, of another map
    (void)renew();
  }
}

config::Result<void> Decisions::watch(int events) {
  if (events == watched_) return {};
  boost::system::error_code error;
  descriptor_.close(error);
  watched_ = -1;
  config::Fd copy(::fcntl(events, F_DUPFD_CLOEXEC, 0));
  if (!copy) return config::fail_errno(errno, "the descriptor of events");
  descriptor_.assign(copy.get(), error);
  if (error) return config::fail(-error.value(), "watching for events: " + error.message());
  copy.release();
  watched_ = events;
  wait();
  return {};
}

void Decisions::wait() {
  descriptor_.async_wait(descriptor_.wait_read, [this](const boost::system::error_code& error) {
    if (error) return;
    hand_out();
    wait();
  });
}

void Decisions::hand_out() {
  fast_path_->read_events([this](const clusterip_event& event) {
    const std::uint64_t before = std::exchange(lost_, event.lost);
    if (!std::exchange(is_first_, false) && event.lost > before) {
      const object lost{{"lost", event.lost - before}};
      for (const Tell& tell : *subscribers_) tell(lost);
    }
    const object decision = to_json(event);
    for (const Tell& tell : *subscribers_) tell(decision);
  });
}

}  // namespace run
