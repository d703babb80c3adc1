// SPDX-License-Identifier: BSD-2-Clause
//
// A backend of a service as the proxy knows it at run time. One object lives as long as anything refers to it, across
// reloads, so that live connections and what was learnt of failures stay with it. Its members may be used from any
// thread.
#pragma once

#include <netinet/in.h>
#include <sys/socket.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <optional>
#include <string>

#include "config/config.h"

namespace userspace {

using Clock = std::chrono::steady_clock;

/// An address and a port as system calls take them.
struct SocketAddress {
  SocketAddress() = default;
  SocketAddress(const config::Address& address, std::uint16_t port);

  const sockaddr* get() const { return &storage.any; }
  int family() const { return storage.any.sa_family; }
  config::Address address() const;
  std::uint16_t port() const;
  /// "10.0.0.1:80", "[2001:db8::1]:80".
  std::string text() const;

  union {
    sockaddr any;
    sockaddr_in v4;
    sockaddr_in6 v6;
  } storage{.v6 = {}};
  socklen_t length = 0;
};

/// Whether a socket that was connected to `peer` is its own peer: where nobody listens on a port that clients may get,
/// a client can connect to itself (RFC 9293, 3.5: a simultaneous open).
bool is_connected_to_itself(int fd, const SocketAddress& peer);

class Backend {
 public:
  Backend(const config::Address& host, std::uint16_t port) : address(host, port) {}

  /// May a new connection go to it? After failures it may not for a while, which doubles with each: 1 s to 32 s. Then
  /// one connection tries: the caller that gets `true` is the one, the others wait for its outcome.
  bool admits(Clock::time_point now);
  /// Nobody has found it dead, or long enough ago. Changes nothing.
  bool is_marked(Clock::time_point now) const { return retry_at_.load(std::memory_order_relaxed) > ticks(now); }

  /// True when this is news: failed() has told.
  bool connected();
  /// `began`: when the attempt did, or the flow that is refused. Those that began before a failure which is known
  /// already say nothing new: all at once, they would mark it for as long as many failures in a row do.
  /// Returns for how long it is left alone when that is news: once, until it is reached again, and once a second at
  /// most.
  std::optional<Clock::duration> failed(Clock::time_point now, Clock::time_point began = Clock::time_point::max());

  // What a service with `eject` asks instead: the mark is its ejection, made by eject() only, and whoever comes when
  // its time is over tries the backend.

  /// Until then it is left alone. Nothing, when it is not.
  std::optional<Clock::duration> mark_left(Clock::time_point now) const;
  /// As connected(). A connection that began before an ejection does not end it.
  bool connected_unless_ejected(Clock::time_point now);
  /// True: these were `most` failures in a row, or more. What fails while it is ejected began before, and says nothing.
  bool failed_too_often(Clock::time_point now, std::uint32_t most);
  /// For `time`, which doubles with each ejection in a row up to 16 times as long. Returns for how long when that is
  /// news, as failed() does.
  std::optional<Clock::duration> eject(Clock::time_point now, Clock::duration time);

  const SocketAddress address;
  std::atomic<std::uint32_t> live = 0;      // connections and UDP flows
  std::atomic<std::uint64_t> connects = 0;  // connections and UDP flows that reached it
  std::atomic<std::uint64_t> failures = 0;

 private:
  static std::int64_t ticks(Clock::time_point time) { return time.time_since_epoch().count(); }
  bool is_news(Clock::time_point now);

  std::atomic<std::uint32_t> failures_in_a_row_ = 0;
  std::atomic<std::uint32_t> ejections_in_a_row_ = 0;
  std::atomic<std::int64_t> retry_at_ = 0;  // 0: not marked
  std::atomic<std::int64_t> last_failure_ = 0;
  std::atomic<bool> is_told_ = false;         // that it fails
  std::atomic<std::int64_t> tell_again_ = 0;  // not before
};

}  // namespace userspace
