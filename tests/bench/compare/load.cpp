// SPDX-License-Identifier: BSD-2-Clause
#include "tests/bench/compare/load.h"

#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <limits>
#include <span>
#include <stdexcept>
#include <system_error>
#include <utility>

namespace bench {
namespace {

using support::checked;
using support::Fd;
using Clock = std::chrono::steady_clock;

constexpr std::chrono::seconds stalled(1);
constexpr int tick = 10;  // ms that a loop sleeps at most

// Both ends use buffers as large as makes their system calls cheap.
std::array<char, 256 << 10> buffer;

/// A set of descriptors, each with an index of the caller's.
class Poller {
 public:
  void add(const Fd& fd, std::size_t index, std::uint32_t events) { control(EPOLL_CTL_ADD, fd, index, events); }
  void change(const Fd& fd, std::size_t index, std::uint32_t events) { control(EPOLL_CTL_MOD, fd, index, events); }

  std::span<const epoll_event> wait(int timeout_ms) {
    const int count = ::epoll_wait(epoll_.get(), events_.data(), static_cast<int>(events_.size()), timeout_ms);
    return {events_.data(), static_cast<std::size_t>(std::max(count, 0))};
  }

 private:
  void control(int operation, const Fd& fd, std::size_t index, std::uint32_t events) {
    epoll_event event{.events = events, .data = {.u64 = index}};
    checked(::epoll_ctl(epoll_.get(), operation, fd.get(), &event), "epoll_ctl");
  }

