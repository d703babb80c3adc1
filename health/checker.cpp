// SPDX-License-Identifier: BSD-2-Clause
#include "health/checker.h"

#include <fmt/format.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>

#include <algorithm>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <cctype>
#include <cerrno>
#include <chrono>
#include <optional>
#include <tuple>
#include <vector>

#include "config/fd.h"

namespace health {
namespace {

using namespace std::chrono_literals;
using boost::asio::ip::tcp;
using Clock = std::chrono::steady_clock;

// A start learns within a second, whatever the interval.
constexpr Clock::duration longest_first_wait = 1s;
constexpr double jitter = 0.1;

// Connects at once: thousands of SYNs in one burst overflow queues on their way, and look like backends that are down.
constexpr rlim_t most_connects = 512;

// Until a shortage of descriptors, ports or memory is looked at again.
constexpr auto shortage_pause = 100ms;

/// The descriptors are those of the whole process, which has other uses for most of them.
std::size_t allowed_under_way() {
  rlimit limit{};
  ::getrlimit(RLIMIT_NOFILE, &limit);
  return static_cast<std::size_t>(std::clamp<rlim_t>(limit.rlim_cur / 4, 1, most_connects));
}

/// This host's, which says nothing of a backend: of descriptors, memory, or watches of epoll.
bool is_shortage(int error) {
  return error == EMFILE || error == ENFILE || error == ENOBUFS || error == ENOMEM || error == ENOSPC;
}

/// No local port is left towards this one backend, which says nothing of it either.
bool is_out_of_ports(int error) { return error == EADDRNOTAVAIL || error == EAGAIN; }

void set_reset_on_close(int fd) {
  const linger at_once{.l_onoff = 1, .l_linger = 0};
  ::setsockopt(fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
}

/// "Connection refused" inside of a sentence.
std::string text_of(int error) {
  std::string text = boost::system::error_code(error, boost::system::system_category()).message();
  if (!text.empty()) text[0] = static_cast<char>(std::tolower(static_cast<unsigned char>(text[0])));
  return text;
}

}  // namespace

bool Checker::Target::operator<(const Target& other) const {
  const auto key = [](const Target& target) {
    const config::Health& asked = target.health;
    return std::tie(target.address, target.port, asked.interval, asked.timeout, asked.rise, asked.fall);
  };
  return key(*this) < key(other);
}

/// The checks of one backend. It belongs to the checker, and knows it until stop().
class Checker::Probe : public std::enable_shared_from_this<Probe> {
 public:
  Probe(Checker& checker, const Target& target)
      : checker_(checker), target_(target), endpoint_(target.address, target.port), timer_(checker.io_) {}

  bool is_up() const { return is_up_; }
  bool is_queued() const { return stage_ == Stage::queued; }

  /// Whom it tells. Empties the list that apply() fills again.
  void forget_services() { services_.clear(); }
  void add_service(const std::string& name) { services_.push_back(name); }

  /// Before the first check.
  void begin_down() {
    if (stage_ == Stage::fresh) is_up_ = false;
  }
  void start(Clock::duration wait) {
    if (stage_ == Stage::fresh) wait_until(Clock::now() + wait);
  }
  /// No handler does anything any more.
  void stop() {
    const bool was_under_way = stage_ == Stage::connecting;
    enter(Stage::stopped);
    timer_.cancel();
    socket_.reset();
    if (was_under_way) checker_.ended();
  }

  /// Begins the check for which it is queued. False when this host has no room for it now.
  bool begin();

 private:
  enum class Stage : std::uint8_t { fresh, waiting, queued, connecting, stopped };

  /// What an earlier stage has asked for comes to nothing: a handler that is queued already cannot be cancelled.
  void enter(Stage stage) {
    stage_ = stage;
    ++turn_;
  }
  template <class Function>
  auto guarded(Function function) {
    return [weak = weak_from_this(), turn = turn_, function](const boost::system::error_code& error) {
      const auto self = weak.lock();
      if (self && self->turn_ == turn) function(*self, error);
    };
  }

