// SPDX-License-Identifier: BSD-2-Clause
#include "tests/support/udp.h"

#include <arpa/inet.h>
#include <fmt/format.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/time.h>

#include <cstring>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "tests/support/tcp.h"

namespace support {
namespace {

constexpr int patience = 20'000;  // ms
constexpr int lost_after = 100;   // ms

struct Name {
  sockaddr_storage storage{};
  socklen_t length = sizeof storage;

  Name() = default;
  Name(const std::string& address, std::uint16_t port) {
    sockaddr_in v4{};
    sockaddr_in6 v6{};
    if (::inet_pton(AF_INET, address.c_str(), &v4.sin_addr) == 1) {
      v4.sin_family = AF_INET;
      v4.sin_port = htons(port);
      length = sizeof v4;
      std::memcpy(&storage, &v4, sizeof v4);
    } else if (::inet_pton(AF_INET6, address.c_str(), &v6.sin6_addr) == 1) {
      v6.sin6_family = AF_INET6;
      v6.sin6_port = htons(port);
      length = sizeof v6;
      std::memcpy(&storage, &v6, sizeof v6);
    } else {
      throw std::invalid_argument(address);
    }
  }

  sockaddr* get() { return reinterpret_cast<sockaddr*>(&storage); }
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage); }

  std::string address() const {
    char text[INET6_ADDRSTRLEN];
    sockaddr_in v4{};
    sockaddr_in6 v6{};
    std::memcpy(&v4, &storage, sizeof v4);
    std::memcpy(&v6, &storage, sizeof v6);
    return storage.ss_family == AF_INET ? ::inet_ntop(AF_INET, &v4.sin_addr, text, sizeof text)
                                        : ::inet_ntop(AF_INET6, &v6.sin6_addr, text, sizeof text);
  }
  std::uint16_t port() const {
    sockaddr_in v4{};  // the port is at the same place in both
    std::memcpy(&v4, &storage, sizeof v4);
    return ntohs(v4.sin_port);
  }
};

UdpAnswer parse(const Datagram& datagram, const std::string& address, std::uint16_t port) {
  if (datagram.address != address || datagram.port != port)
    throw std::runtime_error(fmt::format("an answer came from {}:{}", datagram.address, datagram.port));
  UdpAnswer answer;
  std::istringstream(datagram.bytes) >> answer.name >> answer.seen_port;
  return answer;
}

}  // namespace

UdpSocket::UdpSocket(const std::string& address, std::uint16_t port) : address_(address) {
  Name local(address, port);
  fd_ = Fd(checked(::socket(local.storage.ss_family, SOCK_DGRAM | SOCK_CLOEXEC, 0), "socket"));
  const timeval bound{patience / 1000, 0};
  checked(::setsockopt(fd_.get(), SOL_SOCKET, SO_RCVTIMEO, &bound, sizeof bound), "SO_RCVTIMEO");
  checked(::bind(fd_.get(), local.get(), local.length), "bind " + address);
  checked(::getsockname(fd_.get(), local.get(), &local.length), "getsockname");
  port_ = local.port();
}

void UdpSocket::connect(const std::string& address, std::uint16_t port) const {
  const Name to(address, port);
  checked(::connect(fd_.get(), to.get(), to.length), "connect " + address);
}

void UdpSocket::send(std::string_view bytes) const {
  checked(::send(fd_.get(), bytes.data(), bytes.size(), 0), "send");
}

void UdpSocket::send_to(const std::string& address, std::uint16_t port, std::string_view bytes) const {
  const Name to(address, port);
  checked(::sendto(fd_.get(), bytes.data(), bytes.size(), 0, to.get(), to.length), "sendto " + address);
}

Datagram UdpSocket::receive() const {
  Name from;
  std::string bytes(65536, '\0');
  const auto size =
      checked(::recvfrom(fd_.get(), bytes.data(), bytes.size(), 0, from.get(), &from.length), "no datagram came");
  bytes.resize(static_cast<std::size_t>(size));
  return {std::move(bytes), from.address(), from.port()};
}

int UdpSocket::error() const {
  char byte = 0;
  return ::recv(fd_.get(), &byte, sizeof byte, 0) < 0 ? errno : 0;
}

std::ostream& operator<<(std::ostream& out, const UdpAnswer& answer) {
  return out << answer.name << " to port " << answer.seen_port;
}

UdpServer::UdpServer(std::string name, const std::string& address)
    : name_(std::move(name)), socket_(address), stopping_(checked(::eventfd(0, EFD_CLOEXEC), "eventfd")) {
  thread_ = std::thread([this] { serve(); });
}

void UdpServer::stop() {
  if (!thread_.joinable()) return;
  checked(::eventfd_write(stopping_.get(), 1), "eventfd_write");
  thread_.join();
  socket_.close();
}

void UdpServer::serve() {
  for (;;) {
    pollfd files[] = {{socket_.get(), POLLIN, 0}, {stopping_.get(), POLLIN, 0}};
    ::poll(files, 2, -1);
    if (files[1].revents != 0) return;
    const Datagram question = socket_.receive();
    ++received_;
    socket_.answer(question, fmt::format("{} {}", name_, question.port));
  }
}

UdpAnswer ask(const UdpSocket& client, const std::string& address, std::uint16_t port) {
  client.send_to(address, port, "?");
  return parse(client.receive(), address, port);
}

UdpAnswer ask_until_answered(const UdpSocket& client, const std::string& address, std::uint16_t port) {
  for (int waited = 0; waited < patience; waited += lost_after) {
    client.send_to(address, port, "?");
    if (is_readable(client.get(), lost_after)) return parse(client.receive(), address, port);
  }
  throw std::runtime_error("no datagram was answered");
}

}  // namespace support
