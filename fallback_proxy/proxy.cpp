// SPDX-License-Identifier: BSD-2-Clause
#include "fallback_proxy/proxy.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <spdlog/spdlog.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <boost/asio/post.hpp>
#include <fstream>
#include <future>
#include <set>
#include <thread>
#include <utility>

#include "config/printable.h"

namespace userspace {
namespace {

using namespace std::chrono_literals;

// Descriptors besides those of connections, pipes and listeners: event loops, timers, the log, the configuration, the
// control socket, and what a library may want.
constexpr std::int64_t other_descriptors = 64;
constexpr std::int64_t descriptors_per_pipe = 2;

/// The soft limit is raised to the hard one.
std::int64_t descriptor_limit() {
  rlimit limit{};
  ::getrlimit(RLIMIT_NOFILE, &limit);
  if (limit.rlim_cur < limit.rlim_max) {
    limit.rlim_cur = limit.rlim_max;
    ::setrlimit(RLIMIT_NOFILE, &limit);
    ::getrlimit(RLIMIT_NOFILE, &limit);
  }
  return static_cast<std::int64_t>(std::min<rlim_t>(limit.rlim_cur, 1U << 30));
}

/// A table of descriptors that threads share grows when it is full, and those that want one stand still until the next
/// RCU grace period is over (fs/file.c, expand_fdtable()): on a busy machine for seconds. As long as there is only one
/// thread, that waits for nothing; so the table gets room for most proxies' descriptors (512 KiB) before there are
/// more.
void make_room_for_descriptors() {
  constexpr std::int64_t enough = 65536;
  const config::Fd any(::open("/dev/null", O_RDONLY | O_CLOEXEC));
  const config::Fd last(
      ::fcntl(any.get(), F_DUPFD_CLOEXEC, static_cast<int>(std::min(descriptor_limit(), enough)) - 1));
}

std::size_t thread_count(const config::Config& config) {
  if (config.userspace.threads != 0) return config.userspace.threads;
  return std::max(1U, std::thread::hardware_concurrency());
}

/// A tenth of the descriptors at most is for pipes.
std::size_t pipes_per_thread(std::size_t threads) {
  constexpr std::size_t most = 256;
  const auto share = static_cast<std::size_t>(descriptor_limit()) / 10 / descriptors_per_pipe / threads;
  return std::min(share, most);
}

/// For connections and UDP flows.
std::int64_t descriptors_to_use(std::size_t threads) {
  const auto pipes = static_cast<std::int64_t>(pipes_per_thread(threads) * threads);
  return std::max<std::int64_t>(descriptor_limit() - other_descriptors - pipes * descriptors_per_pipe, 2);
}

/// The ports that the kernel gives to sockets that ask for none (ip_local_port_range), IPv6 as well.
std::int64_t local_ports() {
  std::int64_t first = 32768;
  std::int64_t last = 60999;
  std::ifstream("/proc/sys/net/ipv4/ip_local_port_range") >> first >> last;
  return last - first + 1;
}

/// Flows come cheap and stay a while: connections have half of the descriptors for themselves, and this host's other
/// programs half of the ports, of which each unconnected UDP socket needs one that no other has.
std::int64_t flow_limit(const config::Config& config, std::int64_t descriptors) {
  const std::int64_t limit = std::min(std::int64_t{config.limits.flows}, std::min(descriptors, local_ports()) / 2);
  return std::max<std::int64_t>(limit, 1);
}

// Between the removal of a route by somebody else and its return: many are removed at once, as a rule.
constexpr auto first_repair_pause = 100ms;
constexpr auto longest_repair_pause = 60s;

bool is_udp(const Service& service) { return service.settings().protocol == config::Protocol::udp; }

}  // namespace

class Proxy::Posts {
 public:
  /// The backends that a service does not have any more.
  struct Left {
    std::set<BackendPointer> backends;
    bool is_reset = false;                 // their connections end
    std::shared_ptr<const Service> after;  // null: the service has left
  };

  explicit Posts(const Workers& workers) : workers_(workers) {}

