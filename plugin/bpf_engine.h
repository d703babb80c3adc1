// SPDX-License-Identifier: BSD-2-Clause
//
// The fast path as one object: what a `clusterip` handle of the C ABI holds. Used by one thread at a time.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "config/config.h"
#include "plugin/attachment.h"
#include "plugin/canary.h"
#include "plugin/cgroup.h"
#include "plugin/event_reader.h"
#include "plugin/maps.h"
#include "plugin/pin_directory.h"
#include "plugin/probe.h"
#include "plugin/publisher.h"
#include "plugin/system_error.h"

namespace plugin {

struct EngineOptions {
  std::string cgroup;          // empty: that of the configuration, by default the root of the hierarchy
  std::string pin;             // empty: nothing is pinned
  bool engine_table = false;   // a pin path left empty is taken from the configuration, too
  bool any_mode = false;       // [engine] mode is not asked
  bool allow_partial = false;  // leave out services that this kernel cannot carry, rather than refuse all
};

enum class Verdict : std::uint8_t { pass, rewritten, no_backend, no_service };

/// What a connect() would meet.
struct Resolution {
  Verdict verdict = Verdict::pass;
  std::string service;
  std::uint32_t backends = 0;  // those that may be chosen now
  std::optional<config::Backend> backend;
  bool is_left_out = false;  // the userspace engine carries the service; to this one it is nobody's
};

struct BackendStatus {
  counters counted{};
  std::uint32_t live = 0;
  std::chrono::milliseconds ejected{0};  // for so long still
};

struct ServiceStatus {
  config::Service service;
  counters total{};
  std::vector<BackendStatus> backends;  // of each of service.backends
  std::string reason;                   // what the fast path cannot do for it; or, when it does not carry it, why
  bool is_carried = true;
};

/// Where a connected socket goes, and what it asked for.
struct Destination {
  config::Address vip;
  std::uint16_t port = 0;
};

class BpfEngine {
 public:
  static Result<std::unique_ptr<BpfEngine>> open(EngineOptions options);
  ~BpfEngine();
  BpfEngine(const BpfEngine&) = delete;
  BpfEngine& operator=(const BpfEngine&) = delete;

  Result<void> load(config::Config config);
  Result<void> set_backends(std::string_view service, std::vector<config::Backend> backends);
  Result<void> set_backend_state(std::string_view service, const config::Address& address, std::uint16_t port,
                                 config::BackendState state);
  Result<void> refuse_left_out();
  Result<void> attach();
  Result<void> detach();

  Result<Resolution> resolve(const config::Address& vip, std::uint16_t port, config::Protocol protocol);
  Result<std::vector<ServiceStatus>> status();
  Result<CanaryResult> canary();

  /// Has the kernel write events for so long (0: not any more); returns the descriptor to poll, which stays ours.
  Result<int> enable_events(std::chrono::seconds time);

  /// Visits the events that are there; returns how many, or the first negative value of `visit`.
  Result<int> read_events(const std::function<int(const event&)>& visit);

  /// -ENOENT: the socket's last connect() was not to a VIP.
  Result<Destination> original_destination(int socket);

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
  Result<Cgroup> own_cgroup() const;
  Result<std::unique_ptr<State>> fresh_state(std::span<config::Service> services, bool peer_names);
  Result<std::vector<config::Service>> leave_out_unsupported(config::Config& config) const;
  std::string reason_left_out(const config::Service& service) const;
  void keep_down(std::span<config::Service> services) const;
  Hooks needed_hooks(std::span<const PublishedService> published, bool peer_names) const;
  Result<void> attach_missing();
  void end_sockets_of_left();
  Result<void> load_services(config::Config& config);
  Result<void> publish(std::span<config::Service> services, bool peer_names);
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
  Attachment attachment_;
  std::optional<EventReader> events_;
  std::string sweep_obstacle_;                                 // why sockets of backends that left may still be there
  std::unordered_map<std::string, config::Service> left_out_;  // to the userspace engine, as they were loaded
  config::EngineMode mode_ = config::EngineMode::automatic;    // [engine] mode of what was loaded
};

}  // namespace plugin
