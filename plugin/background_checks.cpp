// SPDX-License-Identifier: BSD-2-Clause
#include "plugin/background_checks.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <cerrno>
#include <chrono>
#include <exception>
#include <functional>
#include <system_error>
#include <thread>

namespace plugin {

// Until a change that could not be published is tried again.
constexpr std::chrono::seconds retry_pause{1};

class BackgroundChecks::Thread {
 public:
  /// Throws what std::thread throws.
  explicit Thread(BackgroundChecks& owner)
      : checker(io, [&owner](std::span<const health::Change> changes) { owner.changed(changes); }),
        retry(io),
        work_(io.get_executor()) {
    // Signals are the host's.
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      thread_ = std::thread([this] { run(); });
    } catch (...) {
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
      throw;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_setname_np(thread_.native_handle(), "clusterip-check");
  }
  ~Thread() { end(); }
  Thread(const Thread&) = delete;
  Thread& operator=(const Thread&) = delete;

  void end() {
    io.stop();
    if (thread_.joinable()) thread_.join();
  }

  boost::asio::io_context io;
  health::Checker checker;  // in this thread only
  boost::asio::steady_timer retry;
  std::size_t applies = 0;    // posted and not done; under the handle's lock
  bool will_publish = false;  // under the handle's lock

 private:
  void run() {
    for (;;) {
      try {
        io.run();
        return;
      } catch (const std::exception&) {
        // Out of memory in one check: the host goes on, and so do the other checks.
        continue;
      }
    }
  }

