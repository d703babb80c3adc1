// SPDX-License-Identifier: BSD-2-Clause
#include "run/program.h"

#include <fmt/format.h>
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
#include "config/printable.h"
#include "config/read_config.h"
#include "fallback_proxy/control_client.h"
#include "fallback_proxy/control_socket.h"
#include "fallback_proxy/hand_over.h"
#include "fallback_proxy/watched.h"
#include "run/cluster.h"
#include "run/control_server.h"
#include "run/decisions.h"
#include "run/diff.h"
#include "run/engines.h"
#include "run/file_watch.h"
#include "run/merge.h"
#include "run/metrics.h"
#include "run/notify.h"
#include "run/status.h"

namespace run {
namespace {

using cli::Failure;
using namespace std::chrono_literals;

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

class Program {
 public:
  Program(const Settings& settings, const cli::Plugin* plugin, std::string no_plugin, const config::Config& first)
      : settings_(settings),
        in_force_{.engine = first.engine,
                  .limits = {},
                  .userspace = {},
                  .metrics = {},
                  .kubernetes = first.kubernetes,
                  .services = {}},
        control_path_(settings.control.value_or(first.engine.control)),
        signals_(control_, SIGHUP, SIGTERM, SIGINT),
        predecessor_(control_),
        decisions_(control_),
        engines_(control_, settings.engine, plugin, std::move(no_plugin), first) {}

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
      socket.error().message += engines_.can_replace()
                                    ? "; to replace it, start with --take-over"
                                    : "; stop it, or give this one a control, a pin and VIPs of its own ([engine])";
    if (!socket && (predecessor || socket.error().code == -EADDRINUSE))
      return std::unexpected(to_failure(socket.error()));
    if (!socket)
      spdlog::warn("no status and no {}: {}", engines_.can_replace() ? "upgrade" : "trace", socket.error().message);
    const bool is_new = socket && !predecessor;
    auto started = serve(std::move(source), std::move(socket), std::move(predecessor));
    if (!started && is_new) ::unlink(control_path_.c_str());
    return started;
  }

  void run() { control_.run(); }

  /// Behind run(): on_exit.
  void leave() { engines_.leave(); }

 private:
  /// `socket`: of the control socket, listening.
  std::expected<void, Failure> serve(Source source, config::Result<config::Fd> socket,
                                     std::optional<userspace::ControlClient> predecessor) {
    if (auto opened = engines_.open(); !opened) return opened;
    const config::Engine engine = source.config.engine;
    const config::Metrics metrics = source.config.metrics;
    if (in_force_.kubernetes) {
      if (auto followed = follow_cluster(); !followed) return followed;
      source = with_cluster(std::move(source));
    }
    auto carried = engines_.carry_first(std::move(source.config), source.for_fast_path(), settings_.file);
    if (!carried) return carried;
    adopt(std::move(source));
    reloads_.last_good = std::chrono::system_clock::now();
    if (predecessor) {
      if (auto replaced = replace(*predecessor); !replaced) return std::unexpected(to_failure(replaced.error()));
      userspace::adopt_control(socket->get());
    }
    engines_.remove_stale_fast_path();
    if (metrics.listen) serve_metrics(*metrics.listen);
    if (engine.watch) watch();
    if (socket) serve_control(std::move(*socket));  // the last: whoever finds it finds all
    wait_for_signal();
    engines_.prove();
    notify_.emplace(control_);
    Notify::ready(engines_.summary());
    return {};
  }

  // A cluster's services

