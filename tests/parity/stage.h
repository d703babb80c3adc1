// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <gmock/gmock.h>

#include <boost/json.hpp>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "tests/support/client.h"
#include "tests/support/fallback_proxy.h"
#include "tests/support/tcp.h"
#include "tests/support/toml.h"

namespace parity {

enum class Engine : std::uint8_t { bpf, userspace };

/// VIPs of no machine; the userspace engine makes them addresses of this host.
inline constexpr const char* vip = "10.96.0.1";
inline constexpr const char* other_vip = "10.96.0.2";
inline constexpr const char* vip6 = "fd00:96::1";
inline constexpr std::uint16_t port = 80;

/// What a row is checked on: `clusterip run` with one of the engines, and the process of the test as its client. No
/// row asks which engine it is on, but for what the table says is different.
class Stage {
 public:
  using MakeFiles = std::function<std::shared_ptr<const support::FallbackProxy::Files>(const std::string& text,
                                                                                       const std::string& engine)>;

  Stage(Engine engine, bool differs, MakeFiles make_files)
      : engine_(engine), differs_(differs), make_files_(std::move(make_files)) {}

  /// From now on these services are served, by this engine. `keys`: more lines of the table [engine].
  void serve(const std::vector<support::Service>& services, const std::string& keys = {}) {
    running_.reset();  // one at a time: pins and routes have one owner
    running_ = std::make_unique<support::RunningService>(
        make_files_(text(services), keys),
        std::vector<std::string>{"--engine", engine_ == Engine::bpf ? "bpf" : "userspace"});
  }

  /// Another configuration; returns what was logged about it.
  std::string reload(const std::vector<support::Service>& services) { return running_->reload(text(services)); }

  /// A service as the status has it.
  boost::json::object status_of(const std::string& service) const {
    const support::Finished shown =
        support::run({CLUSTERIP_COMMAND, "status", "--control", running_->files()->control(), "--json"});
    const auto status = boost::json::parse(shown.out).as_object();
    for (const auto& one : status.at("services").as_array())
      if (one.at("name").as_string() == service) return one.as_object();
    throw std::runtime_error("no service " + service);
  }

  /// What a client sees that is refused by either engine.
  support::Answer refused(int error) const {
    return engine_ == Engine::bpf ? support::refused_by_program(error) : support::refused_with(error);
  }

  /// What is to be seen in a row that differs.
  template <class Seen>
  Seen either(Seen bpf, Seen userspace) const {
    if (!differs_) throw std::logic_error("the table says that this row does not differ");
    return engine_ == Engine::bpf ? std::move(bpf) : std::move(userspace);
  }

 private:
  static std::string text(const std::vector<support::Service>& services) {
    support::Userspace userspace;
    userspace.local_vips = true;
    userspace.drain_timeout = "1s";
    return support::proxy_toml(services, userspace);
  }

  Engine engine_;
  bool differs_;
  MakeFiles make_files_;
  std::unique_ptr<support::RunningService> running_;
};

/// A service at the VIP of most rows.
inline support::Service web(std::vector<support::Backend> backends, std::string more = {},
                            std::string no_backend = "refuse") {
  return {"web", vip, port, std::move(backends), std::move(no_backend), std::move(more)};
}

/// Who answered so many connects, or the name of the errno, and how often.
inline std::map<std::string, int> ask_often(int times, const std::string& address = vip) {
  std::map<std::string, int> answers;
  for (int i = 0; i < times; ++i) {
    const support::Answer answer = support::ask(address, port);
    ++answers[answer.error != 0 ? ::strerrorname_np(answer.error) : answer.text];
  }
  return answers;
}

}  // namespace parity
