// SPDX-License-Identifier: BSD-2-Clause
#include "fallback_proxy/relay.h"

#include <fcntl.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>

#include "fallback_proxy/proxy_header.h"
#include "fallback_proxy/socket_options.h"
#include "fallback_proxy/worker.h"

namespace userspace {
namespace {

// A connection that always has more to read lets the others have their turn after so many reads.
constexpr int rounds = 16;

// Splicing pays from about this size on: below, moving the bytes costs less than a second system call.
constexpr std::int64_t large = std::int64_t{16} * 1024;
constexpr std::uint8_t large_reads_to_splice = 3;
constexpr std::uint8_t small_reads_to_copy = 8;

// How often at most an end is asked whether it has received everything, every 20 ms without progress: 30 s.
constexpr std::uint16_t max_checks = 1500;

constexpr std::uint32_t report_at = 1024 * 1024;

bool is_shortage(int error) {
  return error == EMFILE || error == ENFILE || error == ENOBUFS || error == ENOMEM ||
         error == ENOSPC;  // of epoll: fs.epoll.max_user_watches
}

// What is said of a socket that is read. It is said once, when it comes: epoll is edge-triggered.
constexpr std::uint32_t to_read = EPOLLIN | EPOLLRDHUP | EPOLLPRI;

bool would_block(int error) { return error == EAGAIN || error == EWOULDBLOCK; }

/// Cheaper than asking for the state.
bool is_connected(int fd) {
  sockaddr_storage peer;
  socklen_t length = sizeof peer;
  return ::getpeername(fd, reinterpret_cast<sockaddr*>(&peer), &length) == 0;
}

std::uint8_t tcp_state(int fd) {
  // The state is the first byte of tcp_info; the kernel copies as much as is asked for.
  std::uint8_t state = TCP_CLOSE;
  socklen_t length = sizeof state;
  ::getsockopt(fd, IPPROTO_TCP, TCP_INFO, &state, &length);
  return state;
}

int pending_error(int fd) {
  int error = 0;
  socklen_t length = sizeof error;
  return ::getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length) == 0 ? error : errno;
}

/// Bytes that the peer's kernel has not acknowledged; our FIN counts as one.
std::uint32_t undelivered_bytes(int fd) {
  int bytes = 0;
  return tcp_state(fd) != TCP_CLOSE && ::ioctl(fd, SIOCOUTQ, &bytes) == 0 ? static_cast<std::uint32_t>(bytes) : 0;
}

/// Whether the next byte is urgent. Leaves errno as it is.
bool is_at_mark(int fd) {
  const int error = errno;
  int at_mark = 0;
  ::ioctl(fd, SIOCATMARK, &at_mark);
  errno = error;
  return at_mark != 0;
}

}  // namespace

Relay::Relay(Worker& worker, Accepted accepted)
    : worker_(worker),
      service_(std::move(accepted.service)),
      attempt_(std::make_unique<Attempt>(accepted.client, std::vector<BackendPointer>{})) {
  worker_.add(*this);
  legs_[client].socket = std::move(accepted.socket);
}

Relay::~Relay() {
  // Cut off in the middle: no side may take it for the end.
  if (phase_ != Phase::closed) reset();
  worker_.ended();
}

void Relay::start(Worker& worker, Accepted accepted) {
  auto* relay = new Relay(worker, std::move(accepted));  // the worker's
  relay->try_backends();
  relay->release_if_closed();
}

// --- reaching a backend ---------------------------------------------------------------------------------------------
// Nothing is read from the client before a backend has taken the connection: its first bytes wait in the kernel, and
// every backend that is tried can still have them.

void Relay::try_backends() {
  for (;;) {
    backend_ = service_->choose(attempt_->client, attempt_->tried, worker_.random());
    if (!backend_) break;
    attempt_->tried.push_back(backend_);
    backend_->live.fetch_add(1, std::memory_order_relaxed);
    const int error = connect_to(*backend_);
    if (error == 0) return connected();
    if (error == EINPROGRESS) {
      worker_.wait(*this, Worker::Wait::connecting);
      return;
    }
    attempt_failed(error);
    if (is_shortage(error)) break;  // another backend would not change that
  }
  service_->state().refused.fetch_add(1, std::memory_order_relaxed);
  reset();
}

int Relay::connect_to(const Backend& backend) {
  const int type = SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC;
  config::Fd socket(::socket(backend.address.family(), type, IPPROTO_TCP));
  if (!socket && (errno == EMFILE || errno == ENFILE) && worker_.release_reserve()) {
    socket = config::Fd(::socket(backend.address.family(), type, IPPROTO_TCP));
  }
  if (!socket) return errno;
  int error = ::connect(socket.get(), backend.address.get(), backend.address.length) == 0 ? 0 : errno;
  if (error != 0 && error != EINPROGRESS) return error;
  // On loopback and in a near network the connection stands when connect() returns, although that says EINPROGRESS.
  if (error == EINPROGRESS && is_connected(socket.get())) error = 0;
  if (error == 0 && is_connected_to_itself(socket.get(), backend.address)) {
    set_reset_on_close(socket.get());
    return ECONNREFUSED;
  }
  legs_[backend_side].socket = std::move(socket);
  if (error == EINPROGRESS && !watch(backend_side, EPOLLOUT)) return ENOSPC;
  return error;
}

