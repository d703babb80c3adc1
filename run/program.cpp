// SPDX-License-Identifier: BSD-2-Clause
#include "run/program.h"

#include <fmt/format.h>
#include <malloc.h>
#include <netinet/in.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <algorithm>
#include <boost/asio/io_context.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <boost/asio/signal_set.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/json.hpp>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <filesystem>
#include <map>
#include <memory>
#include <set>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cli/text.h"
#include "config/fail.h"
#include "config/names.h"
#include "config/printable.h"
#include "config/read_config.h"
#include "config/values.h"
#include "fallback_proxy/control_client.h"
#include "fallback_proxy/control_socket.h"
#include "fallback_proxy/hand_over.h"
#include "fallback_proxy/proxy.h"
#include "fallback_proxy/watched.h"
#include "health/checker.h"
#include "run/cluster.h"
#include "run/control_server.h"
#include "run/decisions.h"
#include "run/diff.h"
#include "run/fast_path.h"
#include "run/file_watch.h"
#include "run/merge.h"
#include "run/metrics.h"
#include "run/notify.h"
#include "run/status.h"

namespace run {
namespace {

using cli::Failure;
using config::EngineMode;
using namespace std::chrono_literals;

// How often the hook is proven, beside each look at the status.
constexpr auto canary_pause = 30s;
// Looks that come faster share what one canary has seen.
constexpr auto canary_age = 1s;

/// A configuration and the text that it was read from.
struct Source {
  std::string text;
  config::Config config;
  std::size_t own_services = 0;  // of the file; the cluster's are behind them
  std::string whole;             // what says all of `config`, when there are services of a cluster

  const std::string& for_fast_path() const { return whole.empty() ? text : whole; }
};

/// Logs every mistake, as compilers show them. `refused` gets the text that has them.
std::optional<Source> read(const std::string& file, std::string* refused = nullptr) {
  auto text = config::read_file(file);
  if (!text) {
    spdlog::error("{}", text.error().message);
    return {};
  }
  auto config = config::read_config(*text);
  if (config) {
    const std::size_t own_services = config->services.size();
    return Source{.text = std::move(*text), .config = std::move(*config), .own_services = own_services, .whole = {}};
  }
  for (const config::Mistake& mistake : config.error()) spdlog::error("{}", config::render(mistake, *text, file));
  if (refused != nullptr) *refused = std::move(*text);
  return {};
}

Failure to_failure(const config::Error& error) { return {.message = error.message}; }

/// Which engine carries a service, and why.
struct Carrier {
  EngineMode engine = EngineMode::userspace;
  std::string reason;
};

class Program {
 public:
  Program(const Settings& settings, const cli::Plugin* plugin, std::string no_plugin, const config::Config& first)
      : settings_(settings),
        mode_(settings.engine.value_or(first.engine.mode)),
        plugin_(plugin),
        no_plugin_(std::move(no_plugin)),
        no_fast_path_(no_plugin_),
        in_force_{.engine = first.engine,
                  .limits = {},
                  .userspace = {},
                  .metrics = {},
                  .kubernetes = first.kubernetes,
                  .services = {}},
        control_path_(settings.control.value_or(first.engine.control)),
        signals_(control_, SIGHUP, SIGTERM, SIGINT),
        predecessor_(control_),
        canary_timer_(control_),
        decisions_(control_),
        checker_(control_, [this](std::span<const health::Change> changes) { health_changed(changes); }),
        proxy_(control_, first) {}

  /// A failure: nothing has changed, also not for the process that was to be replaced.
  std::expected<void, Failure> start(Source source) {
    if (const auto watched = userspace::check_watched(); !watched) return std::unexpected(to_failure(watched.error()));
    std::optional<userspace::ControlClient> predecessor;
    if (settings_.take_over) {
      auto found = userspace::ControlClient::connect(control_path_);
      if (!found) return std::unexpected(to_failure(found.error()));
      predecessor = std::move(*found);
    }
    auto socket = predecessor ? inherit(*predecessor) : userspace::listen_control(control_path_);
    if (!socket && socket.error().code == -EADDRINUSE)
      socket.error().message += can_replace()
                                    ? "; to replace it, start with --take-over"
                                    : "; stop it, or give this one a control, a pin and VIPs of its own ([engine])";
    if (!socket && (predecessor || socket.error().code == -EADDRINUSE))
      return std::unexpected(to_failure(socket.error()));
    if (!socket) spdlog::warn("no status and no {}: {}", can_replace() ? "upgrade" : "trace", socket.error().message);
    const bool is_new = socket && !predecessor;
    auto started = serve(std::move(source), std::move(socket), std::move(predecessor));
    if (!started && is_new) ::unlink(control_path_.c_str());
    return started;
  }

