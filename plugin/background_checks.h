// SPDX-License-Identifier: BSD-2-Clause
//
// CLUSTERIP_BACKGROUND: the health checks of one handle, in a thread of its own. The handle has a lock, which every
// call of the C ABI takes, and this thread, too, when it has something to change.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "config/config.h"
#include "health/checker.h"
#include "plugin/bpf_engine.h"
#include "plugin/system_error.h"

namespace plugin {

class BackgroundChecks {
 public:
  /// Both must outlive this object. Starts no thread yet.
  BackgroundChecks(BpfEngine& engine, std::recursive_mutex& handle);
  /// Without the handle's lock.
  ~BackgroundChecks();
  BackgroundChecks(const BackgroundChecks&) = delete;
  BackgroundChecks& operator=(const BackgroundChecks&) = delete;

  // In place of the engine's, under the handle's lock. A backend of a service with `health` is active when the host and
  // the checks agree that it is.

  /// The first that asks for health starts the thread; what is down by then is what the engine has adopted so.
  Result<void> load(config::Config config);
  Result<void> set_backends(const std::string& service, std::vector<config::Backend> backends);
  Result<void> set_backend_state(const std::string& service, const config::Address& address, std::uint16_t port,
                                 config::BackendState state);

  /// Goes on after stop(), if there is something to check. Under the handle's lock.
  Result<void> resume();
  /// Ends the thread. Without the handle's lock, for which it may be waiting.
  void stop();

 private:
  class Thread;
  using Endpoint = std::pair<config::Address, std::uint16_t>;

  Result<void> start();
  void mark_down(config::Service& service) const;
  void learn_adopted_states();
  void check_services();
  void forget_unchecked();
  void reconcile();
  void changed(std::span<const health::Change> changes);
  void set_down(const std::string& service, const Endpoint& backend, bool is_down);
  void publish_later();
  void publish();

  BpfEngine& engine_;
  std::recursive_mutex& handle_;
  std::map<std::string, config::Service> services_;  // that ask for health, with the states that others gave
  std::map<std::string, std::set<Endpoint>> down_;   // by the checks
  std::set<std::string> unpublished_;                // services whose states have changed since
  bool has_begun_ = false;
  std::unique_ptr<Thread> thread_;
};

}  // namespace plugin