  /// What an earlier process left of them serves until they were listed.
  std::expected<void, Failure> follow_cluster() {
    if (settings_.follow_cluster == nullptr)
      return std::unexpected(
          Failure{.exit = cli::Exit::configuration,
                  .message = fmt::format("{}: kubernetes: only `clusterip run` follows a cluster", settings_.file)});
    ClusterServices kept = cluster_services(engines_.pinned());
    if (!kept.empty())
      spdlog::info("kubernetes: {} that an earlier process left serve until their namespace is listed",
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
    const auto serving = std::span(config().services).subspan(own_services_);
    Merged merged = merge(own.config, own.text, cluster_->services(), serving);
    left_out_ = merged.left_out;
    is_short_ = merged.is_short;
    contested_ = std::move(merged.contested);
    tell_left_out(merged.problems);
    return {.text = std::move(own.text),
            .config = std::move(merged.config),
            .own_services = own.own_services,
            .whole = std::move(merged.text)};
  }

  /// Who has read a line need not again, and who may write services need not fill the log.
  void tell_left_out(const std::vector<std::string>& lines) {
    constexpr std::size_t most = 100;
    const auto now = userspace::Clock::now();
    if (now - told_since_ > 1min) {
      told_since_ = now;
      told_ = 0;
    }
    std::set<std::string> problems(lines.begin(), lines.end());
    std::size_t untold = 0;
    for (const std::string& problem : problems) {
      if (merge_problems_.contains(problem)) continue;
      if (told_ < most) {
        ++told_;
        spdlog::error("{}", problem);
      } else {
        ++untold;
      }
    }
    if (untold != 0) spdlog::error("kubernetes: {} more lines like these, of services that are left out", untold);
    merge_problems_ = std::move(problems);
  }

  bool merge_cluster() {
    if (is_ending_) return true;
    Source own{.text = text_, .config = config(), .own_services = own_services_, .whole = {}};
    own.config.services.resize(own_services_);
    Source source = with_cluster(std::move(own));
    const std::string change = describe_change(config(), source.config);
    if (const auto carried = carry(std::move(source)); !carried) {
      spdlog::error("kubernetes: {}: what serves goes on serving", carried.error().message);
      return false;
    }
    spdlog::info("kubernetes: {}", change.empty() ? "no service has changed" : change);
    return true;
  }

  /// An endpoint came or went: what costs no more than its service.
  void set_cluster_backends(const std::vector<const config::Service*>& changed) {
    if (is_ending_) return;
    for (const config::Service* next : changed) {
      const auto found = by_cluster_name_.find(next->name);
      if (found == by_cluster_name_.end()) {
        if (is_short_ || !contested_.empty()) cluster_->merge_soon();  // it may be served now, or let another be
        continue;
      }
      const auto key = [next](const config::Backend& backend) {
        return MergedKey(backend.address, backend.port, next->protocol);
      };
      const auto& before = config().services[found->second].backends;
      const bool frees_a_vip = !contested_.empty() && std::ranges::any_of(before, [&](const config::Backend& backend) {
        return contested_.contains(key(backend));
      });
      if ((is_short_ && next->backends.size() < before.size()) || frees_a_vip) cluster_->merge_soon();
      const auto is_vip = [&](const config::Backend& backend) { return vips_.contains(key(backend)); };
      const std::size_t total = backends_ - before.size() + next->backends.size();
      // Merging tells what is wrong, and leaves it out.
      if (total > config().limits.backends || std::ranges::any_of(next->backends, is_vip)) {
        cluster_->merge_soon();
        continue;
      }
      if (const auto set = engines_.set_backends(found->second, next->backends); !set) {
        spdlog::error("kubernetes: service {}: {}", next->name, set.error().message);
        cluster_->merge_soon();
        continue;
      }
      backends_ = total;
    }
    engines_.apply_backends();
  }

  /// What a change of backends needs to know of all services.
  void index_services() {
    by_cluster_name_.clear();
    vips_.clear();
    backends_ = 0;
    if (!cluster_) return;
    for (std::size_t i = 0; i < config().services.size(); ++i) {
      const config::Service& service = config().services[i];
      if (i >= own_services_) by_cluster_name_.emplace(service.name, i);
      vips_.emplace(service.vip, service.port, service.protocol);
      backends_ += service.backends.size();
    }
  }

  // Engines

  [[nodiscard]] const config::Config& config() const { return engines_.config(); }

  std::expected<void, Failure> carry(Source source) {
    auto carried = engines_.carry(std::move(source.config), source.for_fast_path(), settings_.file);
    if (carried) adopt(std::move(source));
    return carried;
  }

  /// The engines have it.
  void adopt(Source source) {
    text_ = std::move(source.text);
    own_services_ = source.own_services;
    index_services();
    decisions_.fast_path_changed();
  }

  // Status

  std::optional<ClusterStatus> cluster_status() const {
    if (!cluster_) return {};
    ClusterStatus status = cluster_->status();
    status.left_out = left_out_;
    return status;
  }

  Status status(bool is_look) {
    Status status;
    status.program = settings_.program;
    status.version = CLUSTERIP_VERSION;
    status.pid = ::getpid();
    status.file = std::filesystem::absolute(settings_.file);
    status.lost_events = decisions_.lost();
    status.reloads = reloads_;
    status.kubernetes = cluster_status();
    engines_.tell(status);
    if (is_look) add_rates(status);
    return status;
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
    engines_.look_again();
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
    return decisions_.subscribe(engines_.fast_path(), std::move(tell));
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
    engines_.proxy().inherit(std::move(inheritance->sockets), std::move(inheritance->vips));
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
                              engines_.proxy().predecessor_has_ended();
                              if (!metrics_ && config().metrics.listen) serve_metrics(*config().metrics.listen);
                            });
    return {};
  }

