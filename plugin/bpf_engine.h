// SPDX-License-Identifier: BSD-2-Clause
//
// The fast path as one object: what a `clusterip` handle of the C ABI holds. Used by one thread at a time.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "config/config.h"
#include "plugin/attachment.h"
#include "plugin/canary.h"
#include "plugin/cgroup.h"
#include "plugin/maps.h"
#include "plugin/pin_directory.h"
#include "plugin/probe.h"
#include "plugin/publisher.h"
#include "plugin/system_error.h"

namespace plugin {

struct EngineOptions {
  std::string cgroup;         // empty: that of the configuration, by default the root of the hierarchy
  std::string pin;            // empty: nothing is pinned
  bool engine_table = false;  // a pin path left empty is taken from the configuration, too
};

enum class Verdict : std::uint8_t { pass, rewritten, no_backend, no_service };

/// What a connect() would meet.
struct Resolution {
  Verdict verdict = Verdict::pass;
  std::string service;
  std::uint32_t backends = 0;  // active ones
  std::optional<config::Backend> backend;
};

struct ServiceStatus {
  config::Service service;
  counters total{};
  std::vector<std::uint64_t> connects;  // of each of service.backends
};

class BpfEngine {
 public:
  static Result<std::unique_ptr<BpfEngine>> open(EngineOptions options);
  ~BpfEngine();
  BpfEngine(const BpfEngine&) = delete;
  BpfEngine& operator=(const BpfEngine&) = delete;

  Result<void> load(config::Config config);
  Result<void> set_backends(std::string_view service, std::vector<config::Backend> backends);
  Result<void> attach();
  Result<void> detach();

  Result<Resolution> resolve(const config::Address& vip, std::uint16_t port, config::Protocol protocol);
  Result<std::vector<ServiceStatus>> status();
  Result<CanaryResult> canary();

 private:
  /// One set of maps, and its writer.
  struct State {
    explicit State(Maps m) : maps(std::move(m)) {}
    Maps maps;
    std::optional<Publisher> publisher;
  };

  explicit BpfEngine(EngineOptions options, Capabilities can) : options_(std::move(options)), can_(std::move(can)) {}

  Result<void> open_paths();
  Result<void> become_writer();
  Result<void> adopt();
  Result<void> drop_dead_attachment();
  Result<Cgroup> own_cgroup() const;
  Result<std::unique_ptr<State>> fresh_state(std::span<config::Service> services);
  Result<void> load_services(config::Config& config);
  Result<void> publish(std::span<config::Service> services);
  Result<void> detach_and_unpin();
  Result<void> make_live(State& next);
  Result<void> adopt_replacement(std::unique_ptr<State> next);
  void note_limits() const;
  Result<void> for_reading(const std::function<Result<void>(const Maps&)>& read);

  EngineOptions options_;
  Capabilities can_;
  config::Limits limits_;
  std::optional<PinDirectory> pins_;
  std::unique_ptr<State> state_;
  std::optional<Attachment> attachment_;
};

}  // namespace plugin
