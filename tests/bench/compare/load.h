// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <netinet/in.h>
#include <sys/types.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "tests/support/fd.h"

namespace bench {

/// Addresses and ports in host byte order.
sockaddr_in endpoint(std::uint32_t address, std::uint16_t port);

enum class Behaviour {
  echo,       // returns what it is sent
  source,     // sends without end
  datagrams,  // returns each to its sender
};

/// Accepts at any address of the network namespace that this thread is in.
support::Fd listen_at(std::uint16_t port);

/// A backend, or all of them: one process with one thread, in the network namespace that this thread is in, at all
/// addresses for connections and at `where` for datagrams. Ended with this object.
class Server {
 public:
  Server(Behaviour behaviour, const sockaddr_in& where);
  ~Server();
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  double cpu_seconds() const;

 private:
  pid_t pid_ = -1;
};

/// Whether a byte, sent there, brings one back.
bool answers(const sockaddr_in& there);

/// One connection after the other, each accepted at `listener` by the same thread, so that no scheduler has a part in
/// it: a byte there, a byte back, and a reset.
struct Latencies {
  std::vector<double> connect;   // us that connect() took
  std::vector<double> answered;  // us from there to the byte that came back
  std::uint64_t failures = 0;
};
Latencies connect_in_turn(const support::Fd& listener, std::size_t count, const std::function<sockaddr_in()>& there);

/// Connects, and tells which address the connection was accepted at.
std::uint32_t accepted_at(const support::Fd& listener, const sockaddr_in& there);

/// Datagrams from one unconnected socket, `batch` on their way at a time: ns that sendto() and recvfrom() took for
/// each.
struct Datagrams {
  std::vector<double> send;
  std::vector<double> receive;
  std::uint64_t failures = 0;  // answers that did not come
};
Datagrams exchange_datagrams(const sockaddr_in& there, std::size_t batches, std::size_t batch);

/// When a client measures, and what it reads as it begins and as it ends.
struct Schedule {
  std::chrono::duration<double> warm_up;
  std::chrono::duration<double> length;
  std::function<void()> at_begin;
  std::function<void()> at_end;
};

/// What a client has done between the begin and the end.
struct Tally {
  std::uint64_t done = 0;      // bytes, connections or replies
  std::uint64_t failures = 0;  // errors, early ends, and what waited for more than a second when time was up
  double seconds = 0;
};

/// Receive on `streams` connections and throw away. Counts bytes.
Tally receive(const sockaddr_in& there, std::size_t streams, const Schedule& schedule);

/// Keep `in_flight` connections on their way: connect, send a byte, receive a byte, close. Counts connections.
Tally connect_again_and_again(const sockaddr_in& there, std::size_t in_flight, const Schedule& schedule);

/// Send `size` bytes on each of `connections`, and again when as many have come back. Counts replies.
Tally ask_again_and_again(const sockaddr_in& there, std::size_t connections, std::size_t size,
                          const Schedule& schedule);

/// Connections that do nothing after a byte has passed on each both ways.
struct Idle {
  std::vector<support::Fd> connections;
  std::uint64_t failures = 0;
};
Idle open_idle(const sockaddr_in& there, std::size_t count);

}  // namespace bench