  void wait_until(Clock::time_point time);
  void connected_or_failed(int error);
  bool is_answered();
  void end(std::optional<std::string> fault);
  void end_without_result();
  void wait_for_next();
  void count(std::optional<std::string> fault);

  Checker& checker_;
  const Target target_;
  const tcp::endpoint endpoint_;
  std::vector<std::string> services_;
  bool is_up_ = true;
  bool is_mixed_ = false;             // the results that contradict is_up_ do not all have the fault_
  std::uint32_t contradictions_ = 0;  // in a row: failures while it is up, successes while it is down
  std::string fault_;                 // the last one's
  Stage stage_ = Stage::fresh;
  std::uint64_t turn_ = 0;
  Clock::time_point begun_;
  boost::asio::steady_timer timer_;  // for the next check, or for the time that this one has
  std::optional<tcp::socket> socket_;
};

void Checker::Probe::wait_until(Clock::time_point time) {
  enter(Stage::waiting);
  timer_.expires_at(time);
  timer_.async_wait(guarded([](Probe& self, const boost::system::error_code&) {
    self.enter(Stage::queued);
    self.checker_.enqueue(self.weak_from_this());
  }));
}

bool Checker::Probe::begin() {
  const auto outcome = [](Probe& self, const boost::system::error_code& error) {
    self.connected_or_failed(error.value());
  };
  config::Fd fd(::socket(endpoint_.protocol().family(), SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, IPPROTO_TCP));
  const int socket_error = fd ? 0 : errno;
  if (is_shortage(socket_error)) return false;
  begun_ = Clock::now();
  enter(Stage::connecting);
  ++checker_.under_way_;
  if (!fd) {  // a family that this kernel does not have
    boost::asio::post(checker_.io_, [failed = guarded(outcome), socket_error] {
      failed({socket_error, boost::system::system_category()});
    });
    return true;
  }
  socket_.emplace(checker_.io_);
  boost::system::error_code error;
  socket_->assign(endpoint_.protocol(), fd.get(), error);
  if (error) {  // of epoll: fs.epoll.max_user_watches
    socket_.reset();
    --checker_.under_way_;
    enter(Stage::queued);
    return false;
  }
  fd.release();
  timer_.expires_at(begun_ + target_.health.timeout);
  timer_.async_wait(guarded([](Probe& self, const boost::system::error_code&) {
    // A process that was held up finds the time over, and the answer there. The other handler comes with it.
    if (self.is_answered()) return;
    self.end(fmt::format("no answer within {} ms", self.target_.health.timeout.count()));
  }));
  socket_->async_connect(endpoint_, guarded(outcome));
  return true;
}

bool Checker::Probe::is_answered() {
  pollfd asked{.fd = socket_->native_handle(), .events = POLLOUT, .revents = 0};
  return ::poll(&asked, 1, 0) == 1;
}

void Checker::Probe::connected_or_failed(int error) {
  if (error == 0) {
    boost::system::error_code ignored;
    if (socket_->local_endpoint(ignored) != endpoint_) return end({});
    // Where nobody listens on a port that the kernel gives to clients, it may give it to this one. Closed with a FIN,
    // it would keep the port from the backend for a minute.
    set_reset_on_close(socket_->native_handle());
    error = ECONNREFUSED;
  }
  if (is_out_of_ports(error)) return end_without_result();
  if (!is_shortage(error)) return end(text_of(error));
  enter(Stage::queued);
  timer_.cancel();
  socket_.reset();
  checker_.pause();
  checker_.enqueue(weak_from_this());
  checker_.ended();
}

/// The result of a check: a fault, or none.
void Checker::Probe::end(std::optional<std::string> fault) {
  end_without_result();
  count(std::move(fault));
}

void Checker::Probe::end_without_result() {
  timer_.cancel();
  socket_.reset();
  wait_for_next();
  checker_.ended();
}

void Checker::Probe::wait_for_next() {
  const double factor = std::uniform_real_distribution(1 - jitter, 1 + jitter)(checker_.random_);
  const auto interval = std::chrono::duration<double>(target_.health.interval) * factor;
  wait_until(begun_ + std::chrono::duration_cast<Clock::duration>(interval));
}

/// Comes last: whoever is told may stop this probe, and destroy the checker.
void Checker::Probe::count(std::optional<std::string> fault) {
  if (fault.has_value() != is_up_) {
    contradictions_ = 0;
    return;
  }
  ++contradictions_;
  if (fault) {
    is_mixed_ = contradictions_ > 1 && (is_mixed_ || fault_ != *fault);
    fault_ = std::move(*fault);
  }
  const config::Health& health = target_.health;
  if (contradictions_ < (is_up_ ? health.fall : health.rise)) return;
  is_up_ = !is_up_;
  std::string reason;
  if (!is_up_) {
    reason = fault_;
    if (is_mixed_)
      reason += fmt::format(", the last of {} failures in a row", contradictions_);
    else if (contradictions_ > 1)
      reason += fmt::format(", {} times in a row", contradictions_);
  }
  contradictions_ = 0;
  std::vector<Change> changes;
  changes.reserve(services_.size());
  for (const std::string& service : services_)
    changes.push_back({service, target_.address, target_.port, is_up_, reason});
  const auto changed = checker_.changed_;
  (*changed)(changes);
}

Checker::Checker(boost::asio::io_context& io, std::function<void(std::span<const Change>)> changed)
    : io_(io),
      changed_(std::make_shared<const std::function<void(std::span<const Change>)>>(std::move(changed))),
      most_under_way_(allowed_under_way()),
      pause_(io),
      random_(std::random_device{}()) {}

Checker::~Checker() {
  is_paused_ = true;  // what stop() makes room for does not begin any more
  for (const auto& [target, probe] : probes_) probe->stop();
}

void Checker::apply(std::span<const config::Service> services) {
  for (const auto& [target, probe] : probes_) probe->forget_services();
  std::map<Target, std::shared_ptr<Probe>> before = std::exchange(probes_, {});
  services_.clear();
  for (const config::Service& service : services) {
    if (!service.health) continue;
    auto& endpoints = services_[service.name];
    for (const config::Backend& backend : service.backends) {
      if (backend.state == config::BackendState::drain) continue;
      const Target target{backend.address, backend.port, *service.health};
      std::shared_ptr<Probe>& probe = probes_[target];
      if (!probe) {
        const auto old = before.find(target);
        probe = old != before.end() ? std::move(old->second) : std::make_shared<Probe>(*this, target);
        if (old != before.end()) before.erase(old);
      }
      if (backend.state == config::BackendState::down) probe->begin_down();
      probe->add_service(service.name);
      endpoints.emplace(Endpoint(backend.address, backend.port), probe);
    }
  }
  for (const auto& [target, probe] : probes_) {
    const Clock::duration first = std::min<Clock::duration>(target.health.interval, longest_first_wait);
    probe->start(Clock::duration(std::uniform_int_distribution<Clock::rep>(0, first.count())(random_)));
  }
  for (const auto& [target, probe] : before) probe->stop();
}

bool Checker::is_down(const std::string& service, const config::Address& address, std::uint16_t port) const {
  const auto endpoints = services_.find(service);
  if (endpoints == services_.end()) return false;
  const auto probe = endpoints->second.find({address, port});
  return probe != endpoints->second.end() && !probe->second->is_up();
}

void Checker::enqueue(std::weak_ptr<Probe> probe) {
  queue_.push_back(std::move(probe));
  begin_queued();
}

void Checker::begin_queued() {
  while (!is_paused_ && !queue_.empty() && under_way_ < most_under_way_) {
    const auto probe = queue_.front().lock();
    if (probe && probe->is_queued() && !probe->begin()) return pause();
    queue_.pop_front();
  }
}

void Checker::pause() {
  is_paused_ = true;
  pause_.expires_after(shortage_pause);
  pause_.async_wait([this, alive = std::weak_ptr(alive_)](const boost::system::error_code& error) {
    if (error || alive.expired()) return;
    is_paused_ = false;
    begin_queued();
  });
}

void Checker::ended() {
  --under_way_;
  begin_queued();
}

}  // namespace health