void Relay::attempt_failed(int error) {
  backend_->live.fetch_sub(1, std::memory_order_relaxed);
  // No local port left (EADDRNOTAVAIL) counts as well: towards this backend nothing goes, towards another it may.
  if (!is_shortage(error)) service_->failed(*backend_, error, Clock::now());
  backend_.reset();
  legs_[backend_side].close();
}

void Relay::connect_outcome() {
  int error = pending_error(fd(backend_side));
  if (error == 0 && is_connected_to_itself(fd(backend_side), backend_->address)) {
    set_reset_on_close(fd(backend_side));
    error = ECONNREFUSED;
  }
  if (error == 0) return connected();
  attempt_failed(error);
  try_backends();
}

void Relay::change(const std::shared_ptr<const Service>& service) {
  if (phase_ == Phase::connecting) service_ = service;
}

void Relay::connected() {
  service_->reached(*backend_);
  service_->remember(attempt_->client, backend_, worker_.settings().flows);
  phase_ = Phase::open;
  worker_.wait(*this, Worker::Wait::young);
  const bool sent = send_proxy_header();
  attempt_.reset();
  if (!sent) return reset();
  pump(client);
  if (phase_ != Phase::open) return;
  // What has come before is reported at once. The backend may speak first.
  if (!watch(client, to_read) || !watch(backend_side, to_read)) reset();
}