  void add(Worker& worker, std::function<void()> function) { functions_[&worker].push_back(std::move(function)); }
  /// For all workers, behind what every one of them has to do: by then no listener gives a connection away any more
  /// that knows only the service before.
  void add(std::shared_ptr<ServiceState> state, Left left) { left_.emplace(std::move(state), std::move(left)); }

  ~Posts() {
    if (!left_.empty()) add_turn();
    for (auto& [worker, list] : functions_) {
      worker->post([functions = std::move(list)] {
        for (const auto& function : functions) function();
      });
    }
  }

 private:
  using AllLeft = std::map<std::shared_ptr<ServiceState>, Left>;

  /// The last worker to come here posts what is for later: that comes behind all that any of them has posted before.
  void add_turn() {
    struct Turn {
      std::atomic<std::size_t> workers;
      const AllLeft left;
    };
    const auto turn = std::make_shared<Turn>(workers_.size(), std::move(left_));
    for (const auto& worker : workers_) {
      add(*worker, [turn, &workers = workers_] {
        if (--turn->workers > 0) return;
        for (const auto& each : workers) each->post([turn, &worker = *each] { leave(worker, turn->left); });
      });
    }
  }

  static void leave(Worker& worker, const AllLeft& all) {
    worker.for_each_relay([&](Relay& relay) {
      const auto found = all.find(relay.service().shared_state());
      if (found == all.end()) return;
      const Left& left = found->second;
      if (left.is_reset && left.backends.contains(relay.shared_backend()))
        relay.end();
      else if (left.after)
        relay.change(left.after);
    });
  }