  void run() { control_.run(); }

  /// Behind run(): on_exit.
  void leave() {
    if (!fast_) return;
    if (config_.engine.on_exit == config::OnExit::keep) {
      // Before the VIPs of the userspace engine are no addresses of this machine any more.
      if (const auto refused = fast_->refuse_left_out(); !refused)
        spdlog::error("connects to what the userspace engine has served may leave this machine: {}",
                      refused.error().message);
      const auto kept = cli::anything_pinned(in_force_.engine.pin);
      if (kept && !*kept)
        spdlog::error("the fast path ends with this process: {} was removed", in_force_.engine.pin);
      else
        spdlog::info("the fast path stays at {}", in_force_.engine.pin);
      return;
    }
    if (const auto detached = fast_->detach(); !detached)
      spdlog::error("{}", detached.error().message);
    else
      spdlog::info("the fast path is detached");
  }

 private:
  /// `socket`: of the control socket, listening.
  std::expected<void, Failure> serve(Source source, config::Result<config::Fd> socket,
                                     std::optional<userspace::ControlClient> predecessor) {
    if (auto opened = open_fast_path(); !opened) return opened;
    const config::Engine engine = source.config.engine;
    const config::Metrics metrics = source.config.metrics;
    if (in_force_.kubernetes) {
      if (auto followed = follow_cluster(); !followed) return followed;
      source = with_cluster(std::move(source));
    }
    if (auto carried = carry_first(std::move(source)); !carried) return carried;
    if (predecessor) {
      if (auto replaced = replace(*predecessor); !replaced) return std::unexpected(to_failure(replaced.error()));
      userspace::adopt_control(socket->get());
    }
    if (!fast_) remove_stale_fast_path();
    if (metrics.listen) serve_metrics(*metrics.listen);
    if (engine.watch) watch();
    if (socket) serve_control(std::move(*socket));  // the last: whoever finds it finds all
    wait_for_signal();
    prove();
    notify_.emplace(control_);
    Notify::ready(summary());
    return {};
  }

  // A cluster's services

  /// What an earlier process left of them serves until they were listed.
  std::expected<void, Failure> follow_cluster() {
    if (settings_.follow_cluster == nullptr)
      return std::unexpected(
          Failure{.exit = cli::Exit::configuration,
                  .message = fmt::format("{}: kubernetes: only `clusterip run` follows a cluster", settings_.file)});
    ClusterServices kept;
    if (fast_) {
      if (const auto handle = cli::open_pinned(*plugin_, in_force_.engine.pin)) {
        if (const auto seen = cli::see_services(*plugin_, handle->get())) kept = cluster_services(*seen);
      }
    }
    if (!kept.empty())
      spdlog::info("kubernetes: {} that an earlier process left serve until all were listed",
                   cli::count(kept.size(), "service"));
    cluster_ = settings_.follow_cluster(
        control_, *in_force_.kubernetes, std::move(kept),
        {.merge = [this] { return merge_cluster(); },
         .set_backends =
             [this](const std::vector<const config::Service*>& changed) { set_cluster_backends(changed); }});
    return {};
  }

  Source with_cluster(Source own) {
    if (!cluster_) return own;
    const auto serving = std::span<const config::Service>(config_.services).subspan(own_services_);
    Merged merged = merge(own.config, own.text, cluster_->services(), serving);
    left_out_ = merged.left_out;
    std::set<std::string> problems(merged.problems.begin(), merged.problems.end());
    for (const std::string& problem : problems)
      if (!merge_problems_.contains(problem)) spdlog::error("{}", problem);
    merge_problems_ = std::move(problems);
    return {.text = std::move(own.text),
            .config = std::move(merged.config),
            .own_services = own.own_services,
            .whole = std::move(merged.text)};
  }