  Fd epoll_{checked(::epoll_create1(EPOLL_CLOEXEC), "epoll")};
  std::array<epoll_event, 256> events_{};
};

/// False when the connection is over.
bool serve(const Fd& connection, Behaviour behaviour) {
  if (behaviour == Behaviour::source) {
    return ::send(connection.get(), buffer.data(), buffer.size(), MSG_NOSIGNAL) > 0 || errno == EAGAIN;
  }
  const ssize_t size = ::recv(connection.get(), buffer.data(), buffer.size(), 0);
  // What is asked here is small and answered before more is asked: an answer that does not fit is the end of it.
  return size > 0 && ::send(connection.get(), buffer.data(), static_cast<std::size_t>(size), MSG_NOSIGNAL) == size;
}

[[noreturn]] void return_datagrams(const Fd& fd) {
  for (;;) {
    sockaddr_in from{};
    socklen_t length = sizeof from;
    const ssize_t size =
        ::recvfrom(fd.get(), buffer.data(), buffer.size(), 0, reinterpret_cast<sockaddr*>(&from), &length);
    if (size >= 0)
      ::sendto(fd.get(), buffer.data(), static_cast<std::size_t>(size), 0, reinterpret_cast<const sockaddr*>(&from),
               length);
  }
}

[[noreturn]] void serve_for_ever(const Fd& listener, Behaviour behaviour) {
  constexpr std::size_t listener_index = std::numeric_limits<std::size_t>::max();
  Poller poller;
  std::vector<Fd> connections;  // by descriptor, which is their index too
  poller.add(listener, listener_index, EPOLLIN);
  for (;;) {
    for (const epoll_event& event : poller.wait(-1)) {
      if (event.data.u64 != listener_index) {
        Fd& connection = connections[event.data.u64];
        if (!serve(connection, behaviour)) connection.reset();
        continue;
      }
      for (;;) {
        Fd connection(::accept4(listener.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
        if (connection.get() < 0) break;
        const auto index = static_cast<std::size_t>(connection.get());
        poller.add(connection, index, behaviour == Behaviour::source ? EPOLLOUT : EPOLLIN);
        if (index >= connections.size()) connections.resize(index + 1);
        connections[index] = std::move(connection);
      }
    }
  }
}

/// Knows when a client begins and ends to measure.
class Progress {
 public:
  explicit Progress(const Schedule& schedule)
      : schedule_(schedule), begin_(Clock::now() + std::chrono::duration_cast<Clock::duration>(schedule.warm_up)) {}

  /// To be asked before each wait; `done` counts since the start. False when it is time to end.
  bool goes_on(std::uint64_t done) {
    now_ = Clock::now();
    if (!measuring_ && now_ >= begin_) {
      measuring_ = true;
      schedule_.at_begin();
      begin_ = Clock::now();
      done_before_ = done;
    }
    if (!measuring_ || now_ - begin_ < schedule_.length) return true;
    tally_.seconds = std::chrono::duration<double>(Clock::now() - begin_).count();
    schedule_.at_end();
    tally_.done = done - done_before_;
    return false;
  }

  Clock::time_point now() const { return now_; }
  void count_failure() { ++tally_.failures; }
  const Tally& tally() const { return tally_; }

 private:
  const Schedule& schedule_;
  Clock::time_point begin_;
  Clock::time_point now_ = Clock::now();
  bool measuring_ = false;
  std::uint64_t done_before_ = 0;
  Tally tally_;
};

Fd new_socket(int flags = 0) { return Fd(checked(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | flags, 0), "socket")); }

bool connect_to(const Fd& fd, const sockaddr_in& address) {
  return ::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0;
}

bool send_all(const Fd& fd, std::size_t size) {
  return ::send(fd.get(), buffer.data(), size, MSG_NOSIGNAL) == static_cast<ssize_t>(size);
}

/// Its calls end after a second at the latest, and it is reset when it is closed: there are more connections than
/// ports.
Fd impatient_socket() {
  Fd fd = new_socket();
  const timeval limit{.tv_sec = 1, .tv_usec = 0};
  checked(::setsockopt(fd.get(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit), "SO_RCVTIMEO");
  checked(::setsockopt(fd.get(), SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit), "SO_SNDTIMEO");
  const linger reset{.l_onoff = 1, .l_linger = 0};
  checked(::setsockopt(fd.get(), SOL_SOCKET, SO_LINGER, &reset, sizeof reset), "SO_LINGER");
  return fd;
}

/// The next connection, within a second, or none.
Fd accept_from(const Fd& listener) {
  pollfd acceptable{listener.get(), POLLIN, 0};
  Fd fd(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
  if (fd.get() < 0 && ::poll(&acceptable, 1, 1000) > 0)
    fd = Fd(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
  return fd;
}

/// One of the connections that follow each other.
struct Attempt {
  Fd fd;
  bool sent = false;
  Clock::time_point since;
};

}  // namespace

sockaddr_in endpoint(std::uint32_t address, std::uint16_t port) {
  sockaddr_in result{};
  result.sin_family = AF_INET;
  result.sin_port = htons(port);
  result.sin_addr.s_addr = htonl(address);
  return result;
}

support::Fd listen_at(std::uint16_t port) {
  Fd fd(checked(::socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), "socket"));
  const sockaddr_in address = endpoint(INADDR_ANY, port);
  checked(::bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), "bind");
  checked(::listen(fd.get(), 4096), "listen");
  return fd;
}

Server::Server(Behaviour behaviour, const sockaddr_in& where) {
  Fd fd;
  if (behaviour == Behaviour::datagrams) {
    fd = Fd(checked(::socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), "socket"));
    checked(::bind(fd.get(), reinterpret_cast<const sockaddr*>(&where), sizeof where), "bind");
  } else {
    fd = listen_at(ntohs(where.sin_port));
  }
  pid_ = checked(::fork(), "fork");
  if (pid_ != 0) return;
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  try {
    if (behaviour == Behaviour::datagrams) return_datagrams(fd);
    serve_for_ever(fd, behaviour);
  } catch (const std::exception&) {
    // Its clients see it go.
    ::_exit(1);
  }
}

Server::~Server() {
  ::kill(pid_, SIGKILL);
  ::waitpid(pid_, nullptr, 0);
}

double Server::cpu_seconds() const {
  clockid_t clock{};
  timespec time{};
  if (::clock_getcpuclockid(pid_, &clock) != 0 || ::clock_gettime(clock, &time) != 0)
    throw std::runtime_error("the backend has ended");
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) / 1e9;
}

bool answers(const sockaddr_in& there) {
  const Fd fd = impatient_socket();
  char byte = 0;
  return connect_to(fd, there) && send_all(fd, 1) && ::recv(fd.get(), &byte, 1, 0) == 1;
}

Latencies connect_in_turn(const Fd& listener, std::size_t count, const std::function<sockaddr_in()>& there) {
  constexpr std::uint64_t enough = 10;  // of failures: each takes a second
  const auto microseconds = [](Clock::time_point from, Clock::time_point to) {
    return std::chrono::duration<double, std::micro>(to - from).count();
  };
  Latencies latencies;
  for (std::size_t i = 0; i < count && latencies.failures < enough; ++i) {
    const sockaddr_in address = there();
    const Fd client = impatient_socket();
    const auto begin = Clock::now();
    const bool connected = connect_to(client, address);
    const auto connected_at = Clock::now();
    const Fd server = connected ? accept_from(listener) : Fd();
    char byte = 'x';
    if (server.get() < 0 || !send_all(client, 1) || ::recv(server.get(), &byte, 1, 0) != 1 || !send_all(server, 1) ||
        ::recv(client.get(), &byte, 1, 0) != 1) {
      ++latencies.failures;
      continue;
    }
    latencies.connect.push_back(microseconds(begin, connected_at));
    latencies.answered.push_back(microseconds(begin, Clock::now()));
  }
  return latencies;
}

std::uint32_t accepted_at(const Fd& listener, const sockaddr_in& there) {
  const Fd client = impatient_socket();
  if (!connect_to(client, there)) throw std::system_error(errno, std::generic_category(), "connect");
  const Fd server = accept_from(listener);
  sockaddr_in address{};
  socklen_t length = sizeof address;
  checked(::getsockname(server.get(), reinterpret_cast<sockaddr*>(&address), &length), "accept");
  return ntohl(address.sin_addr.s_addr);
}

Datagrams exchange_datagrams(const sockaddr_in& there, std::size_t batches, std::size_t batch) {
  const Fd client(checked(::socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), "socket"));
  const auto each = [batch](Clock::time_point from) {
    return std::chrono::duration<double, std::nano>(Clock::now() - from).count() / static_cast<double>(batch);
  };
  Datagrams datagrams;
  for (std::size_t i = 0; i < batches; ++i) {
    const auto begin = Clock::now();
    for (std::size_t k = 0; k < batch; ++k)
      ::sendto(client.get(), buffer.data(), 1, 0, reinterpret_cast<const sockaddr*>(&there), sizeof there);
    datagrams.send.push_back(each(begin));

    // Only a call that finds a datagram is timed.
    for (std::size_t k = 0; k < batch;) {
      char byte = 0;
      sockaddr_in from{};
      socklen_t length = sizeof from;
      const auto before = Clock::now();
      const ssize_t size =
          ::recvfrom(client.get(), &byte, 1, MSG_DONTWAIT, reinterpret_cast<sockaddr*>(&from), &length);
      if (size == 1) {
        datagrams.receive.push_back(std::chrono::duration<double, std::nano>(Clock::now() - before).count());
        ++k;
        continue;
      }
      pollfd readable{client.get(), POLLIN, 0};
      if (::poll(&readable, 1, std::chrono::milliseconds(stalled).count()) > 0) continue;
      datagrams.failures += batch - k;
      return datagrams;
    }
  }
  return datagrams;
}

