// SPDX-License-Identifier: BSD-2-Clause
#include "fallback_proxy/worker.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>

#include <algorithm>
#include <boost/asio/post.hpp>
#include <cerrno>
#include <system_error>
#include <utility>

#include "fallback_proxy/watched.h"

namespace userspace {
namespace {

using namespace std::chrono_literals;

// One read can take so much. Larger buffers fall out of the cache.
constexpr std::size_t buffer_size = std::size_t{256} * 1024;

// A backend leg gets its keepalive options only when it has lived for so long: most connections are shorter.
constexpr auto young_time = 1s;
// Without progress for so long, the second half of a half-closed connection is given up.
constexpr auto half_closed_time = 10min;
constexpr auto delivering_time = 20ms;

// A flow that answers a question does so within this time, as a rule.
constexpr auto draining_flow_time = 1s;

constexpr auto pause_time = 100ms;

constexpr int ready_at_once = 64;

config::Fd open_reserve() { return config::Fd(::open("/dev/null", O_RDONLY | O_CLOEXEC)); }

int new_epoll() {
  const int fd = ::epoll_create1(EPOLL_CLOEXEC);
  if (fd < 0) throw std::system_error(errno, std::generic_category(), "epoll_create1");
  return fd;
}

}  // namespace

Worker::Worker(const WorkerSettings& settings, Admission& admission)
    // All its sockets are used by its one thread only; posting to it is safe from any.
    : io_(BOOST_ASIO_CONCURRENCY_HINT_UNSAFE_IO),
      work_(io_.get_executor()),
      settings_(settings),
      admission_(admission),
      buffer_(buffer_size),
      pipes_(settings.pipes),
      random_(std::random_device{}()),
      reserve_(open_reserve()),
      deadlines_{Deadlines<Relay>(settings.connect_timeout), Deadlines<Relay>(young_time),
                 Deadlines<Relay>(settings.idle_timeout), Deadlines<Relay>(half_closed_time),
                 Deadlines<Relay>(delivering_time)},
      idle_flows_(settings.udp_timeout),
      draining_flows_(draining_flow_time),
      timer_(io_),
      pause_(io_),
      epoll_(io_, new_epoll()) {
  if (const auto watched = check_watched(); !watched)  // later, the end of its thread could not be asked for
    throw std::system_error(-watched.error().code, std::generic_category(), watched.error().message);
  wait_for_relays();
  // Signals are the control thread's.
  sigset_t all;
  sigset_t before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    thread_ = std::thread([this] { io_.run(); });
  } catch (const std::system_error& error) {
    throw std::system_error(error.code(), "starting a thread (not enough memory, or TasksMax=, ulimit -u)");
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void Worker::stop() {
  io_.stop();
  if (thread_.joinable()) thread_.join();
}

Worker::~Worker() {
  stop();
  relays_.clear_and_dispose(std::default_delete<Relay>());
}

void Worker::take(Accepted accepted) {
  live_.fetch_add(1, std::memory_order_relaxed);
  boost::asio::post(io_,
                    [this, accepted = std::move(accepted)]() mutable { Relay::start(*this, std::move(accepted)); });
}

void Worker::post(std::function<void()> function) { boost::asio::post(io_, std::move(function)); }

void Worker::start(Accepted accepted) {
  live_.fetch_add(1, std::memory_order_relaxed);
  Relay::start(*this, std::move(accepted));
}

// --- relays ---------------------------------------------------------------------------------------------------------
// Their sockets have an epoll of their own, which is one descriptor to Asio: that arms epoll again by a system call for
// each wait, which was a tenth of what a small message costs. Here a socket is registered once.

void Worker::add(Relay& relay) { relays_.push_back(relay); }

bool Worker::watch(Relay::Leg& leg, std::uint32_t events) {
  epoll_event event = {.events = events | EPOLLET, .data = {.ptr = &leg}};
  const int operation = leg.watched == 0 ? EPOLL_CTL_ADD : EPOLL_CTL_MOD;
  return ::epoll_ctl(epoll_.native_handle(), operation, leg.socket.get(), &event) == 0;
}

void Worker::wait_for_relays() {
  epoll_.async_wait(epoll_.wait_read, [this](const boost::system::error_code& error) {
    if (error) return;
    run_ready_relays();
    wait_for_relays();
  });
}

void Worker::run_ready_relays() {
  epoll_event events[ready_at_once];
  const int count = ::epoll_wait(epoll_.native_handle(), events, ready_at_once, 0);
  is_running_relays_ = true;
  for (const epoll_event& event : std::span(events, static_cast<std::size_t>(std::max(count, 0)))) {
    auto& leg = *static_cast<Relay::Leg*>(event.data.ptr);
    leg.relay->ready(leg.side, event.events);
  }
  is_running_relays_ = false;
  ended_relays_.clear_and_dispose(std::default_delete<Relay>());
}

void Worker::release(Relay& relay) {
  if (!is_running_relays_) {
    delete &relay;
    return;
  }
  // Another event of those that were fetched together may be its other socket's.
  static_cast<Listed&>(relay).unlink();
  ended_relays_.push_back(relay);
}

void Worker::ended() {
  live_.fetch_sub(1, std::memory_order_relaxed);
  admission_.give_back();
  has_room();
}

void Worker::has_room() {
  if (!reserve_) reserve_ = open_reserve();
  if (!paused_.empty()) resume_accepting();
}

void Worker::for_each_relay(const std::function<void(Relay&)>& function) {
  for (auto next = relays_.begin(); next != relays_.end();) function(*next++);
}

bool Worker::release_reserve() {
  const bool had_one(reserve_);
  reserve_.reset();
  return had_one;
}

void Worker::when_there_is_room(std::function<void()> resume) {
  paused_.push_back(std::move(resume));
  if (paused_.size() > 1) return;
  // The connection that ends may be another thread's.
  pause_.expires_after(pause_time);
  pause_.async_wait([this](const boost::system::error_code& error) {
    if (!error) resume_accepting();
  });
}

void Worker::resume_accepting() {
  pause_.cancel();
  for (const auto& resume : std::exchange(paused_, {})) boost::asio::post(io_, resume);
}

void Worker::wait(Relay& relay, Wait what) {
  auto& deadlines = deadlines_[static_cast<std::size_t>(what)];
  const auto now = Clock::now();
  deadlines.add(relay, now);
  arm(now + deadlines.time());
}

/// The timer goes off at `due`, or earlier. It is never put off: that would cost a system call for each connection.
void Worker::arm(Clock::time_point due) {
  if (armed_ && *armed_ <= due) return;
  armed_ = due;
  timer_.expires_at(due);
  timer_.async_wait([this](const boost::system::error_code& error) {
    if (!error) expire();
  });
}

void Worker::expire() {
  armed_.reset();
  const auto now = Clock::now();
  for (auto& deadlines : deadlines_) expire(deadlines, now);
  expire(idle_flows_, now);
  expire(draining_flows_, now);
}

template <class Item>
void Worker::expire(Deadlines<Item>& deadlines, Clock::time_point now) {
  while (Item* item = deadlines.pop(now)) item->expire();
  if (const auto next = deadlines.next()) arm(*next);
}

// --- UDP flows ------------------------------------------------------------------------------------------------------

Datagrams& Worker::datagrams() {
  if (!datagrams_) datagrams_ = std::make_unique<Datagrams>();
  return *datagrams_;
}

bool Worker::take_flow() {
  if (places_ > 0)
    --places_;
  else if (!admission_.take_flow() && !give_up_flow())
    return false;
  live_.fetch_add(1, std::memory_order_relaxed);
  flows_.fetch_add(1, std::memory_order_relaxed);
  return true;
}

void Worker::flow_ended() {
  live_.fetch_sub(1, std::memory_order_relaxed);
  flows_.fetch_sub(1, std::memory_order_relaxed);
  admission_.give_back_flow();
  has_room();
}

Flow* Worker::idlest_flow() {
  Flow* flow = idle_flows_.first();
  return flow != nullptr ? flow : draining_flows_.first();
}

/// Its place is the caller's.
bool Worker::give_up_flow() {
  Flow* flow = idlest_flow();
  if (flow == nullptr) return false;
  flow->give_up();
  live_.fetch_sub(1, std::memory_order_relaxed);
  flows_.fetch_sub(1, std::memory_order_relaxed);
  return true;
}

void Worker::ask_for_place(Worker& other) {
  if (std::exchange(asks_for_place_, true)) return;
  // The place itself is handed over: free, it would be the other thread's again before this one's client asks again.
  other.post([this, &other] {
    const bool has_given = other.give_up_flow();
    post([this, has_given] {
      asks_for_place_ = false;
      if (has_given) ++places_;
    });
  });
}

void Worker::wait(Flow& flow) {
  auto& deadlines = is_draining_flows_ ? draining_flows_ : idle_flows_;
  const auto now = Clock::now();
  deadlines.add(flow, now);
  arm(now + deadlines.time());
}

void Worker::drain_flows() {
  if (std::exchange(is_draining_flows_, true)) return;
  while (Flow* flow = idle_flows_.first()) wait(*flow);
}

void Worker::end_flows() {
  while (Flow* flow = idlest_flow()) flow->end();
}

}  // namespace userspace
