// SPDX-License-Identifier: BSD-2-Clause
#include "tests/support/tcp.h"

#include <arpa/inet.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/time.h>

#include <cstring>
#include <stdexcept>

namespace support {
namespace {

struct Name {
  sockaddr_storage storage{};
  socklen_t length = 0;

  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage); }
};

Name name(const std::string& address, std::uint16_t port) {
  Name result;
  sockaddr_in v4{};
  sockaddr_in6 v6{};
  if (::inet_pton(AF_INET, address.c_str(), &v4.sin_addr) == 1) {
    v4.sin_family = AF_INET;
    v4.sin_port = htons(port);
    result.length = sizeof v4;
    std::memcpy(&result.storage, &v4, sizeof v4);
  } else if (::inet_pton(AF_INET6, address.c_str(), &v6.sin6_addr) == 1) {
    v6.sin6_family = AF_INET6;
    v6.sin6_port = htons(port);
    result.length = sizeof v6;
    std::memcpy(&result.storage, &v6, sizeof v6);
  } else {
    throw std::invalid_argument(address);
  }
  return result;
}

template <class Value>
void set(const Fd& fd, int level, int option, const Value& value) {
  checked(::setsockopt(fd.get(), level, option, &value, sizeof value), "setsockopt");
}

void bound_calls(const Fd& fd) {
  const timeval bound{20, 0};
  set(fd, SOL_SOCKET, SO_SNDTIMEO, bound);
  set(fd, SOL_SOCKET, SO_RCVTIMEO, bound);
  set(fd, IPPROTO_TCP, TCP_NODELAY, 1);
}

Fd socket_for(const Name& to) {
  Fd fd(checked(::socket(to.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0), "socket"));
  bound_calls(fd);
  return fd;
}

Name own_name(const Fd& fd) {
  Name result;
  result.length = sizeof result.storage;
  checked(::getsockname(fd.get(), reinterpret_cast<sockaddr*>(&result.storage), &result.length), "getsockname");
  return result;
}

}  // namespace

TcpListener::TcpListener(const std::string& address, std::uint16_t port, int backlog)
    : address_(address), fd_(socket_for(name(address, port))) {
  const Name local = name(address, port);
  set(fd_, SOL_SOCKET, SO_REUSEADDR, 1);
  checked(::bind(fd_.get(), local.get(), local.length), "bind " + address);
  checked(::listen(fd_.get(), backlog), "listen");
  port_ = own_port(fd_);
}

Fd TcpListener::accept() const {
  Fd connection(checked(::accept4(fd_.get(), nullptr, nullptr, SOCK_CLOEXEC), "accept"));
  bound_calls(connection);
  return connection;
}

DeadPort::DeadPort(const std::string& address, std::uint16_t port) : address_(address) {
  const Name local = name(address, port);
  fd_ = Fd(checked(::socket(local.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0), "socket"));
  checked(::bind(fd_.get(), local.get(), local.length), "bind " + address);
  port_ = own_port(fd_);
}

std::unique_ptr<NamedServer> DeadPort::listen(std::string name) {
  fd_.reset();
  return std::make_unique<NamedServer>(std::move(name), address_, NamedServer::Speaks::name, port_);
}

Fd dial(const std::string& address, std::uint16_t port, const std::string& from, std::uint16_t from_port) {
  const Name to = name(address, port);
  Fd fd = socket_for(to);
  if (!from.empty()) {
    const Name local = name(from, from_port);
    // The port is chosen by connect(), for this destination alone.
    if (from_port == 0) set(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1);
    checked(::bind(fd.get(), local.get(), local.length), "bind " + from);
  }
  checked(::connect(fd.get(), to.get(), to.length), "connect " + address);
  return fd;
}

int dial_errno(const std::string& address, std::uint16_t port) {
  try {
    reset(dial(address, port));
    return 0;
  } catch (const std::system_error& error) {
    return error.code().value();
  }
}

std::string ask_from(const std::string& from, const std::string& address, std::uint16_t port) {
  return receive_all(dial(address, port, from));
}

void send_all(const Fd& fd, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t sent = checked(::send(fd.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL), "send");
    bytes.remove_prefix(static_cast<std::size_t>(sent));
  }
}

std::string receive(const Fd& fd, std::size_t size) {
  std::string bytes(size, '\0');
  std::size_t received = 0;
  while (received < size) {
    const ssize_t more = checked(::recv(fd.get(), bytes.data() + received, size - received, 0), "recv");
    if (more == 0) throw std::runtime_error("the connection ended early");
    received += static_cast<std::size_t>(more);
  }
  return bytes;
}

std::string receive_all(const Fd& fd) {
  std::string bytes;
  char buffer[65536];
  for (;;) {
    const ssize_t more = checked(::recv(fd.get(), buffer, sizeof buffer, 0), "recv");
    if (more == 0) return bytes;
    bytes.append(buffer, static_cast<std::size_t>(more));
  }
}

int end_of(const Fd& fd) {
  try {
    receive_all(fd);
    return 0;
  } catch (const std::system_error& error) {
    return error.code().value();
  }
}

void send_end(const Fd& fd) { checked(::shutdown(fd.get(), SHUT_WR), "shutdown"); }

void reset(Fd fd) { set(fd, SOL_SOCKET, SO_LINGER, linger{1, 0}); }

bool is_delivered(const Fd& fd) {
  int bytes = 0;
  checked(::ioctl(fd.get(), SIOCOUTQ, &bytes), "SIOCOUTQ");
  return bytes == 0;
}

bool is_readable(int fd, int milliseconds) {
  pollfd one{fd, POLLIN, 0};
  return checked(::poll(&one, 1, milliseconds), "poll") == 1;
}

std::string own_address(const Fd& fd) {
  const Name own = own_name(fd);
  char text[INET6_ADDRSTRLEN];
  const bool is_v4 = own.storage.ss_family == AF_INET;
  const char* place = reinterpret_cast<const char*>(&own.storage);
  return ::inet_ntop(own.storage.ss_family,
                     place + (is_v4 ? offsetof(sockaddr_in, sin_addr) : offsetof(sockaddr_in6, sin6_addr)), text,
                     sizeof text);
}

std::uint16_t own_port(const Fd& fd) {
  // At the same place for both families.
  const Name own = own_name(fd);
  sockaddr_in v4{};
  std::memcpy(&v4, &own.storage, sizeof v4);
  return ntohs(v4.sin_port);
}

void raise_descriptor_limit() {
  rlimit limit{};
  checked(::getrlimit(RLIMIT_NOFILE, &limit), "RLIMIT_NOFILE");
  limit.rlim_cur = limit.rlim_max;
  checked(::setrlimit(RLIMIT_NOFILE, &limit), "RLIMIT_NOFILE");
}

}  // namespace support
