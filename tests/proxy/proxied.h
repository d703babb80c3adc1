// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <cstdlib>
#include <functional>
#include <future>
#include <string>
#include <utility>
#include <vector>

#include "tests/support/client.h"
#include "tests/support/environment.h"
#include "tests/support/fallback_proxy.h"
#include "tests/support/named_server.h"
#include "tests/support/observe.h"
#include "tests/support/process.h"
#include "tests/support/restrict.h"
#include "tests/support/stream.h"
#include "tests/support/tcp.h"
#include "tests/support/toml.h"

namespace support {

/// Where the service of a test is, as a rule. All of 127.0.0.0/8 is local.
inline constexpr const char* vip = "127.0.1.1";
inline constexpr std::uint16_t vip_port = 80;

inline Service web(std::vector<Backend> backends, std::string more = {}) {
  return {"web", vip, vip_port, std::move(backends), "refuse", std::move(more)};
}

/// A client's connection and the backend's end of it.
struct Connected {
  Fd client;
  Fd backend;
};

inline Connected connect_through(const TcpListener& backend) {
  Fd client = dial(vip, vip_port);
  return {std::move(client), backend.accept()};
}

/// A test of the program fallback_proxy in a network namespace with nothing but `lo`.
class Proxied : public testing::Test {
 protected:
  void SetUp() override {
    if (missing_privilege().empty()) return;
    if (std::getenv("CLUSTERIP_REQUIRE_PRIVILEGE") != nullptr) FAIL() << missing_privilege();
    GTEST_SKIP() << missing_privilege();
  }
};

/// At the same time as what follows; what it throws, get() of the result throws.
[[nodiscard]] inline std::future<void> meanwhile(std::function<void()> function) {
  return std::async(std::launch::async, std::move(function));
}

/// The share of one processor that the proxy takes during this time. Less than this is no spin.
inline constexpr double no_spin = 0.25;
inline double load(const FallbackProxy& proxy, std::chrono::milliseconds time) {
  const auto before = proxy.cpu_time();
  const auto end = std::chrono::steady_clock::now() + time;
  eventually([&] { return std::chrono::steady_clock::now() > end; });
  return std::chrono::duration<double>(proxy.cpu_time() - before) / std::chrono::duration<double>(time);
}

}  // namespace support