bool Relay::send_proxy_header() {
  const auto& settings = service_->settings();
  if (settings.proxy_protocol == config::ProxyProtocol::none) return true;
  const std::string header =
      proxy_header(settings.proxy_protocol, attempt_->client, SocketAddress(settings.vip, settings.port));
  sends_ = 1;
  // The first bytes of a connection always find room.
  return ::send(fd(backend_side), header.data(), header.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(header.size());
}

void Relay::Leg::close() { *this = {.relay = relay, .side = side}; }

// --- waiting --------------------------------------------------------------------------------------------------------

/// False when the kernel has no memory for it, or no more watches.
bool Relay::watch(Side side, std::uint32_t events) {
  Leg& leg = legs_[side];
  const std::uint32_t all = leg.watched | events;
  if (all == leg.watched) return true;
  if (!worker_.watch(leg, all)) return false;
  leg.watched = all;
  return true;
}

void Relay::wait_to_write(Side side) {
  legs_[side].waits_to_write = true;
  if (!watch(side, EPOLLOUT)) reset();
}

/// Lets the others have their turn: what is watched already is reported again when it is watched anew.
void Relay::go_on_later(Side side) {
  if (legs_[side].watched != 0 && !worker_.watch(legs_[side], legs_[side].watched)) reset();
}

void Relay::ready(Side side, std::uint32_t events) {
  switch (phase_) {
    case Phase::connecting:
      connect_outcome();
      break;
    case Phase::open:
      pump_what_is_ready(side, events);
      break;
    case Phase::delivering:
    case Phase::closed:  // by what came of its other socket
      return;
  }
  release_if_closed();
}

void Relay::pump_what_is_ready(Side side, std::uint32_t events) {
  Leg& leg = legs_[side];
  if ((events & (EPOLLRDHUP | EPOLLPRI | EPOLLHUP | EPOLLERR)) != 0) leg.has_more = true;
  if (leg.waits_to_write && (events & (EPOLLOUT | EPOLLHUP | EPOLLERR)) != 0) {
    leg.waits_to_write = false;
    pump(other(side));
  }
  // What the other side does not take yet is not read, either.
  if (phase_ == Phase::open && !legs_[other(side)].waits_to_write) pump(side);
  // A side that has said all is not read any more, and may be reset nevertheless.
  if (phase_ == Phase::open && directions_[side].is_finished && (events & (EPOLLHUP | EPOLLERR)) != 0 &&
      tcp_state(fd(side)) == TCP_CLOSE)
    reset_when_delivered(other(side));
}

void Relay::expire() {
  switch (phase_) {
    case Phase::connecting:
      attempt_failed(ETIMEDOUT);
      try_backends();
      break;
    case Phase::open:
      if (!is_kept_alive_) {
        keep_alive();
        progress();
      } else {
        reset();  // idle, or half closed without progress
      }
      break;
    case Phase::delivering:
      reset_when_delivered(legs_[client].socket ? client : backend_side);
      break;
    case Phase::closed:
      break;
  }
  release_if_closed();
}

// --- passing bytes on -----------------------------------------------------------------------------------------------

void Relay::pump(Side from) {
  Direction& direction = directions_[from];
  for (int round = 0; phase_ == Phase::open && !direction.is_finished; ++round) {
    switch (flush(from)) {
      case Flushed::blocked:
        return wait_to_write(other(from));
      case Flushed::broken:
        if (is_shortage(errno)) return reset();  // ours: the other side is as it was, and would wait for more for ever
        return writing_failed(from);
      case Flushed::all:
        break;
    }
    if (direction.has_read_all) return finish(from);
    if (round == rounds) return go_on_later(from);

    const bool copying = !direction.pipe;
    const std::int64_t size = copying ? receive(from) : splice_in(from);
    if (size > 0) {
      progress();
      adapt(from, size);
      // Less than there was room for: that was all, and of what comes now there will be word.
      if (copying && std::cmp_less(size, worker_.buffer().size()) && !direction.held && !direction.pipe &&
          !legs_[from].has_more)
        return;
    } else if (size == 0) {
      direction.has_read_all = true;
    } else if (would_block(errno)) {
      return;
    } else if (errno != EINTR) {
      // A reset. All that came before it has been passed on.
      return reset_when_delivered(other(from));
    }
  }
}

std::int64_t Relay::receive(Side from) {
  const auto buffer = worker_.buffer();
  const ssize_t size = ::recv(fd(from), buffer.data(), buffer.size(), 0);
  if (size <= 0) return size;
  count(from, static_cast<std::size_t>(size));
  const std::string_view bytes(buffer.data(), static_cast<std::size_t>(size));
  if (from == client) second_send_sets_no_delay();
  const ssize_t sent = ::send(fd(other(from)), bytes.data(), bytes.size(), MSG_NOSIGNAL);
  // What was not sent, for whatever reason, is for flush() to try again.
  if (sent < size) hold(from, bytes.substr(static_cast<std::size_t>(std::max<ssize_t>(sent, 0))));
  return size;
}

/// The first send never waits for an acknowledgement, and of a short connection it is the only one.
void Relay::second_send_sets_no_delay() {
  if (sends_ > 1) return;
  if (++sends_ == 2) set_no_delay(fd(backend_side));
}

void Relay::hold(Side from, std::string_view bytes) {
  directions_[from].held = std::make_unique<Held>(std::vector<char>(bytes.begin(), bytes.end()), 0);
}

std::int64_t Relay::splice_in(Side from) {
  Direction& direction = directions_[from];
  // The pipe is empty here, so EAGAIN means that the socket is, too.
  const ssize_t size = ::splice(fd(from), nullptr, direction.pipe->write.get(), nullptr, direction.pipe->capacity,
                                SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
  if (size < 0 && errno == EINVAL) direction.can_splice = false;  // this kind of socket cannot
  // splice() does not get past urgent data (MSG_OOB): it says EAGAIN before the mark although bytes follow, and 0 when
  // a FIN does. recv() steps over it.
  const bool is_stuck = size == 0 || (size < 0 && (errno == EINVAL || (would_block(errno) && is_at_mark(fd(from)))));
  if (is_stuck) {
    leave_splicing(direction);
    return receive(from);
  }
  if (size < 0) return size;
  if (size > 0) {
    count(from, static_cast<std::size_t>(size));
    direction.in_pipe = static_cast<std::uint32_t>(size);
  }
  return size;
}

void Relay::adapt(Side from, std::int64_t size) {
  Direction& direction = directions_[from];
  if (!direction.pipe) {
    direction.streak = size >= large ? static_cast<std::uint8_t>(direction.streak + 1) : std::uint8_t{0};
    if (direction.streak >= large_reads_to_splice && direction.can_splice && !direction.held) {
      direction.pipe = worker_.pipes().take();
      direction.streak = 0;
    }
    return;
  }
  direction.streak = size < large ? static_cast<std::uint8_t>(direction.streak + 1) : std::uint8_t{0};
  if (direction.streak >= small_reads_to_copy && flush_pipe(from) == Flushed::all) leave_splicing(direction);
}

void Relay::leave_splicing(Direction& direction) {
  if (direction.in_pipe == 0) {
    worker_.pipes().give_back(std::move(*direction.pipe));
  } else {
    worker_.pipes().discard(std::move(*direction.pipe));
    direction.in_pipe = 0;
  }
  direction.pipe.reset();
  direction.streak = 0;
}

Relay::Flushed Relay::flush(Side from) {
  if (const Flushed flushed = flush_held(from); flushed != Flushed::all) return flushed;
  return flush_pipe(from);
}

Relay::Flushed Relay::flush_held(Side from) {
  Direction& direction = directions_[from];
  if (!direction.held) return Flushed::all;
  Held& held = *direction.held;
  while (held.sent < held.bytes.size()) {
    const ssize_t sent =
        ::send(fd(other(from)), held.bytes.data() + held.sent, held.bytes.size() - held.sent, MSG_NOSIGNAL);
    if (sent >= 0) {
      held.sent += static_cast<std::size_t>(sent);
      progress();
    } else if (would_block(errno)) {
      return Flushed::blocked;
    } else if (errno != EINTR) {
      return Flushed::broken;
    }
  }
  direction.held.reset();
  return Flushed::all;
}

Relay::Flushed Relay::flush_pipe(Side from) {
  Direction& direction = directions_[from];
  while (direction.in_pipe > 0) {
    const ssize_t sent = ::splice(direction.pipe->read.get(), nullptr, fd(other(from)), nullptr, direction.in_pipe,
                                  SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
    if (sent > 0) {
      direction.in_pipe -= static_cast<std::uint32_t>(sent);
      progress();
    } else if (sent < 0 && would_block(errno)) {
      return Flushed::blocked;
    } else if (sent == 0) {
      errno = EPIPE;
      return Flushed::broken;
    } else if (errno != EINTR) {
      return Flushed::broken;
    }
  }
  return Flushed::all;
}

void Relay::count(Side from, std::size_t bytes) {
  Direction& direction = directions_[from];
  direction.unreported += static_cast<std::uint32_t>(bytes);
  if (direction.unreported >= report_at) report(from);
}

void Relay::report(Side from) {
  Direction& direction = directions_[from];
  auto& counter = from == client ? service_->state().received : service_->state().sent;
  counter.fetch_add(std::exchange(direction.unreported, 0), std::memory_order_relaxed);
}

/// Puts off what would end the connection for want of progress. A young one waits for its keepalive first.
void Relay::progress() {
  if (!is_kept_alive_) return;
  if (directions_[client].is_finished || directions_[backend_side].is_finished) {
    worker_.wait(*this, Worker::Wait::half_closed);
  } else if (worker_.settings().idle_timeout != Clock::duration::zero()) {
    worker_.wait(*this, Worker::Wait::idle);
  }
}

// --- ending ---------------------------------------------------------------------------------------------------------

/// Everything from this side has been passed on, so its FIN is, too.
void Relay::finish(Side from) {
  const Side to = other(from);
  // It could not be written to, and now has said all that it had to say before its reset.
  if (legs_[from].is_broken) return reset_when_delivered(to);
  Direction& direction = directions_[from];
  if (direction.pipe) leave_splicing(direction);
  direction.is_finished = true;
  if (directions_[to].is_finished) return close();
  ::shutdown(fd(to), SHUT_WR);
  progress();
}

/// The other side takes no more: it has been reset, or has closed.
void Relay::writing_failed(Side from) {
  const Side to = other(from);
  if (directions_[to].is_finished) {
    // It had said all, so this side is owed all of that before it learns of the reset.
    return reset_when_delivered(from);
  }
  legs_[to].is_broken = true;
  Direction& direction = directions_[from];
  direction.held.reset();
  if (direction.pipe) leave_splicing(direction);
  direction.is_finished = true;
  pump(to);
}

/// Resets `side`, but not before its kernel has acknowledged what was sent to it: a reset discards what is on its way.
/// The other side is closed at once.
void Relay::reset_when_delivered(Side side) {
  if (phase_ == Phase::open) {
    phase_ = Phase::delivering;
    set_reset_on_close(fd(other(side)));
    legs_[other(side)].close();
  }
  const std::uint32_t undelivered = undelivered_bytes(fd(side));
  checks_ = undelivered == undelivered_ ? static_cast<std::uint16_t>(checks_ + 1) : std::uint16_t{0};
  undelivered_ = undelivered;
  if (undelivered == 0 || checks_ > max_checks) return reset();
  worker_.wait(*this, Worker::Wait::delivering);
}

void Relay::keep_alive() {
  // The client's socket has inherited it from the listener.
  set_keep_alive(fd(backend_side));
  is_kept_alive_ = true;
}

void Relay::end() {
  reset();
  release_if_closed();
}

void Relay::reset() {
  for (Leg& leg : legs_) {
    if (leg.socket) set_reset_on_close(leg.socket.get());
  }
  close();
}

void Relay::close() {
  if (phase_ == Phase::closed) return;
  phase_ = Phase::closed;
  if (Waiting::is_linked()) Waiting::unlink();
  for (const Side side : {client, backend_side}) {
    legs_[side].close();
    if (directions_[side].pipe) leave_splicing(directions_[side]);
    report(side);
  }
  if (backend_) backend_->live.fetch_sub(1, std::memory_order_relaxed);
}

void Relay::release_if_closed() {
  if (phase_ == Phase::closed) worker_.release(*this);
}

}  // namespace userspace
