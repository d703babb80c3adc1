// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "tests/bench/proxy/peers.h"
#include "tests/support/fd.h"

namespace bench {

enum class Behaviour {
  echo,    // returns what it is sent
  source,  // sends without end
};

/// The backend: one process with one thread. Ended with this object.
class Server {
 public:
  explicit Server(Behaviour behaviour);
  ~Server();
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  double cpu_seconds() const;

 private:
  pid_t pid_ = -1;
};

/// Whether a byte, sent there, brings one back.
bool answers(const Endpoint& there);

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
Tally receive(const Endpoint& there, std::size_t streams, const Schedule& schedule);

/// Keep `in_flight` connections on their way: connect, send a byte, receive a byte, close. Counts connections.
Tally connect_again_and_again(const Endpoint& there, std::size_t in_flight, const Schedule& schedule);

/// Send `size` bytes on each of `connections`, and again when as many have come back. Counts replies.
Tally ask_again_and_again(const Endpoint& there, std::size_t connections, std::size_t size, const Schedule& schedule);

/// Connections that do nothing after a byte has passed on each both ways.
struct Idle {
  std::vector<support::Fd> connections;
  std::uint64_t failures = 0;
};
Idle open_idle(const Endpoint& there, std::size_t count);

}  // namespace bench
