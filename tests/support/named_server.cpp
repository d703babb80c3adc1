// SPDX-License-Identifier: BSD-2-Clause
#include "tests/support/named_server.h"

#include <arpa/inet.h>
#include <sys/socket.h>

#include <cstring>
#include <latch>

#include "tests/support/client.h"

namespace support {
namespace {

constexpr int backlog = 4096;

void send_all(int connection, const std::string& text) {
  // A client that has gone is none of the server's concern.
  (void)!::send(connection, text.data(), text.size(), MSG_NOSIGNAL);
}

void read_request(int connection) {
  std::string request;
  char buffer[1024];
  while (request.find("\r\n\r\n") == std::string::npos) {
    const ssize_t size = ::recv(connection, buffer, sizeof buffer, 0);
    if (size <= 0) return;
    request.append(buffer, static_cast<std::size_t>(size));
  }
}

std::string local_address(int connection) {
  sockaddr_in local{};
  socklen_t length = sizeof local;
  checked(::getsockname(connection, reinterpret_cast<sockaddr*>(&local), &length), "getsockname");
  char text[INET_ADDRSTRLEN];
  return ::inet_ntop(AF_INET, &local.sin_addr, text, sizeof text);
}

std::uint16_t bound_port(int fd) {
  sockaddr_storage local{};
  socklen_t length = sizeof local;
  checked(::getsockname(fd, reinterpret_cast<sockaddr*>(&local), &length), "getsockname");
  sockaddr_in v4{};  // the port stands at the same place in both families
  std::memcpy(&v4, &local, sizeof v4);
  return ntohs(v4.sin_port);
}

}  // namespace

NamedServer::NamedServer(std::string name, const std::string& address, Speaks speaks, std::uint16_t port)
    : name_(std::move(name)),
      address_(address),
      speaks_(speaks),
      listener_(checked(::socket(Endpoint(address, 0).family(), SOCK_STREAM | SOCK_CLOEXEC, 0), "socket")) {
  // For one that comes back to its port, where connections of the one before it may be left.
  const int on = 1;
  checked(::setsockopt(listener_.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on), "SO_REUSEADDR");
  const Endpoint local(address, port);
  checked(::bind(listener_.get(), local.address(), local.length()), "bind " + address);
  checked(::listen(listener_.get(), backlog), "listen");
  port_ = bound_port(listener_.get());
  std::latch started(1);
  thread_ = std::thread([&started, this] {
    started.count_down();
    serve();
  });
  started.wait();
}

NamedServer::~NamedServer() {
  ::shutdown(listener_.get(), SHUT_RDWR);  // ends accept()
  thread_.join();
}

void NamedServer::serve() {
  for (;;) {
    Fd connection(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
    if (connection.get() < 0) {
      if (errno == EINVAL) return;
      continue;
    }
    ++accepted_;
    answer(connection.get());
    // close() alone ends nothing while a child that was forked meanwhile has the connection as well.
    ::shutdown(connection.get(), SHUT_WR);
  }
}

void NamedServer::answer(int connection) const {
  switch (speaks_) {
    case Speaks::name:
      return send_all(connection, name_);
    case Speaks::local_address:
      return send_all(connection, local_address(connection));
    case Speaks::http:
      read_request(connection);
      return send_all(connection, "HTTP/1.0 200 OK\r\nContent-Length: " + std::to_string(name_.size()) +
                                      "\r\nConnection: close\r\n\r\n" + name_);
  }
}

NamedUdpServer::NamedUdpServer(std::string name, const std::string& address, std::uint16_t port)
    : name_(std::move(name)),
      address_(address),
      socket_(checked(::socket(Endpoint(address, 0).family(), SOCK_DGRAM | SOCK_CLOEXEC, 0), "socket")) {
  const Endpoint local(address, port);
  checked(::bind(socket_.get(), local.address(), local.length()), "bind " + address);
  port_ = bound_port(socket_.get());
  std::latch started(1);
  thread_ = std::thread([&started, this] {
    started.count_down();
    serve();
  });
  started.wait();
}

NamedUdpServer::~NamedUdpServer() {
  ::shutdown(socket_.get(), SHUT_RDWR);  // ENOTCONN, but wakes recvfrom()
  thread_.join();
}

void NamedUdpServer::serve() const {
  for (;;) {
    char request[64];
    sockaddr_storage from{};
    socklen_t length = sizeof from;
    const ssize_t size =
        ::recvfrom(socket_.get(), request, sizeof request, 0, reinterpret_cast<sockaddr*>(&from), &length);
    if (size <= 0) return;
    (void)!::sendto(socket_.get(), name_.data(), name_.size(), 0, reinterpret_cast<sockaddr*>(&from), length);
  }
}

}  // namespace support