Tally receive(const sockaddr_in& there, std::size_t streams, const Schedule& schedule) {
  Progress progress(schedule);
  Poller poller;
  std::vector<Fd> connections;
  for (std::size_t i = 0; i < streams; ++i) {
    connections.push_back(new_socket());
    if (connect_to(connections[i], there))
      poller.add(connections[i], i, EPOLLIN);
    else
      progress.count_failure();
  }
  std::uint64_t bytes = 0;
  std::vector<std::uint64_t> of_each(streams);
  while (progress.goes_on(bytes)) {
    for (const epoll_event& event : poller.wait(tick)) {
      // MSG_TRUNC: TCP drops the data without copying it.
      const ssize_t size = ::recv(connections[event.data.u64].get(), nullptr, 1 << 20, MSG_TRUNC | MSG_DONTWAIT);
      if (size > 0) {
        bytes += static_cast<std::uint64_t>(size);
        of_each[event.data.u64] += static_cast<std::uint64_t>(size);
      } else if (size == 0 || errno != EAGAIN) {
        progress.count_failure();
        connections[event.data.u64].reset();
      }
    }
  }
  Tally tally = progress.tally();
  tally.failures += static_cast<std::uint64_t>(std::ranges::count(of_each, 0U));
  return tally;
}

Tally connect_again_and_again(const sockaddr_in& there, std::size_t in_flight, const Schedule& schedule) {
  Progress progress(schedule);
  Poller poller;
  std::vector<Attempt> attempts(in_flight);
  std::uint64_t done = 0;

  const auto fail = [&](Attempt& attempt) {
    progress.count_failure();
    attempt.fd.reset();
  };
  const auto begin = [&](std::size_t index) {
    Attempt& attempt = attempts[index];
    attempt = {.fd = new_socket(SOCK_NONBLOCK), .sent = false, .since = progress.now()};
    if (!connect_to(attempt.fd, there) && errno != EINPROGRESS) return fail(attempt);
    // On loopback the handshake is most often over when connect() returns.
    attempt.sent = send_all(attempt.fd, 1);
    if (!attempt.sent && errno != EAGAIN) return fail(attempt);
    poller.add(attempt.fd, index, attempt.sent ? EPOLLIN : EPOLLOUT);
  };

  while (progress.goes_on(done)) {
    for (std::size_t i = 0; i < in_flight; ++i)
      if (attempts[i].fd.get() < 0) begin(i);
    for (const epoll_event& event : poller.wait(tick)) {
      Attempt& attempt = attempts[event.data.u64];
      if (!attempt.sent) {
        attempt.sent = send_all(attempt.fd, 1);
        if (attempt.sent)
          poller.change(attempt.fd, event.data.u64, EPOLLIN);
        else
          fail(attempt);
        continue;
      }
      char byte = 0;
      if (::recv(attempt.fd.get(), &byte, 1, 0) != 1) {
        fail(attempt);
        continue;
      }
      ++done;
      attempt.fd.reset();
      begin(event.data.u64);
    }
  }
  Tally tally = progress.tally();
  tally.failures += static_cast<std::uint64_t>(std::ranges::count_if(
      attempts, [&](const Attempt& attempt) { return progress.now() - attempt.since > stalled; }));
  return tally;
}