  bool merge_cluster() {
    if (is_ending_) return true;
    Source own{.text = text_, .config = config_, .own_services = own_services_, .whole = {}};
    own.config.services.resize(own_services_);
    Source source = with_cluster(std::move(own));
    const std::string change = describe_change(config_, source.config);
    const auto last_good = reloads_.last_good;
    if (const auto carried = carry(std::move(source)); !carried) {
      spdlog::error("kubernetes: {}: what serves goes on serving", carried.error().message);
      return false;
    }
    reloads_.last_good = last_good;  // of the file
    spdlog::info("kubernetes: {}", change.empty() ? "no service has changed" : change);
    return true;
  }

  /// An endpoint came or went: what costs no more than its service.
  void set_cluster_backends(const std::vector<const config::Service*>& changed) {
    if (is_ending_) return;
    bool is_any_proxied = false;
    for (const config::Service* next : changed) {
      const auto found = by_cluster_name_.find(next->name);
      if (found == by_cluster_name_.end()) continue;
      config::Service& service = config_.services[found->second];
      const auto is_vip = [&](const config::Backend& backend) {
        return vips_.contains({backend.address, backend.port, next->protocol});
      };
      const std::size_t total = backends_ - service.backends.size() + next->backends.size();
      // Merging tells what is wrong, and leaves it out.
      if (total > config_.limits.backends || std::ranges::any_of(next->backends, is_vip)) {
        cluster_->merge_soon();
        continue;
      }
      if (is_carried(service)) {
        if (const auto set = fast_->set_backends(service.name, next->backends); !set) {
          spdlog::error("kubernetes: service {}: {}", service.name, set.error().message);
          cluster_->merge_soon();
          continue;
        }
      }
      backends_ = total;
      service.backends = next->backends;
      is_any_proxied = is_any_proxied || is_proxied(service);
    }
    if (!is_any_proxied) return;
    for (const std::string& problem :
         proxy_.apply(proxied_part(config_, [this](const config::Service& service) { return is_proxied(service); })))
      spdlog::warn("{}", problem);
  }

  /// What a change of backends needs to know of all services.
  void index_services() {
    by_cluster_name_.clear();
    vips_.clear();
    backends_ = 0;
    if (!cluster_) return;
    for (std::size_t i = 0; i < config_.services.size(); ++i) {
      const config::Service& service = config_.services[i];
      if (i >= own_services_) by_cluster_name_.emplace(service.name, i);
      vips_.emplace(service.vip, service.port, service.protocol);
      backends_ += service.backends.size();
    }
  }

  // Engines

  /// fallback_proxy: no fast path, and no reason for that but what it is.
  bool can_replace() const { return plugin_ == nullptr && no_plugin_.empty(); }

