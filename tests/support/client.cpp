// SPDX-License-Identifier: BSD-2-Clause
#include "tests/support/client.h"

#include <arpa/inet.h>
#include <sys/socket.h>
#include <sys/time.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <ostream>
#include <sstream>
#include <stdexcept>

namespace support {

sockaddr_in socket_address(const std::string& address, std::uint16_t port) {
  sockaddr_in result{};
  result.sin_family = AF_INET;
  result.sin_port = htons(port);
  if (::inet_pton(AF_INET, address.c_str(), &result.sin_addr) != 1) throw std::invalid_argument(address);
  return result;
}

Fd tcp_socket(int more_flags) {
  Fd fd(checked(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | more_flags, 0), "socket"));
  const linger reset{1, 0};
  const timeval bound{10, 0};
  checked(::setsockopt(fd.get(), SOL_SOCKET, SO_LINGER, &reset, sizeof reset), "SO_LINGER");
  checked(::setsockopt(fd.get(), SOL_SOCKET, SO_SNDTIMEO, &bound, sizeof bound), "SO_SNDTIMEO");
  checked(::setsockopt(fd.get(), SOL_SOCKET, SO_RCVTIMEO, &bound, sizeof bound), "SO_RCVTIMEO");
  return fd;
}

int connect_errno(int fd, const std::string& address, std::uint16_t port) {
  const sockaddr_in to = socket_address(address, port);
  return ::connect(fd, reinterpret_cast<const sockaddr*>(&to), sizeof to) == 0 ? 0 : errno;
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
  const Fd fd = tcp_socket();
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