  boost::asio::executor_work_guard<boost::asio::io_context::executor_type> work_;
  std::thread thread_;
};

BackgroundChecks::BackgroundChecks(BpfEngine& engine, std::recursive_mutex& handle)
    : engine_(engine), handle_(handle) {}

BackgroundChecks::~BackgroundChecks() { stop(); }

Result<void> BackgroundChecks::load(config::Config config) {
  std::map<std::string, config::Service> asked;
  for (const config::Service& service : config.services) {
    if (service.health) asked.emplace(service.name, service);
  }
  // Before anything changes: it may fail.
  std::map<std::string, config::Service> before = std::exchange(services_, std::move(asked));
  auto started = start();
  for (config::Service& service : config.services) mark_down(service);
  auto loaded = started ? engine_.load(std::move(config)) : started;
  if (!loaded) {
    services_ = std::move(before);
    return loaded;
  }
  // With the pin path of [engine], it is only now that there is something to learn from.
  if (thread_ && !std::exchange(has_begun_, true)) learn_adopted_states();
  forget_unchecked();
  check_services();
  return {};
}

/// An earlier process may have left backends down. They stay so until a check says otherwise.
void BackgroundChecks::learn_adopted_states() {
  const auto adopted = engine_.status();
  if (!adopted) return;  // nothing is loaded yet
  for (const ServiceStatus& status : *adopted) {
    if (!services_.contains(status.service.name)) continue;
    for (const config::Backend& backend : status.service.backends) {
      if (backend.state == config::BackendState::down)
        set_down(status.service.name, {backend.address, backend.port}, true);
    }
  }
}

void BackgroundChecks::mark_down(config::Service& service) const {
  const auto down = down_.find(service.name);
  if (down == down_.end() || !services_.contains(service.name)) return;
  for (config::Backend& backend : service.backends) {
    if (backend.state == config::BackendState::active && down->second.contains({backend.address, backend.port}))
      backend.state = config::BackendState::down;
  }
}

/// What was down and is not checked any more is what the configuration says: the engine keeps `down` for services with
/// health only.
void BackgroundChecks::forget_unchecked() {
  std::erase_if(down_, [this](const auto& entry) { return !services_.contains(entry.first); });
}

Result<void> BackgroundChecks::set_backends(const std::string& name, std::vector<config::Backend> backends) {
  const auto service = services_.find(name);
  if (service == services_.end()) return engine_.set_backends(name, std::move(backends));
  config::Service next = service->second;
  next.backends = backends;
  mark_down(next);
  if (auto set = engine_.set_backends(name, std::move(next.backends)); !set) return set;
  service->second.backends = std::move(backends);
  check_services();
  return {};
}

Result<void> BackgroundChecks::set_backend_state(const std::string& name, const config::Address& address,
                                                 std::uint16_t port, config::BackendState state) {
  const auto down = down_.find(name);
  const bool is_down = down != down_.end() && down->second.contains({address, port});
  const auto shown = is_down && state == config::BackendState::active ? config::BackendState::down : state;
  if (auto set = engine_.set_backend_state(name, address, port, shown); !set) return set;
  const auto service = services_.find(name);
  if (service == services_.end()) return {};
  for (config::Backend& backend : service->second.backends) {
    if (backend.address == address && backend.port == port) backend.state = state;
  }
  check_services();
  return {};
}

Result<void> BackgroundChecks::start() {
  if (thread_ || services_.empty()) return {};
  try {
    thread_ = std::make_unique<Thread>(*this);
  } catch (const std::system_error& error) {
    return fail_errno(error.code().value(), "starting a thread for health checks");
  }
  return {};
}

Result<void> BackgroundChecks::resume() {
  if (thread_) return {};
  auto started = start();
  if (started) check_services();
  return started;
}

void BackgroundChecks::stop() {
  if (thread_) thread_->end();  // by then nothing uses the pointer any more
  thread_.reset();
}

void BackgroundChecks::check_services() {
  if (!thread_) return;
  std::vector<config::Service> services;
  services.reserve(services_.size());
  for (const auto& [name, service] : services_) {
    services.push_back(service);
    mark_down(services.back());
  }
  ++thread_->applies;
  boost::asio::post(thread_->io, [this, services = std::move(services)] {
    const std::lock_guard lock(handle_);
    thread_->checker.apply(services);
    // What changes meanwhile belongs to an earlier set of services: it is found here.
    if (--thread_->applies == 0) reconcile();
  });
}

/// A service may share with an earlier one what is known already.
void BackgroundChecks::reconcile() {
  std::map<std::string, std::set<Endpoint>> down;
  for (const auto& [name, service] : services_) {
    for (const config::Backend& backend : service.backends) {
      if (thread_->checker.is_down(name, backend.address, backend.port))
        down[name].emplace(backend.address, backend.port);
    }
  }
  for (const auto& [name, service] : services_) {
    const auto before = down_.find(name);
    const auto after = down.find(name);
    const bool had = before != down_.end();
    const bool has = after != down.end();
    if (had != has || (had && before->second != after->second)) unpublished_.insert(name);
  }
  down_ = std::move(down);
  publish_later();
}

void BackgroundChecks::changed(std::span<const health::Change> changes) {
  const std::lock_guard lock(handle_);
  if (thread_->applies > 0) return;
  for (const health::Change& change : changes) {
    set_down(change.service, {change.address, change.port}, !change.is_up);
    unpublished_.insert(change.service);
  }
  publish_later();
}

void BackgroundChecks::set_down(const std::string& service, const Endpoint& backend, bool is_down) {
  if (is_down) {
    down_[service].insert(backend);
    return;
  }
  const auto found = down_.find(service);
  if (found == down_.end()) return;
  found->second.erase(backend);
  if (found->second.empty()) down_.erase(found);
}

/// Behind the results that are there already: a service costs as much for one backend as for many.
void BackgroundChecks::publish_later() {
  if (unpublished_.empty() || std::exchange(thread_->will_publish, true)) return;
  boost::asio::post(thread_->io, [this] {
    const std::lock_guard lock(handle_);
    thread_->will_publish = false;
    publish();
  });
}

void BackgroundChecks::publish() {
  for (const std::string& name : std::exchange(unpublished_, {})) {
    const auto service = services_.find(name);
    if (service == services_.end()) continue;
    config::Service next = service->second;
    mark_down(next);
    const auto published = engine_.set_backends(name, std::move(next.backends));
    // What this engine does not carry (CLUSTERIP_ALLOW_PARTIAL) is another's to check.
    if (!published && published.error().code != -ENOENT && published.error().code != -EOPNOTSUPP)
      unpublished_.insert(name);
  }
  if (unpublished_.empty()) return;
  thread_->retry.expires_after(retry_pause);
  thread_->retry.async_wait([this](const boost::system::error_code& error) {
    const std::lock_guard lock(handle_);
    if (!error) publish_later();
  });
}

}  // namespace plugin