  std::expected<void, Failure> open_fast_path() {
    if (mode_ == EngineMode::userspace) {
      if (!can_replace()) no_fast_path_ = settings_.engine ? "--engine userspace" : "engine.mode is \"userspace\"";
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
  std::expected<void, Failure> do_without(const Failure& why) {
    if (mode_ == EngineMode::bpf || why.exit != cli::Exit::unsupported) return std::unexpected(why);
    fast_.reset();
    no_fast_path_ = why.message;
    const std::string& cgroup = in_force_.engine.cgroup;
    spdlog::warn("no fast path, the userspace engine carries all services{}: {}",
                 cgroup.empty() ? "" : ", for every process of this machine and not only for those of the cgroup",
                 why.message);
    return {};
  }

  std::expected<void, Failure> carry_first(Source source) {
    if (fast_) {
      // An earlier process may have left its services refused: nobody passes to this engine before it listens.
      proxy_.apply(with_what_is_about_to_come({}, source.config));
      auto loaded = fast_->load(source.for_fast_path(), settings_.file);
      if (!loaded) loaded = do_without(loaded.error());
      if (!loaded) return loaded;
    }
    if (fast_) {
      if (auto seen = learn_carriers(source.config); !seen) return seen;
    }
    adopt(std::move(source));
    return {};
  }

  /// All or nothing: on failure, what serves goes on serving. A service that moves between the engines is served at
  /// every moment: the userspace engine listens before the fast path lets go, and lets go when the fast path has taken
  /// it.
  std::expected<void, Failure> carry(Source source) {
    if (fast_) {
      const config::Config before =
          proxied_part(config_, [this](const config::Service& service) { return is_proxied(service); });
      proxy_.apply(with_what_is_about_to_come(before, source.config));
      proxy_.wait_for_workers();
      auto loaded = fast_->load(source.for_fast_path(), settings_.file);
      if (loaded) loaded = learn_carriers(source.config);
      if (!loaded) {
        proxy_.apply(before);
        return loaded;
      }
    }
    adopt(std::move(source));
    return {};
  }

  /// What the userspace engine has, and services that say themselves that they come to it. Which others do, the fast
  /// path tells only when it has let them go.
  static config::Config with_what_is_about_to_come(config::Config part, const config::Config& next) {
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

  bool is_carried(const config::Service& service) const {
    const auto found = carriers_.find(service.name);
    return fast_ && (found == carriers_.end() || found->second.engine == EngineMode::bpf);
  }
  bool is_proxied(const config::Service& service) const {
    return !is_carried(service) && service.engine != EngineMode::bpf;
  }

  /// Why the fast path does not carry it.
  std::string reason_against(const config::Service& service) const {
    const auto found = carriers_.find(service.name);
    return fast_ && found != carriers_.end() ? found->second.reason : no_fast_path_;
  }

  config::Config proxied_part(const config::Config& config,
                              const std::function<bool(const config::Service&)>& wanted) const {
    config::Config part{.engine = config.engine,
                        .limits = config.limits,
                        .userspace = config.userspace,
                        .metrics = config.metrics,
                        .kubernetes = {},
                        .services = {}};
    part.services.reserve(static_cast<std::size_t>(std::ranges::count_if(config.services, wanted)));
    for (const config::Service& service : config.services) {
      if (!wanted(service)) continue;
      config::Service& copy = part.services.emplace_back(service);
      for (config::Backend& backend : copy.backends) {
        if (checker_.is_down(service.name, backend.address, backend.port)) backend.state = config::BackendState::down;
      }
    }
    return part;
  }

  /// Which services the fast path carries, and which backends an earlier process has found down.
  std::expected<void, Failure> learn_carriers(config::Config& config) {
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

  /// Both engines have `source`, or are about to: what is left cannot fail.
  void adopt(Source source) {
    checker_.apply(source.config.services);  // first: it tells what is down
    const auto problems = proxy_.apply(
        proxied_part(source.config, [this](const config::Service& service) { return is_proxied(service); }));
    for (const std::string& problem : problems) spdlog::warn("{}", problem);
    text_ = std::move(source.text);
    config_ = std::move(source.config);
    own_services_ = source.own_services;
    index_services();
    if (fast_) reconcile_states();
    keep_reasons();
    reloads_.last_good = std::chrono::system_clock::now();
    tell_what_serves();
    decisions_.fast_path_changed();
    // The parser's tree is several times as large as what serves, and stays in the heap otherwise.
    ::malloc_trim(0);
  }

  /// The fast path keeps what it was told of a VIP's backends; the checks know it by the service's name, and a change
  /// may have failed. config_ has what the fast path has, until here.
  void reconcile_states() {
    unset_.clear();
    for (config::Service& service : config_.services) {
      if (!service.health) continue;
      for (config::Backend& backend : service.backends) {
        if (backend.state == config::BackendState::drain) continue;
        const bool is_down = checker_.is_down(service.name, backend.address, backend.port);
        const auto state = is_down ? config::BackendState::down : config::BackendState::active;
        if (is_carried(service) && backend.state != state)
          set_state(service.name, backend.address, backend.port, state);
        backend.state = config::BackendState::active;  // as the file has it
      }
    }
  }

  void tell_what_serves() {
    for (const config::Service& service : config_.services) {
      const auto found = carriers_.find(service.name);
      if (!is_carried(service) && !is_proxied(service)) {
        spdlog::warn("service {}: not served: {}", config::printable(service.name), only_bpf(service));
        continue;
      }
      if (is_proxied(service)) warn_of_what_the_proxy_ignores(service);
      if (!fast_ || found == carriers_.end() || found->second.reason.empty()) continue;
      spdlog::info("service {}: engine {}: {}", config::printable(service.name),
                   config::name_of(config::engine_names, found->second.engine),
                   config::printable(found->second.reason));
    }
    const std::string serving = summary();
    spdlog::log(serving.contains(" of ") ? spdlog::level::warn : spdlog::level::info, "{}", serving);
  }

  static void warn_of_what_the_proxy_ignores(const config::Service& service) {
    const std::string name = config::printable(service.name);
    if (service.mark != 0) spdlog::warn("service {}: mark: the userspace engine marks no socket", name);
    if (service.no_backend != config::NoBackend::refuse)
      spdlog::warn("service {}: no_backend: the userspace engine refuses, whatever this says", name);
  }

  /// It asks for the one engine that cannot carry it.
  std::string only_bpf(const config::Service& service) const {
    const std::string reason = reason_against(service);
    return reason.empty() ? "it asks for the engine bpf, and this is the userspace engine"
                          : fmt::format("it asks for the engine bpf: {}", reason);
  }

  std::string summary() const {
    const std::size_t all = config_.services.size();
    const std::size_t proxied = proxy_.services();
    const auto carried = static_cast<std::size_t>(std::ranges::count_if(
        config_.services, [this](const config::Service& service) { return is_carried(service); }));
    const std::size_t serving = carried + proxy_.serving();
    std::string text = serving == all ? fmt::format("serving {}", cli::count(all, "service"))
                                      : fmt::format("serving {} of {}", serving, cli::count(all, "service"));
    if (fast_) text += fmt::format(": {} by the fast path, {} by the userspace engine", carried, proxied);
    return text;
  }

  /// A fast path that an earlier process left would go on rewriting: now that the userspace engine serves, it goes.
  void remove_stale_fast_path() {
    const auto something = cli::anything_pinned(in_force_.engine.pin);
    if (can_replace() || !something || !*something) return;
    std::string why = no_plugin_;
    if (plugin_ != nullptr) {
      auto error = cli::sized<clusterip_error>();
      const auto handle = cli::open_pinned(*plugin_, in_force_.engine.pin);
      if (handle && plugin_->detach(handle->get(), &error) == 0)
        return spdlog::info("the fast path that was left at {} is detached: the userspace engine serves",
                            in_force_.engine.pin);
      why = handle ? static_cast<const char*>(error.message) : handle.error().message;
    }
    const std::string warning = fmt::format(
        "the fast path that was left at {0} decides first, and refuses connects to what a userspace engine "
        "has carried (sudo clusterip unload --pin {0}): {1}",
        in_force_.engine.pin, why);
    spdlog::warn("{}", warning);
    no_fast_path_ += "; " + warning;
  }

  // Health

  void health_changed(std::span<const health::Change> changes) {
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
      services[{config::to_text(change.address, change.port), change.is_up}].push_back(
          config::printable(change.service));
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

  void set_state(const std::string& service, const config::Address& address, std::uint16_t port,
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
  void set_again() {
    const auto unset = unset_;
    for (const auto& [service, address, port] : unset)
      set_state(service, address, port,
                checker_.is_down(service, address, port) ? config::BackendState::down : config::BackendState::active);
  }

  /// Those of what is down still. Services that share a check share its reason, also when one of them is new.
  void keep_reasons() {
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

  /// Now, and again after a pause.
  void prove() {
    if (!fast_) return;
    look_at_canary();
    set_again();
    canary_timer_.expires_after(canary_pause);
    canary_timer_.async_wait([this](const boost::system::error_code& error) {
      if (!error) prove();
    });
  }

  /// Mends what it can; says so, and what it cannot, once.
  void look_at_canary() {
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

  // Status

  std::optional<ClusterStatus> cluster_status() const {
    if (!cluster_) return {};
    ClusterStatus status = cluster_->status();
    status.left_out = left_out_;
    return status;
  }

  Status status(bool is_look) {
    const userspace::Status proxied = proxy_.status();
    Status status{.program = settings_.program,
                  .version = CLUSTERIP_VERSION,
                  .pid = ::getpid(),
                  .since = proxied.since,
                  .file = std::filesystem::absolute(settings_.file),
                  .has_fast_path = fast_.has_value(),
                  .no_fast_path = fast_ ? "" : no_fast_path_,
                  .pin = in_force_.engine.pin,
                  .cgroup = in_force_.engine.cgroup,
                  .canary = canary_,
                  .lost_events = decisions_.lost(),
                  .threads = proxied.threads,
                  .connections = proxied.connections,
                  .connection_limit = proxied.connection_limit,
                  .reloads = reloads_,
                  .checked_backends = checker_.checked(),
                  .went_up = went_up_,
                  .went_down = went_down_,
                  .kubernetes = cluster_status(),
                  .services = {}};
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
    if (is_look) add_rates(status);
    return status;
  }

  ServiceStatus unserved(const config::Service& service) const {
    ServiceStatus status = to_status(userspace::ServiceStatus{.name = service.name,
                                                              .vip = service.vip,
                                                              .port = service.port,
                                                              .protocol = service.protocol,
                                                              .policy = service.policy,
                                                              .reason = only_bpf(service)});
    status.engine = EngineMode::bpf;
    return status;
  }

  void explain(ServiceStatus& service) const {
    for (BackendStatus& backend : service.backends) {
      if (backend.state != "down") continue;
      const auto found =
          down_reasons_.find({service.name, boost::asio::ip::make_address(backend.address), backend.port});
      backend.reason = found != down_reasons_.end() ? found->second : "found down before this process began";
    }
  }

  /// Since the last look that somebody had.
  void add_rates(Status& status) {
    const auto now = userspace::Clock::now();
    const double seconds = std::chrono::duration<double>(now - last_look_time_).count();
    std::map<std::string, std::uint64_t> look;
    for (ServiceStatus& service : status.services) {
      const auto before = last_look_.find(service.name);
      if (before != last_look_.end() && seconds > 0 && service.connects >= before->second)
        service.connects_per_second = static_cast<double>(service.connects - before->second) / seconds;
      look.emplace(service.name, service.connects);
    }
    last_look_ = std::move(look);
    last_look_time_ = now;
  }

  boost::json::object look() {
    if (fast_ && userspace::Clock::now() - canary_time_ > canary_age) look_at_canary();
    return to_json(status(true));
  }

  // Control socket, metrics, watch

  void serve_control(config::Fd socket) {
    server_.emplace(control_, std::move(socket), control_path_,
                    ControlHandlers{.status = [this] { return look(); },
                                    .trace = [this](auto tell) { return trace(std::move(tell)); },
                                    .begin_hand_over = [this] { return begin_hand_over(); },
                                    .end_hand_over = [this](bool is_taken) { end_hand_over(is_taken); }});
  }

  config::Result<std::shared_ptr<void>> trace(std::function<void(const boost::json::object&)> tell) {
    return decisions_.subscribe(fast_ ? &*fast_ : nullptr, std::move(tell));
  }

  void serve_metrics(const std::string& listen) {
    in_force_.metrics.listen = listen;
    auto served = Metrics::serve(control_, listen, [this] { return status(false); });
    if (served)
      metrics_ = std::move(*served);
    else
      spdlog::error("no metrics: {}", served.error().message);
  }

  void watch() {
    try {
      file_watch_.emplace(control_, settings_.file, [this] { file_changed(); });
      file_changed();  // since it was read
    } catch (const boost::system::system_error& error) {
      spdlog::error("{} is not watched: {}", settings_.file, error.what());
    }
  }

  void file_changed() {
    const auto text = config::read_file(settings_.file);
    // One that is gone, or is being written, comes again. What is not valid has been told of once; who puts back what
    // serves has mended it.
    if (!text || *text == refused_text_ || (*text == text_ && reloads_.is_last_good)) return;
    act_on(SIGHUP);
  }

  // Replacing a process

  /// Returns the control socket.
  config::Result<config::Fd> inherit(userspace::ControlClient& predecessor) {
    auto inheritance = userspace::take_over(predecessor);
    if (!inheritance) return std::unexpected(inheritance.error());
    spdlog::info("taking over from pid {} (version {}): {} sockets", predecessor.pid(),
                 config::printable(inheritance->version), inheritance->sockets.size());
    proxy_.inherit(std::move(inheritance->sockets), std::move(inheritance->vips));
    return std::move(inheritance->control);
  }

  config::Result<void> replace(userspace::ControlClient& predecessor) {
    const auto is_replaced = userspace::say_ready(predecessor);
    if (!is_replaced) return std::unexpected(is_replaced.error());
    if (*is_replaced)
      spdlog::info("pid {} has handed over, and drains", predecessor.pid());
    else
      spdlog::warn("pid {} has died while it handed over", predecessor.pid());
    // All that comes is the end of the connection, with the end of the process.
    predecessor_.assign(boost::asio::local::stream_protocol(), predecessor.release().release());
    predecessor_.async_wait(predecessor_.wait_read,
                            [this, pid = predecessor.pid()](const boost::system::error_code& error) {
                              if (error) return;
                              spdlog::info("pid {}, which this process has replaced, has ended", pid);
                              predecessor_.close();
                              proxy_.predecessor_has_ended();
                              if (!metrics_ && config_.metrics.listen) serve_metrics(*config_.metrics.listen);
                            });
    return {};
  }

  config::Result<userspace::Offer> begin_hand_over() {
    if (fast_) return config::fail(-EOPNOTSUPP, "it has a fast path, which stays when it is restarted: restart it");
    if (cluster_) return config::fail(-EOPNOTSUPP, "it follows a cluster: restart it");
    if (is_ending_) return config::fail(-EBUSY, "it is ending");
    if (is_handing_over_) return config::fail(-EBUSY, "another process is taking over from it");
    is_handing_over_ = true;
    proxy_.begin_hand_over();
    return userspace::Offer{.sockets = proxy_.sockets(), .vips = proxy_.vips()};
  }

  void end_hand_over(bool is_taken) {
    is_handing_over_ = false;
    if (is_taken) {
      is_ending_ = true;
      metrics_.reset();  // the port is the successor's
      proxy_.drain([this] { control_.stop(); });
      spdlog::info("replaced; {} connections to drain", proxy_.connections());
    } else {
      spdlog::warn("the process that was to take over has not: this one goes on serving");
      proxy_.cancel_hand_over();
    }
    for (const int signal : std::exchange(held_signals_, {})) act_on(signal);
  }

  // Signals

  void wait_for_signal() {
    signals_.async_wait([this](const boost::system::error_code& error, int signal) {
      if (error) return;
      act_on(signal);
      wait_for_signal();
    });
  }

  void act_on(int signal) {
    // Nothing that is being handed over may change. It takes a minute at most.
    if (is_handing_over_) return held_signals_.push_back(signal);
    signal == SIGHUP ? reload() : end();
  }

  void reload() {
    if (is_ending_) return spdlog::warn("{} is not read again: this process is ending", settings_.file);
    Notify::reloading();
    const bool is_done = reload_now();
    ++(is_done ? reloads_.succeeded : reloads_.failed);
    reloads_.is_last_good = is_done;
    Notify::ready(is_done ? summary() : summary() + "; the last reload failed");
  }

  bool reload_now() {
    refused_text_.clear();
    auto source = read(settings_.file, &refused_text_);
    if (!source) {
      spdlog::error("{} is not valid: the configuration that serves goes on serving", settings_.file);
      return false;
    }
    source = with_cluster(std::move(*source));
    const std::string change = describe_change(config_, source->config);
    const std::string text = source->text;
    if (auto carried = carry(std::move(*source)); !carried) {
      refused_text_ = text;
      spdlog::error("{}: the configuration that serves goes on serving", carried.error().message);
      return false;
    }
    refused_text_.clear();
    proxy_.wait_for_workers();  // what is told is so
    spdlog::info("reloaded: {}", change.empty() ? "no service has changed" : change);
    prove();
    if (!metrics_ && config_.metrics.listen) serve_metrics(*config_.metrics.listen);
    const std::string late = late_keys(in_force_, config_);
    if (!late.empty()) spdlog::warn("{}: takes effect at the next start", late);
    return true;
  }

  void end() {
    if (is_ending_) {
      spdlog::warn("ending at once; {} connections are reset", proxy_.connections());
      control_.stop();
      return;
    }
    is_ending_ = true;
    Notify::stopping(fmt::format("{} connections to drain", proxy_.connections()));
    spdlog::info("accepting nothing more; {} connections to drain", proxy_.connections());
    proxy_.drain([this] { control_.stop(); });
  }

  const Settings settings_;
  const EngineMode mode_;
  const cli::Plugin* plugin_;
  const std::string no_plugin_;
  std::string no_fast_path_;
  config::Config in_force_;  // [engine] and [metrics] until the end, whatever a reload reads
  const std::string control_path_;
  std::optional<FastPath> fast_;
  std::map<std::string, Carrier> carriers_;  // by service; of the fast path's say
  std::string text_;                         // that serves
  std::string refused_text_;                 // that the last reload did not take
  config::Config config_;
  std::size_t own_services_ = 0;                                  // of config_, the file's; then the cluster's
  std::unordered_map<std::string, std::size_t> by_cluster_name_;  // of config_.services
  std::set<std::tuple<config::Address, std::uint16_t, config::Protocol>> vips_;
  std::size_t backends_ = 0;              // of all services
  std::set<std::string> merge_problems_;  // of the last merge: who has read of one need not again
  std::size_t left_out_ = 0;              // services, by it
  Reloads reloads_;
  std::optional<cli::Canary> canary_;
  bool has_told_of_canary_ = false;  // that it fails
  userspace::Clock::time_point canary_time_;
  std::map<std::tuple<std::string, config::Address, std::uint16_t>, std::string> down_reasons_;
  std::set<std::tuple<std::string, config::Address, std::uint16_t>> unset_;  // the fast path could not be told
  std::uint64_t went_up_ = 0;
  std::uint64_t went_down_ = 0;
  std::map<std::string, std::uint64_t> last_look_;
  userspace::Clock::time_point last_look_time_;

  boost::asio::io_context control_;
  boost::asio::signal_set signals_;
  std::vector<int> held_signals_;
  boost::asio::local::stream_protocol::socket predecessor_;
  boost::asio::steady_timer canary_timer_;
  Decisions decisions_;
  std::optional<FileWatch> file_watch_;
  std::optional<Notify> notify_;
  std::optional<ControlServer> server_;  // its end tells a successor that all connections have ended: after the proxy's
  health::Checker checker_;
  userspace::Proxy proxy_;
  std::unique_ptr<Cluster> cluster_;
  std::unique_ptr<Metrics> metrics_;  // asks all of the above
  bool is_handing_over_ = false;
  bool is_ending_ = false;
};

/// The end has begun: a signal more must not become one that kills, as it would once nobody handles it any more.
void block_signals() {
  sigset_t signals;
  sigemptyset(&signals);
  for (const int signal : {SIGHUP, SIGTERM, SIGINT}) sigaddset(&signals, signal);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
}

}  // namespace

std::optional<std::string> control_path(const std::string& file) {
  auto source = read(file);
  if (!source) return {};
  return std::move(source->config.engine.control);
}

cli::Outcome serve(const Settings& settings, const cli::Plugin* plugin, const std::string& no_plugin) {
  auto source = read(settings.file);
  if (!source) return cli::Exit::configuration;
  std::signal(SIGPIPE, SIG_IGN);  // splice() into a closed connection has no MSG_NOSIGNAL
  {
    Program program(settings, plugin, no_plugin, source->config);
    if (auto started = program.start(std::move(*source)); !started) return std::unexpected(started.error());
    program.run();
    block_signals();
    program.leave();
  }
  spdlog::info("ended");
  return cli::Exit::fine;
}

}  // namespace run
