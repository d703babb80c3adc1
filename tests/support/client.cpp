// SPDX-License-Identifier: BSD-2-Clause
#include "tests/support/client.h"

#include <arpa/inet.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/utsname.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <utility>

namespace support {

sockaddr_in socket_address(const std::string& address, std::uint16_t port) {
  sockaddr_in result{};
  result.sin_family = AF_INET;
  result.sin_port = htons(port);
  if (::inet_pton(AF_INET, address.c_str(), &result.sin_addr) != 1) throw std::invalid_argument(address);
  return result;
}

Endpoint::Endpoint(const std::string& address, std::uint16_t port) {
  sockaddr_in v4{};
  sockaddr_in6 v6{};
  if (::inet_pton(AF_INET, address.c_str(), &v4.sin_addr) == 1) {
    v4.sin_family = AF_INET;
    v4.sin_port = htons(port);
    std::memcpy(&storage_, &v4, sizeof v4);
  } else if (::inet_pton(AF_INET6, address.c_str(), &v6.sin6_addr) == 1) {
    v6.sin6_family = AF_INET6;
    v6.sin6_port = htons(port);
    std::memcpy(&storage_, &v6, sizeof v6);
  } else {
    throw std::invalid_argument(address);
  }
}

std::string text_of(const sockaddr_storage& address) {
  char text[INET6_ADDRSTRLEN] = "";
  if (address.ss_family == AF_INET6) {
    sockaddr_in6 v6{};
    std::memcpy(&v6, &address, sizeof v6);
    ::inet_ntop(AF_INET6, &v6.sin6_addr, text, sizeof text);
    return "[" + std::string(text) + "]:" + std::to_string(ntohs(v6.sin6_port));
  }
  sockaddr_in v4{};
  std::memcpy(&v4, &address, sizeof v4);
  ::inet_ntop(AF_INET, &v4.sin_addr, text, sizeof text);
  return std::string(text) + ":" + std::to_string(ntohs(v4.sin_port));
}

std::string peer_of(int fd) {
  sockaddr_storage peer{};
  socklen_t length = sizeof peer;
  if (::getpeername(fd, reinterpret_cast<sockaddr*>(&peer), &length) != 0) return ::strerrorname_np(errno);
  return text_of(peer);
}

int refusal(int error) {
  utsname kernel{};
  checked(::uname(&kernel), "uname");
  int major = 0;
  int minor = 0;
  if (std::sscanf(kernel.release, "%d.%d", &major, &minor) != 2) throw std::runtime_error(kernel.release);
  return std::pair(major, minor) < std::pair(5, 18) ? EPERM : error;
}

Fd udp_socket(int family) {
  Fd fd(checked(::socket(family, SOCK_DGRAM | SOCK_CLOEXEC, 0), "socket"));
  const timeval bound{10, 0};
  checked(::setsockopt(fd.get(), SOL_SOCKET, SO_RCVTIMEO, &bound, sizeof bound), "SO_RCVTIMEO");
  return fd;
}

std::string receive(int fd) {
  char answer[256];
  sockaddr_storage from{};
  socklen_t length = sizeof from;
  const ssize_t size = ::recvfrom(fd, answer, sizeof answer, 0, reinterpret_cast<sockaddr*>(&from), &length);
  if (size < 0) return ::strerrorname_np(errno);
  return std::string(answer, static_cast<std::size_t>(size)) + " from " + text_of(from);
}

std::string exchange(int fd, const std::string& address, std::uint16_t port) {
  const Endpoint to(address, port);
  if (::sendto(fd, "x", 1, 0, to.address(), to.length()) != 1) return ::strerrorname_np(errno);
  return receive(fd);
}

Fd tcp_socket(int more_flags, int family) {
  Fd fd(checked(::socket(family, SOCK_STREAM | SOCK_CLOEXEC | more_flags, 0), "socket"));
  const linger reset{1, 0};
  const timeval bound{10, 0};
  checked(::setsockopt(fd.get(), SOL_SOCKET, SO_LINGER, &reset, sizeof reset), "SO_LINGER");
  checked(::setsockopt(fd.get(), SOL_SOCKET, SO_SNDTIMEO, &bound, sizeof bound), "SO_SNDTIMEO");
  checked(::setsockopt(fd.get(), SOL_SOCKET, SO_RCVTIMEO, &bound, sizeof bound), "SO_RCVTIMEO");
  return fd;
}

int connect_errno(int fd, const std::string& address, std::uint16_t port) {
  const Endpoint to(address, port);
  return ::connect(fd, to.address(), to.length()) == 0 ? 0 : errno;
}

std::ostream& operator<<(std::ostream& out, const Answer& answer) {
  if (answer.error != 0) return out << ::strerrorname_np(answer.error);
  return out << '"' << answer.text << '"';
}

Answer read_answer(int fd) {
  Answer answer;
  char buffer[256];
  for (;;) {
    const ssize_t size = ::recv(fd, buffer, sizeof buffer, 0);
    if (size < 0) return {errno, {}};
    if (size == 0) return answer;
    answer.text.append(buffer, static_cast<std::size_t>(size));
  }
}

Answer ask(const std::string& address, std::uint16_t port) {
  const Fd fd = tcp_socket(0, Endpoint(address, port).family());
  if (const int error = connect_errno(fd.get(), address, port); error != 0) return {error, {}};
  return read_answer(fd.get());
}

Asker::Asker(std::string address, std::uint16_t port) {
  seen_.reserve(16);  // more different answers than any test has
  thread_ = std::thread([this, address = std::move(address), port] {
    while (!stopping_) {
      const Answer answer = ask(address, port);
      count(answer.error != 0 ? ::strerrorname_np(answer.error) : answer.text);
      ++answers_;
      answers_.notify_all();
    }
  });
  wait_until(1);
}

Asker::~Asker() { stop(); }

void Asker::count(const std::string& answer) {
  const auto known = std::ranges::find(seen_, answer, &std::pair<std::string, std::uint64_t>::first);
  if (known != seen_.end())
    ++known->second;
  else
    seen_.emplace_back(answer, 1);
}

void Asker::wait_until(std::uint64_t answers) const {
  for (std::uint64_t now = answers_; now < answers; now = answers_) answers_.wait(now);
}

void Asker::wait_for(std::uint64_t more) const { wait_until(answers_ + more); }

std::map<std::string, std::uint64_t> Asker::stop() {
  stopping_ = true;
  if (thread_.joinable()) thread_.join();
  return {seen_.begin(), seen_.end()};
}

}  // namespace support
