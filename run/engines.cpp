// SPDX-License-Identifier: BSD-2-Clause
#include "run/engines.h"

#include <fmt/format.h>
#include <malloc.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "cli/pinned.h"
#include "cli/text.h"
#include "config/names.h"
#include "config/printable.h"
#include "config/values.h"

namespace run {
namespace {

using cli::Failure;
using config::EngineMode;
using namespace std::chrono_literals;

// How often the hook is proven, beside each look at the status.
constexpr auto canary_pause = 30s;
// Looks that come faster share what one canary has seen.
constexpr auto canary_age = 1s;

/// What the userspace engine has, and services that say themselves that they come to it. Which others do, the fast
/// path tells only when it has let them go.
config::Config with_what_is_about_to_come(config::Config part, const config::Config& next) {
  std::set<userspace::SocketName> names;
  for (const config::Service& service : part.services) names.emplace(service.vip, service.port, service.protocol);
  for (const config::Service& service : next.services) {
    const bool is_coming =
        service.engine == EngineMode::userspace || service.proxy_protocol != config::ProxyProtocol::none;
    if (is_coming && names.emplace(service.vip, service.port, service.protocol).second)
      part.services.push_back(service);
  }
  return part;
}

void warn_of_what_the_proxy_ignores(const config::Service& service) {
  const std::string name = config::printable(service.name);
  if (service.mark != 0) spdlog::warn("service {}: mark: the userspace engine marks no socket", name);
  if (service.no_backend != config::NoBackend::refuse)
    spdlog::warn("service {}: no_backend: the userspace engine refuses, whatever this says", name);
}

}  // namespace

Engines::Engines(boost::asio::io_context& io, std::optional<config::EngineMode> asked, const cli::Plugin* plugin,
                 std::string no_plugin, const config::Config& first)
    : asked_(asked),
      engine_(first.engine),
      mode_(asked.value_or(first.engine.mode)),
      plugin_(plugin),
      no_plugin_(std::move(no_plugin)),
      no_fast_path_(no_plugin_),
      canary_timer_(io),
      checker_(io, [this](std::span<const health::Change> changes) { health_changed(changes); }),
      proxy_(io, first) {}

// The beginning

Engines::Carried Engines::open() {
  if (mode_ == EngineMode::userspace) {
    if (!can_replace()) no_fast_path_ = asked_ ? "--engine userspace" : "engine.mode is \"userspace\"";
    return {};
  }
  if (plugin_ == nullptr) return do_without(Failure{.exit = cli::Exit::unsupported, .message = no_fast_path_});
  auto opened = FastPath::open(*plugin_, mode_ != EngineMode::bpf);
  if (!opened) return do_without(opened.error());
  fast_.emplace(std::move(*opened));
  return {};
}

/// Without a fast path, as `why` says. A failure when the engine bpf is asked for, or when it would not be this
/// kernel's or these privileges' doing.
Engines::Carried Engines::do_without(const Failure& why) {
  if (mode_ == EngineMode::bpf || why.exit != cli::Exit::unsupported) return std::unexpected(why);
  fast_.reset();
  no_fast_path_ = why.message;
  const std::string& cgroup = engine_.cgroup;
  spdlog::warn("no fast path, the userspace engine carries all services{}: {}",
               cgroup.empty() ? "" : ", for every process of this machine and not only for those of the cgroup",
               why.message);
  return {};
}

std::vector<cli::SeenService> Engines::pinned() const {
  if (!fast_) return {};
  const auto handle = cli::open_pinned(*plugin_, engine_.pin);
  if (!handle) return {};
  auto seen = cli::see_services(*plugin_, handle->get());
  return seen ? std::move(*seen) : std::vector<cli::SeenService>();
}

Engines::Carried Engines::carry_first(config::Config config, std::string_view text, const std::string& name) {
  if (fast_) {
    // An earlier process may have left its services refused: nobody passes to this engine before it listens.
    proxy_.apply(with_what_is_about_to_come({}, config));
    auto loaded = fast_->load(text, name);
    if (!loaded) loaded = do_without(loaded.error());
    if (!loaded) return loaded;
  }
  if (fast_) {
    if (auto seen = learn_carriers(config); !seen) return seen;
  }
  adopt(std::move(config));
  return {};
}

void Engines::remove_stale_fast_path() {
  const auto something = cli::anything_pinned(engine_.pin);
  if (fast_ || can_replace() || !something || !*something) return;
  std::string why = no_plugin_;
  if (plugin_ != nullptr) {
    auto error = cli::sized<clusterip_error>();
    const auto handle = cli::open_pinned(*plugin_, engine_.pin);
    if (handle && plugin_->detach(handle->get(), &error) == 0)
      return spdlog::info("the fast path that was left at {} is detached: the userspace engine serves", engine_.pin);
    why = handle ? static_cast<const char*>(error.message) : handle.error().message;
  }
  const std::string warning = fmt::format(
      "the fast path that was left at {0} decides first, and refuses connects to what a userspace engine "
      "has carried (sudo clusterip unload --pin {0}): {1}",
      engine_.pin, why);
  spdlog::warn("{}", warning);
  no_fast_path_ += "; " + warning;
}

// Changes

Engines::Carried Engines::carry(config::Config config, std::string_view text, const std::string& name) {
  if (fast_) {
    const config::Config before = proxied_part(config_);
    proxy_.apply(with_what_is_about_to_come(before, config));
    proxy_.wait_for_workers();
    auto loaded = fast_->load(text, name);
    if (loaded) loaded = learn_carriers(config);
    if (!loaded) {
      proxy_.apply(before);
      return loaded;
    }
  }
  adopt(std::move(config));
  return {};
}

Engines::Carried Engines::set_backends(std::size_t place, const std::vector<config::Backend>& backends) {
  config::Service& service = config_.services.at(place);
  if (is_carried(service)) {
    if (auto set = fast_->set_backends(service.name, backends); !set) return set;
  }
  service.backends = backends;
  has_backends_to_apply_ = has_backends_to_apply_ || is_proxied(service);
  return {};
}

void Engines::apply_backends() {
  if (!std::exchange(has_backends_to_apply_, false)) return;
  for (const std::string& problem : proxy_.apply(proxied_part(config_))) spdlog::warn("{}", problem);
}

/// Both engines have `config`, or are about to: what is left cannot fail.
void Engines::adopt(config::Config config) {
  checker_.apply(config.services);  // first: it tells what is down
  const auto problems = proxy_.apply(proxied_part(config));
  for (const std::string& problem : problems) spdlog::warn("{}", problem);
  config_ = std::move(config);
  if (fast_) reconcile_states();
  keep_reasons();
  tell_what_serves();
  // The parser's tree is several times as large as what serves, and stays in the heap otherwise.
  ::malloc_trim(0);
}

void Engines::leave() {
  if (!fast_) return;
  if (config_.engine.on_exit == config::OnExit::keep) {
    // Before the VIPs of the userspace engine are no addresses of this machine any more.
    if (const auto refused = fast_->refuse_left_out(); !refused)
      spdlog::error("connects to what the userspace engine has served may leave this machine: {}",
                    refused.error().message);
    const auto kept = cli::anything_pinned(engine_.pin);
    if (kept && !*kept)
      spdlog::error("the fast path ends with this process: {} was removed", engine_.pin);
    else
      spdlog::info("the fast path stays at {}", engine_.pin);
    return;
  }
  if (const auto detached = fast_->detach(); !detached)
    spdlog::error("{}", detached.error().message);
  else
    spdlog::info("the fast path is detached");
}

// Who carries what

bool Engines::is_carried(const config::Service& service) const {
  const auto found = carriers_.find(service.name);
  return fast_ && (found == carriers_.end() || found->second.engine == EngineMode::bpf);
}

bool Engines::is_proxied(const config::Service& service) const {
  return !is_carried(service) && service.engine != EngineMode::bpf;
}

/// Why the fast path does not carry it.
std::string Engines::reason_against(const config::Service& service) const {
  const auto found = carriers_.find(service.name);
  return fast_ && found != carriers_.end() ? found->second.reason : no_fast_path_;
}

/// It asks for the one engine that cannot carry it.
std::string Engines::only_bpf(const config::Service& service) const {
  const std::string reason = reason_against(service);
  return reason.empty() ? "it asks for the engine bpf, and this is the userspace engine"
                        : fmt::format("it asks for the engine bpf: {}", reason);
}

config::Config Engines::proxied_part(const config::Config& config) const {
  config::Config part{.engine = config.engine,
                      .limits = config.limits,
                      .userspace = config.userspace,
                      .metrics = config.metrics,
                      .kubernetes = {},
                      .services = {}};
  part.services.reserve(static_cast<std::size_t>(
      std::ranges::count_if(config.services, [this](const config::Service& service) { return is_proxied(service); })));
  for (const config::Service& service : config.services) {
    if (!is_proxied(service)) continue;
    config::Service& copy = part.services.emplace_back(service);
    for (config::Backend& backend : copy.backends) {
      if (checker_.is_down(service.name, backend.address, backend.port)) backend.state = config::BackendState::down;
    }
  }
  return part;
}

/// Which services the fast path carries, and which backends an earlier process has found down.
Engines::Carried Engines::learn_carriers(config::Config& config) {
  const auto seen = fast_->services();
  if (!seen) return std::unexpected(seen.error());
  carriers_.clear();
  std::map<std::string_view, const cli::SeenService*> by_name;
  for (const cli::SeenService& service : *seen) {
    by_name.emplace(service.name, &service);
    const bool is_carried = service.engine == CLUSTERIP_ENGINE_BPF;
    carriers_.emplace(service.name, Carrier{.engine = is_carried ? EngineMode::bpf : EngineMode::userspace,
                                            .reason = service.reason});
  }
  for (config::Service& service : config.services) {
    const auto found = by_name.find(service.name);
    if (!service.health || found == by_name.end()) continue;
    for (const cli::SeenBackend& backend : found->second->backends) {
      if (backend.state != CLUSTERIP_DOWN) continue;
      const auto address = boost::asio::ip::make_address(backend.address);
      const auto same = std::ranges::find_if(service.backends, [&](const config::Backend& one) {
        return one.address == address && one.port == backend.port;
      });
      if (same != service.backends.end()) same->state = config::BackendState::down;
    }
  }
  return {};
}

void Engines::tell_what_serves() const {
  for (const config::Service& service : config_.services) {
    const auto found = carriers_.find(service.name);
    if (!is_carried(service) && !is_proxied(service)) {
      spdlog::warn("service {}: not served: {}", config::printable(service.name), only_bpf(service));
      continue;
    }
    if (is_proxied(service)) warn_of_what_the_proxy_ignores(service);
    if (!fast_ || found == carriers_.end() || found->second.reason.empty()) continue;
    spdlog::info("service {}: engine {}: {}", config::printable(service.name),
                 config::name_of(config::engine_names, found->second.engine), config::printable(found->second.reason));
  }
  const std::string serving = summary();
  spdlog::log(serving.contains(" of ") ? spdlog::level::warn : spdlog::level::info, "{}", serving);
}

std::string Engines::summary() const {
  const std::size_t all = config_.services.size();
  const std::size_t proxied = proxy_.services();
  const auto carried = static_cast<std::size_t>(
      std::ranges::count_if(config_.services, [this](const config::Service& service) { return is_carried(service); }));
  const std::size_t serving = carried + proxy_.serving();
  std::string text = serving == all ? fmt::format("serving {}", cli::count(all, "service"))
                                    : fmt::format("serving {} of {}", serving, cli::count(all, "service"));
  if (fast_) text += fmt::format(": {} by the fast path, {} by the userspace engine", carried, proxied);
  return text;
}

// Health

void Engines::health_changed(std::span<const health::Change> changes) {
  std::map<std::pair<std::string, bool>, std::vector<std::string>> services;  // of each backend
  std::string reason;
  for (const health::Change& change : changes) {
    set_state(change.service, change.address, change.port,
              change.is_up ? config::BackendState::active : config::BackendState::down);
    const auto key = std::tuple(change.service, change.address, change.port);
    if (change.is_up)
      down_reasons_.erase(key);
    else
      down_reasons_.insert_or_assign(key, change.reason);
    services[{config::to_text(change.address, change.port), change.is_up}].push_back(config::printable(change.service));
    if (!change.is_up) reason = change.reason;
  }
  for (const auto& [backend, names] : services) {
    const auto& [address, is_up] = backend;
    ++(is_up ? went_up_ : went_down_);
    std::string list = fmt::format("{}", names.front());
    if (names.size() > 1) list += fmt::format(" and {}", cli::count(names.size() - 1, "other service"));
    if (is_up)
      spdlog::info("backend {} of {} is up", address, list);
    else
      spdlog::warn("backend {} of {} is down: {}", address, list, reason);
  }
}

void Engines::set_state(const std::string& service, const config::Address& address, std::uint16_t port,
                        config::BackendState state) {
  const auto found = carriers_.find(service);
  if (!fast_ || (found != carriers_.end() && found->second.engine == EngineMode::userspace))
    return proxy_.set_backend_state(service, address, port, state);
  if (const auto set = fast_->set_backend_state(service, address, port, state); !set) {
    const bool is_news = unset_.emplace(service, address, port).second;
    if (is_news)
      spdlog::error("service {}: backend {} is not told {}, and will be tried again: {}", config::printable(service),
                    config::to_text(address, port), state == config::BackendState::down ? "down" : "up",
                    set.error().message);
  } else {
    unset_.erase({service, address, port});
  }
}

/// What the fast path could not be told when it was new.
void Engines::set_again() {
  const auto unset = unset_;
  for (const auto& [service, address, port] : unset)
    set_state(service, address, port,
              checker_.is_down(service, address, port) ? config::BackendState::down : config::BackendState::active);
}

/// The fast path keeps what it was told of a VIP's backends; the checks know it by the service's name, and a change
/// may have failed. config_ has what the fast path has, until here.
void Engines::reconcile_states() {
  unset_.clear();
  for (config::Service& service : config_.services) {
    if (!service.health) continue;
    for (config::Backend& backend : service.backends) {
      if (backend.state == config::BackendState::drain) continue;
      const bool is_down = checker_.is_down(service.name, backend.address, backend.port);
      const auto state = is_down ? config::BackendState::down : config::BackendState::active;
      if (is_carried(service) && backend.state != state) set_state(service.name, backend.address, backend.port, state);
      backend.state = config::BackendState::active;  // as the file has it
    }
  }
}

/// Those of what is down still. Services that share a check share its reason, also when one of them is new.
void Engines::keep_reasons() {
  std::map<std::pair<config::Address, std::uint16_t>, std::string> found;
  for (const auto& [key, reason] : down_reasons_) found[{std::get<1>(key), std::get<2>(key)}] = reason;
  for (const config::Service& service : config_.services) {
    for (const config::Backend& backend : service.backends) {
      const auto reason = found.find({backend.address, backend.port});
      if (reason != found.end())
        down_reasons_.try_emplace({service.name, backend.address, backend.port}, reason->second);
    }
  }
  std::erase_if(down_reasons_, [this](const auto& entry) {
    const auto& [service, address, port] = entry.first;
    return !checker_.is_down(service, address, port);
  });
}

// The canary

void Engines::prove() {
  if (!fast_) return;
  look_at_canary();
  set_again();
  canary_timer_.expires_after(canary_pause);
  canary_timer_.async_wait([this](const boost::system::error_code& error) {
    if (!error) prove();
  });
}

/// Mends what it can; says so, and what it cannot, once.
void Engines::look_at_canary() {
  canary_ = fast_->canary();
  if (canary_->is_detached && fast_->attach()) {
    // The cgroup was removed and made again, or somebody has detached what is ours.
    canary_ = fast_->canary();
    if (canary_->passed) spdlog::warn("the fast path was not attached any more: attached again");
  }
  canary_time_ = userspace::Clock::now();
  if (canary_->passed == !has_told_of_canary_) return;
  has_told_of_canary_ = !canary_->passed;
  if (canary_->passed)
    spdlog::info("the canary passes again");
  else
    spdlog::error("the canary failed: {}", canary_->message);
}

void Engines::look_again() {
  if (fast_ && userspace::Clock::now() - canary_time_ > canary_age) look_at_canary();
}

// What they tell

void Engines::tell(Status& status) const {
  const userspace::Status proxied = proxy_.status();
  status.since = proxied.since;
  status.has_fast_path = fast_.has_value();
  status.no_fast_path = fast_ ? "" : no_fast_path_;
  status.pin = engine_.pin;
  status.cgroup = engine_.cgroup;
  status.canary = canary_;
  status.threads = proxied.threads;
  status.connections = proxied.connections;
  status.connection_limit = proxied.connection_limit;
  status.checked_backends = checker_.checked();
  status.went_up = went_up_;
  status.went_down = went_down_;
  std::vector<cli::SeenService> carried;
  if (fast_) {
    if (auto seen = fast_->services(); seen) carried = std::move(*seen);
  }
  std::map<std::string_view, const cli::SeenService*> by_name;
  for (const cli::SeenService& service : carried) by_name.emplace(service.name, &service);
  auto next_proxied = proxied.services.begin();
  status.services.reserve(config_.services.size());
  for (const config::Service& service : config_.services) {
    if (is_proxied(service)) {
      if (next_proxied == proxied.services.end()) break;
      ServiceStatus& one = status.services.emplace_back(to_status(*next_proxied++));
      one.no_backend = config::name_of(config::no_backend_names, service.no_backend);
      if (const std::string why = reason_against(service); !why.empty())
        one.reason = one.reason.empty() ? why : one.reason + "; " + why;
    } else if (!is_carried(service)) {
      status.services.push_back(unserved(service));
    } else if (const auto found = by_name.find(service.name); found != by_name.end()) {
      status.services.push_back(to_status(*found->second));
    } else {
      continue;
    }
    explain(status.services.back());
  }
}

ServiceStatus Engines::unserved(const config::Service& service) const {
  ServiceStatus status = to_status(userspace::ServiceStatus{.name = service.name,
                                                            .vip = service.vip,
                                                            .port = service.port,
                                                            .protocol = service.protocol,
                                                            .policy = service.policy,
                                                            .reason = only_bpf(service)});
  status.engine = EngineMode::bpf;
  return status;
}

void Engines::explain(ServiceStatus& service) const {
  for (BackendStatus& backend : service.backends) {
    if (backend.state != "down") continue;
    const auto found = down_reasons_.find({service.name, boost::asio::ip::make_address(backend.address), backend.port});
    backend.reason = found != down_reasons_.end() ? found->second : "found down before this process began";
  }
}

}  // namespace run
