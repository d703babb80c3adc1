// SPDX-License-Identifier: BSD-2-Clause
//
// The fast path and the userspace engine as one: a configuration is carried by both, each service by the one that can.
// With them go what health checks say of backends, and the canary. Everything happens in the thread of the io_context.
#pragma once

#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "cli/outcome.h"
#include "cli/plugin.h"
#include "config/config.h"
#include "fallback_proxy/proxy.h"
#include "health/checker.h"
#include "run/fast_path.h"
#include "run/status.h"

namespace run {

class Engines {
 public:
  using Carried = std::expected<void, cli::Failure>;

  /// `asked`: the engine that the command line asks for, instead of [engine] mode. `plugin` null: no fast path, for the
  /// reason `no_plugin`, or, without one, since the program has none. [engine] is that of `first` for good.
  Engines(boost::asio::io_context& io, std::optional<config::EngineMode> asked, const cli::Plugin* plugin,
          std::string no_plugin, const config::Config& first);

  // The beginning

  /// The fast path, or the reason why there is none.
  Carried open();
  /// What an earlier process has left of services; none without a fast path.
  [[nodiscard]] std::vector<cli::SeenService> pinned() const;
  /// The first configuration. `text` says the same as `config`, `name` stands for it in messages.
  Carried carry_first(config::Config config, std::string_view text, const std::string& name);
  /// A fast path that an earlier process left would go on rewriting: now that the userspace engine serves, it goes.
  void remove_stale_fast_path();
  /// Proves the hook, now, and again after a pause.
  void prove();

  // Changes

  /// All or nothing: on failure, what serves goes on serving. A service that moves between the engines is served at
  /// every moment: the userspace engine listens before the fast path lets go, and lets go when the fast path has taken
  /// it.
  Carried carry(config::Config config, std::string_view text, const std::string& name);
  /// Other backends for services()[place], at the cost of that service; the userspace engine has them only with the
  /// next apply_backends(). On failure, the old ones stay.
  Carried set_backends(std::size_t place, const std::vector<config::Backend>& backends);
  void apply_backends();

  /// Behind the io_context's end: on_exit.
  void leave();

  // What there is

  /// The program has no fast path, and no reason for that but what it is: another process may take over from it.
  [[nodiscard]] bool can_replace() const { return plugin_ == nullptr && no_plugin_.empty(); }
  [[nodiscard]] const config::Config& config() const { return config_; }  // that serves
  [[nodiscard]] FastPath* fast_path() { return fast_ ? &*fast_ : nullptr; }
  [[nodiscard]] userspace::Proxy& proxy() { return proxy_; }
  [[nodiscard]] std::string summary() const;
  /// A canary that is older than a second is sent again.
  void look_again();
  /// All that the engines know of themselves, and of the services.
  void tell(Status& status) const;

 private:
  /// Which engine carries a service, and why.
  struct Carrier {
    config::EngineMode engine = config::EngineMode::userspace;
    std::string reason;
  };
  using BackendName = std::tuple<std::string, config::Address, std::uint16_t>;  // of a service

  Carried do_without(const cli::Failure& why);
  [[nodiscard]] bool is_carried(const config::Service& service) const;
  [[nodiscard]] bool is_proxied(const config::Service& service) const;
  [[nodiscard]] std::string reason_against(const config::Service& service) const;
  [[nodiscard]] std::string only_bpf(const config::Service& service) const;
  [[nodiscard]] config::Config proxied_part(const config::Config& config) const;
  Carried learn_carriers(config::Config& config);
  void adopt(config::Config config);
  void tell_what_serves() const;
  void health_changed(std::span<const health::Change> changes);
  void set_state(const std::string& service, const config::Address& address, std::uint16_t port,
                 config::BackendState state);
  void set_again();
  void reconcile_states();
  void keep_reasons();
  void look_at_canary();
  [[nodiscard]] ServiceStatus unserved(const config::Service& service) const;
  void explain(ServiceStatus& service) const;

  const std::optional<config::EngineMode> asked_;
  const config::Engine engine_;  // until the end, whatever a reload reads
  const config::EngineMode mode_;
  const cli::Plugin* plugin_;
  const std::string no_plugin_;
  std::string no_fast_path_;
  std::optional<FastPath> fast_;
  std::map<std::string, Carrier> carriers_;  // by service; of the fast path's say
  config::Config config_;
  std::map<BackendName, std::string> down_reasons_;
  bool has_backends_to_apply_ = false;
  std::set<BackendName> unset_;  // the fast path could not be told
  std::uint64_t went_up_ = 0;
  std::uint64_t went_down_ = 0;
  std::optional<cli::Canary> canary_;
  bool has_told_of_canary_ = false;  // that it fails
  userspace::Clock::time_point canary_time_;
  boost::asio::steady_timer canary_timer_;
  health::Checker checker_;
  userspace::Proxy proxy_;
};

}  // namespace run