Tally ask_again_and_again(const sockaddr_in& there, std::size_t connections, std::size_t size,
                          const Schedule& schedule) {
  struct Conversation {
    Fd fd;
    std::size_t missing = 0;  // bytes of the reply
    Clock::time_point since;
  };
  Progress progress(schedule);
  Poller poller;
  std::vector<Conversation> conversations(connections);
  std::uint64_t done = 0;

  const auto ask = [&](Conversation& conversation) {
    conversation.missing = size;
    conversation.since = progress.now();
    if (send_all(conversation.fd, size)) return;
    progress.count_failure();
    conversation.fd.reset();
  };
  for (std::size_t i = 0; i < connections; ++i) {
    conversations[i].fd = new_socket();
    if (!connect_to(conversations[i].fd, there)) {
      progress.count_failure();
      conversations[i].fd.reset();
      continue;
    }
    poller.add(conversations[i].fd, i, EPOLLIN);
    ask(conversations[i]);
  }
  while (progress.goes_on(done)) {
    for (const epoll_event& event : poller.wait(tick)) {
      Conversation& conversation = conversations[event.data.u64];
      const ssize_t got = ::recv(conversation.fd.get(), buffer.data(), conversation.missing, MSG_DONTWAIT);
      if (got <= 0) {
        if (got < 0 && errno == EAGAIN) continue;
        progress.count_failure();
        conversation.fd.reset();
        continue;
      }
      conversation.missing -= static_cast<std::size_t>(got);
      if (conversation.missing > 0) continue;
      ++done;
      ask(conversation);
    }
  }
  Tally tally = progress.tally();
  tally.failures += static_cast<std::uint64_t>(std::ranges::count_if(conversations, [&](const Conversation& one) {
    return one.fd.get() >= 0 && progress.now() - one.since > stalled;
  }));
  return tally;
}

Idle open_idle(const sockaddr_in& there, std::size_t count) {
  constexpr std::size_t batch = 64;
  const timeval limit{.tv_sec = 5, .tv_usec = 0};
  Idle idle;
  // One that fails is the last: a proxy that is full would take the limit for each of the others.
  while (idle.connections.size() < count && idle.failures == 0) {
    std::vector<Fd> fresh;
    for (std::size_t i = std::min(batch, count - idle.connections.size()); i > 0 && idle.failures == 0; --i) {
      Fd fd = new_socket();
      checked(::setsockopt(fd.get(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit), "SO_RCVTIMEO");
      if (connect_to(fd, there) && send_all(fd, 1))
        fresh.push_back(std::move(fd));
      else
        ++idle.failures;
    }
    for (Fd& fd : fresh) {
      char byte = 0;
      if (::recv(fd.get(), &byte, 1, idle.failures == 0 ? 0 : MSG_DONTWAIT) == 1)
        idle.connections.push_back(std::move(fd));
      else
        ++idle.failures;
    }
  }
  return idle;
}

}  // namespace bench
