// SPDX-License-Identifier: BSD-2-Clause
//
// The fast path as the running service has it: the plugin, through the C ABI that any host has.
#pragma once

#include <cstdint>
#include <expected>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "cli/endpoint.h"
#include "cli/pinned.h"
#include "cli/plugin.h"
#include "config/config.h"

namespace run {

class FastPath {
 public:
  /// The plugin must outlive the object. `is_partial`: services that this kernel cannot carry are left out, rather than
  /// refuse all.
  static std::expected<FastPath, cli::Failure> open(const cli::Plugin& plugin, bool is_partial);

  /// Makes the configuration the one that serves, all of it or nothing; the first time, attaches. `name` stands for the
  /// file in messages.
  std::expected<void, cli::Failure> load(std::string_view text, const std::string& name);
  /// Again, when the canary has shown that it is not attached any more.
  std::expected<void, cli::Failure> attach();
  /// What the userspace engine serves is refused until the next load.
  std::expected<void, cli::Failure> refuse_left_out();
  /// Takes it away, pins included.
  std::expected<void, cli::Failure> detach();

  std::expected<std::vector<cli::SeenService>, cli::Failure> services() const;
  cli::Canary canary() const { return cli::run_canary(*plugin_, handle_.get()); }
  std::expected<clusterip_resolution, cli::Failure> resolve(const cli::Endpoint& vip) const;

  /// Replaces the backends of one service: costs what the service is large.
  std::expected<void, cli::Failure> set_backends(const std::string& service,
                                                 const std::vector<config::Backend>& backends);
  std::expected<void, cli::Failure> set_backend_state(const std::string& service, const config::Address& address,
                                                      std::uint16_t port, config::BackendState state);

  /// The descriptor to poll for events; for so long the kernel writes them. It may be another one after a load.
  std::expected<int, cli::Failure> enable_events(std::uint32_t seconds);
  void read_events(const std::function<void(const clusterip_event&)>& visit);

 private:
  FastPath(const cli::Plugin& plugin, cli::Handle handle) : plugin_(&plugin), handle_(std::move(handle)) {}

  const cli::Plugin* plugin_;
  cli::Handle handle_;
  bool is_attached_ = false;
};

}  // namespace run