  const Workers& workers_;
  std::map<Worker*, std::vector<std::function<void()>>> functions_;
  AllLeft left_;
};

Proxy::Proxy(boost::asio::io_context& control, const config::Config& first)
    : control_(control),
      first_(first.userspace),
      admission_(descriptors_to_use(thread_count(first)), flow_limit(first, descriptors_to_use(thread_count(first)))),
      allowed_(std::make_shared<Allowed>(std::span<const std::string>(), own_addresses())),
      addresses_(
          control, [this] { allow(); }, [this] { route_removed(); }),
      vips_timer_(control),
      repair_timer_(control),
      repair_pause_(first_repair_pause),
      leaving_timer_(control),
      drain_timer_(control) {
  make_room_for_descriptors();
  const std::size_t threads = thread_count(first);
  const WorkerSettings settings{.connect_timeout = first.userspace.connect_timeout,
                                .idle_timeout = first.userspace.idle_timeout,
                                .udp_timeout = first.userspace.udp_timeout,
                                .pipes = pipes_per_thread(threads),
                                .flows = first.limits.flows};
  for (std::size_t i = 0; i < threads; ++i) workers_.push_back(std::make_unique<Worker>(settings, admission_));
}

Proxy::~Proxy() {
  // Listeners are shared with them, and they know each other.
  for (const auto& worker : workers_) worker->stop();
  served_.clear();
  workers_.clear();
  // Behind the connections, which freeze without their routes.
  if (!local_vips_) return;
  const auto failures = local_vips_->reconcile({}, predecessor_vips_);
  if (!failures) spdlog::warn("{}", failures.error().message);
  for (const auto& failure : failures.value_or(std::vector<VipFailure>()))
    spdlog::warn("vip {}: {}", failure.vip.to_string(), failure.reason);
}

Problems Proxy::apply(config::Config config) {
  Problems problems = late_changes(config.userspace);
  userspace_ = std::move(config.userspace);
  in_order_.clear();
  in_order_.reserve(config.services.size());
  by_name_.clear();
  held_states_.clear();
  std::set<SocketName> kept;
  for (const config::Service& settings : config.services) {
    const SocketName key{settings.vip, settings.port, settings.protocol};
    kept.insert(key);
    const auto [entry, is_new] = served_.try_emplace(key);
    in_order_.push_back(&entry->second);
    by_name_.emplace(settings.name, &entry->second);
    // A thread that serves must not wait for whoever reads the log.
    if (is_new) {
      entry->second.state->report = [this](spdlog::level::level_enum level, std::string line) {
        boost::asio::post(control_, [level, line = std::move(line)] { spdlog::log(level, "{}", line); });
      };
    }
  }

  // Routes first, so that binding works; then what is new and what changes; then what leaves. Its VIPs stay local until
  // the last connection has ended: without the route, connections freeze.
  Posts posts(workers_);
  for (auto& [key, served] : served_) {
    if (kept.contains(key)) continue;
    leaving_.push_back({std::get<config::Address>(key), served.earlier});
    leaving_.back().services.emplace_back(served.service);
  }
  Problems vip_problems = make_vips_local();
  std::ranges::move(vip_problems, std::back_inserter(problems));
  allow();
  for (std::size_t i = 0; i < in_order_.size(); ++i) {
    Served& served = *in_order_[i];
    update(served, next_service(std::move(config.services[i]), served), posts);
    if (!served.problem.empty()) problems.push_back(problem_of(served));
  }
  for (auto next = served_.begin(); next != served_.end();) {
    const auto entry = next++;
    if (kept.contains(entry->first)) continue;
    close_listener(entry->second, true, posts);
    leave_backends(*entry->second.service, nullptr, posts);
    served_.erase(entry);
  }
  inherited_.clear();
  watch_leaving();
  if (admission_.limit() == 0)
    problems.push_back(
        fmt::format("the {} file descriptors that are allowed leave none for connections: allow more "
                    "(LimitNOFILE=, ulimit -n)",
                    descriptor_limit()));
  return problems;
}

std::string Proxy::problem_of(const Served& served) {
  return fmt::format("service {}: {}", config::printable(served.service->settings().name), served.problem);
}

/// What a reload does not change.
Problems Proxy::late_changes(const config::Userspace& next) const {
  Problems problems;
  const config::Userspace& first = first_;
  const auto note = [&](bool differs, const char* key) {
    if (differs) problems.push_back(fmt::format("userspace.{}: takes effect at the next start", key));
  };
  note(next.threads != first.threads, "threads");
  note(next.connect_timeout != first.connect_timeout, "connect_timeout");
  note(next.idle_timeout != first.idle_timeout, "idle_timeout");
  note(next.udp_timeout != first.udp_timeout, "udp_timeout");
  note(next.local_vips != first.local_vips, "local_vips");
  return problems;
}

/// Backends that stay are the same objects.
std::shared_ptr<const Service> Proxy::next_service(config::Service settings, Served& served) {
  std::map<std::pair<config::Address, std::uint16_t>, BackendPointer> known;
  if (served.service) {
    const auto before = served.service->backends();
    for (std::size_t i = 0; i < before.size(); ++i) {
      const config::Backend& backend = served.service->settings().backends[i];
      known.emplace(std::pair(backend.address, backend.port), before[i]);
    }
  }
  std::vector<BackendPointer> backends;
  backends.reserve(settings.backends.size());
  for (const config::Backend& backend : settings.backends) {
    const auto found = known.find({backend.address, backend.port});
    backends.push_back(found != known.end() ? found->second : std::make_shared<Backend>(backend.address, backend.port));
  }
  return std::make_shared<Service>(std::move(settings), std::move(backends), served.state);
}

void Proxy::update(Served& served, std::shared_ptr<const Service> next, Posts& posts) {
  const std::shared_ptr<const Service> before = std::exchange(served.service, std::move(next));
  if (before) {
    std::erase_if(served.earlier, [](const auto& service) { return service.expired(); });
    served.earlier.emplace_back(before);
  }
  if (served.service->is_empty()) {
    // Without a listener the kernel refuses. What is queued came while there were backends: those that are but said to
    // be down may take it still.
    const auto is_down = [](const config::Backend& backend) { return backend.state == config::BackendState::down; };
    close_listener(served, std::ranges::any_of(served.service->settings().backends, is_down), posts);
    served.problem.clear();
    served.waits_for_socket = false;
  } else if (served.udp_listener) {
    posts.add(*served.worker,
              [listener = served.udp_listener, service = served.service] { listener->change(service); });
  } else if (served.listener) {
    posts.add(*served.worker, [listener = served.listener, service = served.service] { listener->change(service); });
  } else {
    open_listener(served, posts);
  }
  if (before) leave_backends(*before, served.service, posts);
}

/// Or the address of a device.
bool Proxy::is_by_route(const config::Address& vip) const { return local_vips_ && !vip_problems_.contains(vip); }

config::Result<config::Fd> Proxy::socket_for(const Service& service) {
  const config::Service& settings = service.settings();
  const auto inherited = inherited_.find({settings.vip, settings.port, settings.protocol});
  if (inherited == inherited_.end()) {
    const bool by_route = is_by_route(settings.vip);
    return is_udp(service) ? open_udp_socket(settings, by_route) : open_listening_socket(settings, by_route);
  }
  config::Fd socket = std::move(inherited->second);
  inherited_.erase(inherited);
  return socket;
}

void Proxy::open_listener(Served& served, Posts& posts) {
  const config::Service& settings = served.service->settings();
  served.waits_for_socket = closing_.contains({settings.vip, settings.port, settings.protocol});
  if (served.waits_for_socket) return;  // the kernel would not give the port away: listener_closed() comes back to it
  if (admission_.limit() == 0) {
    served.problem = "no file descriptor is left for it: allow more (LimitNOFILE=, ulimit -n)";
    return;
  }
  auto socket = socket_for(*served.service);
  if (!socket) {
    served.problem = socket.error().message;
    return;
  }
  served.problem.clear();
  served.worker = &next_worker();
  try {
    if (is_udp(*served.service)) {
      served.udp_listener = std::make_shared<UdpListener>(*served.worker, workers_, std::move(*socket), served.service,
                                                          is_by_route(settings.vip), allowed_);
      posts.add(*served.worker, [listener = served.udp_listener] { listener->start(); });
    } else {
      served.listener = std::make_shared<Listener>(*served.worker, workers_, admission_, std::move(*socket),
                                                   served.service, allowed_);
      posts.add(*served.worker, [listener = served.listener] { listener->start(); });
    }
  } catch (const boost::system::system_error& error) {  // of epoll: fs.epoll.max_user_watches
    served.problem = error.what();
    return;
  }
  admission_.listener_opened();
}

void Proxy::close_listener(Served& served, bool accept_queued, Posts& posts) {
  if (!served.listener && !served.udp_listener) return;
  const config::Service& settings = served.service->settings();
  const SocketName name{settings.vip, settings.port, settings.protocol};
  const std::uint64_t number = ++closings_;
  closing_[name].insert(number);
  posts.add(*served.worker, [this, name, number, accept_queued, tcp = std::move(served.listener),
                             udp = std::move(served.udp_listener), alive = std::weak_ptr(alive_)] {
    if (tcp) tcp->stop(accept_queued);
    if (udp) udp->stop();
    admission_.listener_closed();
    boost::asio::post(control_, [this, name, number, alive] {
      if (!alive.expired()) listener_closed(name, number);
    });
  });
  served.listener.reset();
  served.udp_listener.reset();
}

void Proxy::listener_closed(const SocketName& name, std::uint64_t number) {
  const auto closing = closing_.find(name);
  if (closing == closing_.end() || closing->second.erase(number) == 0 || !closing->second.empty()) return;
  closing_.erase(closing);
  const auto found = served_.find(name);
  if (found != served_.end()) open_waiting(found->second);
}

void Proxy::wait_for_workers() {
  struct Turn {
    std::atomic<std::size_t> workers;
    std::promise<void> over;
  };
  const auto turn = std::make_shared<Turn>(workers_.size());
  for (const auto& worker : workers_) {
    worker->post([turn] {
      if (--turn->workers == 0) turn->over.set_value();
    });
  }
  // A worker does in order what it is asked: behind this, it has done all of it, and closed what is closing.
  if (turn->over.get_future().wait_for(1s) != std::future_status::ready) return;
  for (const auto& [name, numbers] : std::exchange(closing_, {})) {
    const auto found = served_.find(name);
    if (found != served_.end()) open_waiting(found->second);
  }
}

void Proxy::open_waiting(Served& served) {
  if (!served.waits_for_socket || is_handing_over_ || is_draining_) return;
  Posts posts(workers_);
  open_listener(served, posts);
  if (!served.problem.empty()) spdlog::warn("{}", problem_of(served));
}

void Proxy::set_backend_state(const std::string& service, const config::Address& address, std::uint16_t port,
                              config::BackendState state) {
  // A successor is being handed the sockets as they are.
  if (is_handing_over_) return held_states_.push_back({service, address, port, state});
  const auto found = by_name_.find(service);
  if (found == by_name_.end() || is_draining_) return;
  Served& served = *found->second;
  config::Service settings = served.service->settings();
  const auto backend = std::ranges::find_if(
      settings.backends, [&](const config::Backend& each) { return each.address == address && each.port == port; });
  if (backend == settings.backends.end() || backend->state == state || backend->state == config::BackendState::drain ||
      state == config::BackendState::drain)
    return;
  backend->state = state;
  const bool had_problem = !served.problem.empty();
  Posts posts(workers_);
  update(served, next_service(std::move(settings), served), posts);
  if (!served.problem.empty() && !had_problem) spdlog::warn("{}", problem_of(served));
}

/// on_remove = "reset": the connections of backends that `after` does not have end. And one that is still on its way to
/// a backend tries none of these any more.
void Proxy::leave_backends(const Service& before, const std::shared_ptr<const Service>& after, Posts& posts) {
  Posts::Left left{.backends = {before.backends().begin(), before.backends().end()},
                   .is_reset = before.settings().on_remove == config::OnRemove::reset,
                   .after = after};
  if (after) {
    for (const BackendPointer& backend : after->backends()) left.backends.erase(backend);
  }
  if (left.backends.empty() || (!left.is_reset && !after)) return;
  posts.add(before.shared_state(), std::move(left));
}

Worker& Proxy::next_worker() { return *workers_[next_worker_++ % workers_.size()]; }

Problems Proxy::make_vips_local() {
  Problems problems;
  if (!first_.local_vips || is_handing_over_) return problems;
  vip_problems_.clear();
  vips_problem_.clear();
  if (!local_vips_) {
    auto opened = LocalVips::open();
    if (!opened) {
      vips_problem_ = opened.error().message;
      if (opened.error().code == -EBUSY) wait_for_vips(200ms);
      return {vips_problem_};
    }
    local_vips_.emplace(std::move(*opened));
    if (!local_vips_->warning().empty()) problems.push_back(local_vips_->warning());
  }
  auto failures = local_vips_->reconcile(vips_to_serve(), predecessor_vips_);
  if (!failures) {
    vips_problem_ = failures.error().message;
    // One that cannot must not keep another process from it.
    if (failures.error().code == -EPERM) local_vips_.reset();
    return {vips_problem_};
  }
  for (const auto& failure : *failures) {
    problems.push_back(fmt::format("vip {}: {}", failure.vip.to_string(), failure.reason));
    vip_problems_.emplace(failure.vip, problems.back());
  }
  return problems;
}

std::vector<config::Address> Proxy::vips() const {
  std::vector<config::Address> all = vips_to_serve();
  all.insert(all.end(), predecessor_vips_.begin(), predecessor_vips_.end());
  return all;
}

std::vector<config::Address> Proxy::vips_to_serve() const {
  std::set<config::Address> wanted;
  for (const auto& [key, served] : served_) wanted.insert(std::get<config::Address>(key));
  for (const Leaving& leaving : leaving_) wanted.insert(leaving.vip);
  return {wanted.begin(), wanted.end()};
}

/// Looks every second, as long as a VIP is leaving.
void Proxy::watch_leaving() {
  const std::size_t removed = std::erase_if(leaving_, [&](Leaving& leaving) {
    return std::ranges::all_of(leaving.services, [](const auto& service) { return service.expired(); });
  });
  if (removed > 0) make_vips_local();
  if (leaving_.empty()) return;
  leaving_timer_.expires_after(1s);
  leaving_timer_.async_wait([this](const boost::system::error_code& error) {
    if (!error) watch_leaving();
  });
}

void Proxy::allow() {
  allowed_ = std::make_shared<Allowed>(userspace_.allow_from, own_addresses());
  Posts posts(workers_);
  for (const auto& [key, served] : served_) {
    if (served.listener)
      posts.add(*served.worker, [listener = served.listener, allowed = allowed_] { listener->change(allowed); });
    if (served.udp_listener)
      posts.add(*served.worker, [listener = served.udp_listener, allowed = allowed_] { listener->change(allowed); });
  }
}

std::size_t Proxy::serving() const {
  return static_cast<std::size_t>(
      std::ranges::count_if(served_, [](const auto& entry) { return entry.second.problem.empty(); }));
}

std::size_t Proxy::connections() const {
  std::size_t sum = 0;
  for (const auto& worker : workers_) sum += worker->live();
  return sum;
}

void Proxy::inherit(std::map<SocketName, config::Fd> sockets, std::vector<config::Address> vips) {
  inherited_ = std::move(sockets);
  predecessor_vips_ = std::move(vips);
}

void Proxy::predecessor_has_ended() {
  predecessor_vips_.clear();
  make_vips_local();
}

void Proxy::begin_hand_over() {
  is_handing_over_ = true;
  has_given_vips_up_ = local_vips_.has_value();
  local_vips_.reset();
}

void Proxy::cancel_hand_over() {
  is_handing_over_ = false;
  for (const State& held : std::exchange(held_states_, {}))
    set_backend_state(held.service, held.address, held.port, held.state);
  for (auto& [name, served] : served_) open_waiting(served);
  // The process that was to take over may be ending still, and has the routes until then.
  if (has_given_vips_up_) wait_for_vips(0s);
}

/// Makes VIPs local as soon as no other process does, and serves what could not be bound until then.
void Proxy::wait_for_vips(Clock::duration pause) {
  vips_timer_.expires_after(pause);
  vips_timer_.async_wait([this](const boost::system::error_code& error) {
    if (error || local_vips_ || is_handing_over_ || is_draining_) return;
    const Problems problems = make_vips_local();  // waits again
    if (!local_vips_) return;
    for (const std::string& problem : problems) spdlog::warn("{}", problem);
    open_missing_listeners();
  });
}

/// By us, or by somebody else: then it is added again soon. To whoever removes it again and again it is left for ever
/// longer.
void Proxy::route_removed() {
  if (!local_vips_ || std::exchange(is_repairing_, true)) return;
  if (Clock::now() - last_repair_ > 2 * longest_repair_pause) repair_pause_ = first_repair_pause;
  repair_timer_.expires_after(repair_pause_);
  repair_timer_.async_wait([this](const boost::system::error_code& error) {
    is_repairing_ = false;
    if (!error && local_vips_) add_removed_routes();
  });
}

void Proxy::add_removed_routes() {
  const Problems problems = make_vips_local();
  const std::size_t added = local_vips_ ? local_vips_->added() : 0;
  if (local_vips_ && added == 0) return;
  for (const std::string& problem : problems) spdlog::warn("{}", problem);
  if (added == 0) return;
  spdlog::warn("somebody else has removed {} local routes of this proxy: added again", added);
  last_repair_ = Clock::now();
  repair_pause_ = std::min<Clock::duration>(2 * repair_pause_, longest_repair_pause);
}

void Proxy::open_missing_listeners() {
  Posts posts(workers_);
  for (auto& [key, served] : served_) {
    if (served.problem.empty()) continue;
    open_listener(served, posts);
    const std::string name = config::printable(served.service->settings().name);
    if (served.problem.empty())
      spdlog::info("service {}: serving now", name);
    else
      spdlog::warn("service {}: {}", name, served.problem);
  }
}

std::vector<std::pair<SocketName, int>> Proxy::sockets() const {
  std::vector<std::pair<SocketName, int>> sockets;
  for (const auto& [key, served] : served_) {
    if (served.listener) sockets.emplace_back(key, served.listener->socket());
    if (served.udp_listener) sockets.emplace_back(key, served.udp_listener->socket());
  }
  return sockets;
}

Status Proxy::status() const {
  Status status{.version = CLUSTERIP_VERSION,
                .pid = ::getpid(),
                .since = since_,
                .threads = workers_.size(),
                .connections = connections(),
                .connection_limit = static_cast<std::uint64_t>(admission_.limit())};
  status.services.reserve(in_order_.size());
  for (const Served* served : in_order_) status.services.push_back(status_of(*served));
  return status;
}

ServiceStatus Proxy::status_of(const Served& served) const {
  const config::Service& settings = served.service->settings();
  ServiceStatus status{.name = settings.name,
                       .vip = settings.vip,
                       .port = settings.port,
                       .protocol = settings.protocol,
                       .policy = settings.policy};
  const auto vip_problem = vip_problems_.find(settings.vip);
  status.is_serving = served.listener != nullptr || served.udp_listener != nullptr;
  if (is_draining_)
    status.reason = "the proxy is ending";
  else if (!served.problem.empty())
    status.reason = served.problem;
  else if (served.service->is_empty())
    status.reason = "no active backend";
  else if (served.waits_for_socket)
    status.reason = "its former socket is being closed";
  if (!served.problem.empty() && !vips_problem_.empty()) status.reason += "; " + vips_problem_;
  if (vip_problem != vip_problems_.end()) status.reason += (status.reason.empty() ? "" : "; ") + vip_problem->second;
  const ServiceState& counted = *served.state;
  status.refused = counted.refused.load(std::memory_order_relaxed);
  status.denied = counted.denied.load(std::memory_order_relaxed);
  status.dropped = counted.dropped.load(std::memory_order_relaxed);
  status.received = counted.received.load(std::memory_order_relaxed);
  status.sent = counted.sent.load(std::memory_order_relaxed);
  const auto now = Clock::now();
  const auto backends = served.service->backends();
  const auto ejected = [&](const Backend& backend) {
    const auto left = settings.eject ? backend.mark_left(now) : std::nullopt;
    return std::chrono::ceil<std::chrono::milliseconds>(left.value_or(Clock::duration::zero()));
  };
  for (std::size_t i = 0; i < backends.size(); ++i) {
    const config::Backend& backend = settings.backends[i];
    status.backends.push_back({.address = backend.address,
                               .port = backend.port,
                               .weight = backend.weight,
                               .state = backend.state,
                               .is_marked = backends[i]->is_marked(now),
                               .ejected = ejected(*backends[i]),
                               .live = backends[i]->live.load(std::memory_order_relaxed),
                               .connects = backends[i]->connects.load(std::memory_order_relaxed),
                               .failures = backends[i]->failures.load(std::memory_order_relaxed)});
  }
  return status;
}

void Proxy::drain(std::function<void()> done) {
  is_draining_ = true;
  {
    Posts posts(workers_);
    for (auto& [key, served] : served_) {
      if (served.udp_listener)
        posts.add(*served.worker, [listener = std::move(served.udp_listener), handed_over = is_handing_over_] {
          listener->drain(handed_over);
        });
      else
        close_listener(served, !is_handing_over_, posts);  // else what is queued is the successor's
    }
    // Behind the listeners: when a worker has done this, it has accepted all that was queued.
    workers_accepting_ = workers_.size();
    for (const auto& worker : workers_) posts.add(*worker, [this] { --workers_accepting_; });
  }
  // Never at once: whoever asked for it may have something to say first, as to a successor.
  drain_timer_.expires_after(20ms);
  drain_timer_.async_wait([this, until = Clock::now() + userspace_.drain_timeout,
                           done = std::move(done)](const boost::system::error_code& error) mutable {
    if (!error) wait_for_end(until, std::move(done));
  });
}

void Proxy::wait_for_end(Clock::time_point until, std::function<void()> done) {
  // A predecessor's connections need the routes, which end with this process.
  if (workers_accepting_ == 0 && connections() == 0 && predecessor_vips_.empty()) return done();
  if (Clock::now() >= until) {
    if (const std::size_t left = connections(); left > 0 && !std::exchange(is_drain_over_, true))
      spdlog::warn("drain_timeout is over: {} connections are reset", left);
    for (const auto& worker : workers_)
      worker->post([&worker = *worker] {
        worker.for_each_relay([](Relay& relay) { relay.end(); });
        worker.end_flows();
      });
  }
  drain_timer_.expires_after(20ms);
  drain_timer_.async_wait([this, until, done = std::move(done)](const boost::system::error_code& error) mutable {
    if (!error) wait_for_end(until, std::move(done));
  });
}

}  // namespace userspace
