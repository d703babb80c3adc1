// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <netinet/in.h>

#include <atomic>
#include <cstdint>
#include <iosfwd>
#include <map>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "tests/support/fd.h"

namespace support {

sockaddr_in socket_address(const std::string& address, std::uint16_t port);

/// A numeric address of either family, with a port.
class Endpoint {
 public:
  Endpoint(const std::string& address, std::uint16_t port);
  const sockaddr* address() const { return reinterpret_cast<const sockaddr*>(&storage_); }
  socklen_t length() const { return storage_.ss_family == AF_INET ? sizeof(sockaddr_in) : sizeof(sockaddr_in6); }
  int family() const { return storage_.ss_family; }

 private:
  sockaddr_storage storage_{};
};

/// "10.96.0.1:80", "[fd00::1]:80".
std::string text_of(const sockaddr_storage& address);

/// What getpeername() says, as text_of() does, or the name of its errno.
std::string peer_of(int fd);

/// A UDP socket whose calls end after some seconds at the latest.
Fd udp_socket(int family = AF_INET);

/// Sends a datagram there, and returns "answer from address:port", or the name of the errno.
std::string exchange(int fd, const std::string& address, std::uint16_t port);

/// Receives one datagram: as exchange().
std::string receive(int fd);

/// A TCP socket whose calls end after some seconds at the latest, and which is reset when it is closed: tests make so
/// many connections that TIME_WAIT would use up the local ports.
Fd tcp_socket(int more_flags = 0, int family = AF_INET);

/// The errno of a connect(), or 0.
int connect_errno(int fd, const std::string& address, std::uint16_t port);

/// What a client saw: the errno of its connect (or read), else what the server said until it closed.
struct Answer {
  int error = 0;
  std::string text;
  friend bool operator==(const Answer&, const Answer&) = default;
};
std::ostream& operator<<(std::ostream& out, const Answer& answer);

inline Answer refused_with(int error) { return {error, {}}; }

/// What a call fails with that a program of the fast path refuses with this errno: before Linux 5.18 it cannot choose
/// one.
int refusal(int error);
inline Answer refused_by_program(int error) { return refused_with(refusal(error)); }

inline Answer answered_by(std::string name) { return {0, std::move(name)}; }

/// Connect, read until the server closes.
Answer ask(const std::string& address, std::uint16_t port);

/// Read until the server closes.
Answer read_answer(int fd);

/// Asks one address over and over in a thread, and counts what it is told. Has the first answer when the constructor
/// returns, and allocates nothing afterwards: fork() does not release the locks of GCC 12's AddressSanitizer, so that a
/// child of a process with a thread in its allocator hangs.
class Asker {
 public:
  Asker(std::string address, std::uint16_t port);
  ~Asker();
  Asker(const Asker&) = delete;
  Asker& operator=(const Asker&) = delete;

  /// Block until so many more answers have come, right or wrong.
  void wait_for(std::uint64_t more) const;

  /// End, and return the answers with how often each came.
  std::map<std::string, std::uint64_t> stop();

 private:
  void count(const std::string& answer);
  void wait_until(std::uint64_t answers) const;

  std::atomic<bool> stopping_ = false;
  std::atomic<std::uint64_t> answers_ = 0;
  std::vector<std::pair<std::string, std::uint64_t>> seen_;  // the thread's until it is joined
  std::thread thread_;
};

}  // namespace support
