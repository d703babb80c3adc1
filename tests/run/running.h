// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <fmt/format.h>
#include <gmock/gmock.h>

#include <boost/json.hpp>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "tests/support/fallback_proxy.h"
#include "tests/support/fixture.h"

namespace support {

inline constexpr int fine = 0, failed = 1, usage = 2, configuration = 3, cannot = 4;

inline constexpr const char* fast_vip = "10.96.0.1";
inline constexpr const char* proxied_vip = "127.0.1.2";  // local without a route
inline constexpr std::uint16_t vip_port = 80;

/// A service of the fast path, where there is one.
inline Service web(std::vector<Backend> backends, std::string more = {}) {
  return {"web", fast_vip, vip_port, std::move(backends), "refuse", std::move(more)};
}

/// A service that asks for the userspace engine.
inline Service proxied(std::vector<Backend> backends, std::string more = {}) {
  return {"proxied",           proxied_vip, vip_port,
          std::move(backends), "refuse",    "engine = \"userspace\"\n" + std::move(more)};
}

/// A test of `clusterip run`, attached to the test's cgroup and pinned in the test's BPF filesystem.
class Running : public Integration {
 protected:
  std::shared_ptr<const FallbackProxy::Files> files(const std::string& text, const std::string& engine = {}) const {
    auto made = std::make_shared<FallbackProxy::Files>(
        fmt::format("cgroup = \"{}\"\npin = \"{}\"\n{}", cgroup().path(), pin(), engine));
    made->write(text);
    return made;
  }

  static Finished clusterip(std::vector<std::string> words) {
    words.insert(words.begin(), CLUSTERIP_COMMAND);
    words.insert(words.end(), {"--plugin", CLUSTERIP_PLUGIN_PATH});
    return run(words);
  }

  /// The status of the service as `clusterip status --json` has it.
  static boost::json::object status(const FallbackProxy::Files& files) {
    const Finished shown = clusterip({"status", "--control", files.control(), "--json"});
    EXPECT_EQ(shown.exit_code, fine) << shown.err;
    return boost::json::parse(shown.out).as_object();
  }

  static const boost::json::object& service_of(const boost::json::object& status, std::string_view name) {
    for (const auto& service : status.at("services").as_array()) {
      if (service.at("name").as_string() == name) return service.as_object();
    }
    throw std::runtime_error("no service " + std::string(name));
  }

  static std::string text_of(const boost::json::value& value) { return boost::json::value_to<std::string>(value); }

  void TearDown() override {
    // What on_exit = "keep" has left.
    clusterip({"unload", "--pin", pin()});
    Integration::TearDown();
  }
};

}  // namespace support
