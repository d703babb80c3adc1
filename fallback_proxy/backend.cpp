// SPDX-License-Identifier: BSD-2-Clause
#include "fallback_proxy/backend.h"

#include <netinet/in.h>

#include <algorithm>
#include <cstring>

#include "config/values.h"

namespace userspace {
namespace {

constexpr std::chrono::seconds first_pause{1};
constexpr std::uint32_t max_doublings = 5;  // 32 s
constexpr std::uint32_t max_eject_doublings = 4;

Clock::duration pause_after(std::uint32_t failures) {
  return first_pause * (1U << std::min(failures > 0 ? failures - 1 : 0, max_doublings));
}

}  // namespace

SocketAddress::SocketAddress(const config::Address& address, std::uint16_t port) {
  if (address.is_v4()) {
    storage.v4.sin_family = AF_INET;
    storage.v4.sin_port = htons(port);
    storage.v4.sin_addr.s_addr = htonl(address.to_v4().to_uint());
    length = sizeof storage.v4;
  } else {
    storage.v6.sin6_family = AF_INET6;
    storage.v6.sin6_port = htons(port);
    const auto bytes = address.to_v6().to_bytes();
    std::memcpy(&storage.v6.sin6_addr, bytes.data(), bytes.size());
    length = sizeof storage.v6;
  }
}

config::Address SocketAddress::address() const {
  if (family() == AF_INET) return boost::asio::ip::address_v4(ntohl(storage.v4.sin_addr.s_addr));
  boost::asio::ip::address_v6::bytes_type bytes;
  std::memcpy(bytes.data(), &storage.v6.sin6_addr, bytes.size());
  return boost::asio::ip::address_v6(bytes);
}

std::uint16_t SocketAddress::port() const {
  return ntohs(family() == AF_INET ? storage.v4.sin_port : storage.v6.sin6_port);
}

std::string SocketAddress::text() const { return config::to_text(address(), port()); }

bool is_connected_to_itself(int fd, const SocketAddress& peer) {
  SocketAddress own;
  own.length = sizeof own.storage;
  return ::getsockname(fd, &own.storage.any, &own.length) == 0 && own.port() == peer.port() &&
         own.address() == peer.address();
}

bool Backend::admits(Clock::time_point now) {
  std::int64_t retry_at = retry_at_.load(std::memory_order_relaxed);
  if (retry_at == 0) return true;
  if (retry_at > ticks(now)) return false;
  const auto next = now + pause_after(failures_in_a_row_.load(std::memory_order_relaxed));
  return retry_at_.compare_exchange_strong(retry_at, ticks(next), std::memory_order_relaxed);
}

bool Backend::connected() {
  connects.fetch_add(1, std::memory_order_relaxed);
  // Read first: the cache line stays shared while all is well.
  if (retry_at_.load(std::memory_order_relaxed) == 0 && failures_in_a_row_.load(std::memory_order_relaxed) == 0)
    return false;
  failures_in_a_row_.store(0, std::memory_order_relaxed);
  ejections_in_a_row_.store(0, std::memory_order_relaxed);
  retry_at_.store(0, std::memory_order_relaxed);
  return is_told_.exchange(false, std::memory_order_relaxed);
}

std::optional<Clock::duration> Backend::failed(Clock::time_point now, Clock::time_point began) {
  failures.fetch_add(1, std::memory_order_relaxed);
  if (ticks(began) < last_failure_.load(std::memory_order_relaxed)) return {};
  last_failure_.store(ticks(now), std::memory_order_relaxed);
  const std::uint32_t in_a_row = failures_in_a_row_.fetch_add(1, std::memory_order_relaxed) + 1;
  const auto pause = pause_after(in_a_row);
  retry_at_.store(ticks(now + pause), std::memory_order_relaxed);
  if (!is_news(now)) return {};
  return pause;
}

bool Backend::is_news(Clock::time_point now) {
  // One that is the only one is tried although it has just failed, and may come and go many times a second.
  if (ticks(now) < tell_again_.load(std::memory_order_relaxed)) return false;
  if (is_told_.exchange(true, std::memory_order_relaxed)) return false;
  tell_again_.store(ticks(now + first_pause), std::memory_order_relaxed);
  return true;
}

std::optional<Clock::duration> Backend::mark_left(Clock::time_point now) const {
  const std::int64_t left = retry_at_.load(std::memory_order_relaxed) - ticks(now);
  if (left <= 0) return {};
  return Clock::duration(left);
}

bool Backend::connected_unless_ejected(Clock::time_point now) {
  if (!is_marked(now)) return connected();
  connects.fetch_add(1, std::memory_order_relaxed);
  return false;
}

bool Backend::failed_too_often(Clock::time_point now, std::uint32_t most) {
  failures.fetch_add(1, std::memory_order_relaxed);
  if (is_marked(now)) return false;
  return failures_in_a_row_.fetch_add(1, std::memory_order_relaxed) + 1 >= most;
}

std::optional<Clock::duration> Backend::eject(Clock::time_point now, Clock::duration time) {
  const std::uint32_t before = ejections_in_a_row_.fetch_add(1, std::memory_order_relaxed);
  const auto pause = time * (1U << std::min(before, max_eject_doublings));
  retry_at_.store(ticks(now + pause), std::memory_order_relaxed);
  if (!is_news(now)) return {};
  return pause;
}

}  // namespace userspace