  config::Result<userspace::Offer> begin_hand_over() {
    if (engines_.fast_path() != nullptr)
      return config::fail(-EOPNOTSUPP, "it has a fast path, which stays when it is restarted: restart it");
    if (cluster_) return config::fail(-EOPNOTSUPP, "it follows a cluster: restart it");
    if (is_ending_) return config::fail(-EBUSY, "it is ending");
    if (is_handing_over_) return config::fail(-EBUSY, "another process is taking over from it");
    is_handing_over_ = true;
    engines_.proxy().begin_hand_over();
    return userspace::Offer{.sockets = engines_.proxy().sockets(), .vips = engines_.proxy().vips()};
  }

  void end_hand_over(bool is_taken) {
    is_handing_over_ = false;
    if (is_taken) {
      is_ending_ = true;
      metrics_.reset();  // the port is the successor's
      engines_.proxy().drain([this] { control_.stop(); });
      spdlog::info("replaced; {} connections to drain", engines_.proxy().connections());
    } else {
      spdlog::warn("the process that was to take over has not: this one goes on serving");
      engines_.proxy().cancel_hand_over();
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
    Notify::ready(is_done ? engines_.summary() : engines_.summary() + "; the last reload failed");
  }

  bool reload_now() {
    refused_text_.clear();
    auto source = read(settings_.file, &refused_text_);
    if (!source) {
      spdlog::error("{} is not valid: the configuration that serves goes on serving", settings_.file);
      return false;
    }
    source = with_cluster(std::move(*source));
    const std::string change = describe_change(config(), source->config);
    const std::string text = source->text;
    if (auto carried = carry(std::move(*source)); !carried) {
      refused_text_ = text;
      spdlog::error("{}: the configuration that serves goes on serving", carried.error().message);
      return false;
    }
    refused_text_.clear();
    reloads_.last_good = std::chrono::system_clock::now();
    engines_.proxy().wait_for_workers();  // what is told is so
    spdlog::info("reloaded: {}", change.empty() ? "no service has changed" : change);
    engines_.prove();
    if (!metrics_ && config().metrics.listen) serve_metrics(*config().metrics.listen);
    const std::string late = late_keys(in_force_, config());
    if (!late.empty()) spdlog::warn("{}: takes effect at the next start", late);
    return true;
  }

  void end() {
    if (is_ending_) {
      spdlog::warn("ending at once; {} connections are reset", engines_.proxy().connections());
      control_.stop();
      return;
    }
    is_ending_ = true;
    Notify::stopping(fmt::format("{} connections to drain", engines_.proxy().connections()));
    spdlog::info("accepting nothing more; {} connections to drain", engines_.proxy().connections());
    engines_.proxy().drain([this] { control_.stop(); });
  }

  const Settings settings_;
  config::Config in_force_;  // [engine] and [metrics] until the end, whatever a reload reads
  const std::string control_path_;
  std::string text_;                                              // that serves
  std::string refused_text_;                                      // that the last reload did not take
  std::size_t own_services_ = 0;                                  // of config(), the file's; then the cluster's
  std::unordered_map<std::string, std::size_t> by_cluster_name_;  // of config().services
  std::set<MergedKey> vips_;
  std::size_t backends_ = 0;              // of all services
  std::set<std::string> merge_problems_;  // of the last merge: who has read of one need not again
  std::size_t left_out_ = 0;              // services, by it
  bool is_short_ = false;                 // and some for want of room
  std::set<MergedKey> contested_;         // as Merged has it
  userspace::Clock::time_point told_since_;
  std::size_t told_ = 0;  // lines since then
  Reloads reloads_;
  std::map<std::string, std::uint64_t> last_look_;
  userspace::Clock::time_point last_look_time_;

  boost::asio::io_context control_;
  boost::asio::signal_set signals_;
  std::vector<int> held_signals_;
  boost::asio::local::stream_protocol::socket predecessor_;
  Decisions decisions_;
  std::optional<FileWatch> file_watch_;
  std::optional<Notify> notify_;
  std::optional<ControlServer>
      server_;  // its end tells a successor that all connections have ended: after the engines'
  Engines engines_;
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
