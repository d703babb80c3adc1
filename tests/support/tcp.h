// SPDX-License-Identifier: BSD-2-Clause
//
// Both ends of TCP connections in a test's own hands, IPv4 and IPv6. What goes wrong is thrown.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "tests/support/fd.h"
#include "tests/support/named_server.h"
#include "tests/support/toml.h"

namespace support {

/// A listening socket that accepts when the test says so.
class TcpListener {
 public:
  /// Port 0: any that is free.
  explicit TcpListener(const std::string& address = "127.0.0.1", std::uint16_t port = 0, int backlog = 4096);

  /// Blocks for the next connection, some seconds at most.
  Fd accept() const;

  const std::string& address() const { return address_; }
  std::uint16_t port() const { return port_; }
  Backend backend(std::uint32_t weight = 1) const { return {address_, port_, weight}; }
  int get() const { return fd_.get(); }

 private:
  std::string address_;
  Fd fd_;
  std::uint16_t port_ = 0;
};

/// A port that refuses connections: nobody listens there, and nobody else can take it.
class DeadPort {
 public:
  explicit DeadPort(const std::string& address = "127.0.0.1", std::uint16_t port = 0);

  std::uint16_t port() const { return port_; }
  Backend backend(std::uint32_t weight = 1) const { return {address_, port_, weight}; }

  /// Comes to life, under the same port.
  std::unique_ptr<NamedServer> listen(std::string name);

 private:
  std::string address_;
  Fd fd_;
  std::uint16_t port_ = 0;
};

/// A connection, from this address (and port) if one is given. Its calls end after some seconds at the latest.
Fd dial(const std::string& address, std::uint16_t port, const std::string& from = {}, std::uint16_t from_port = 0);

/// The errno of such a connect, or 0. The connection is reset at once.
int dial_errno(const std::string& address, std::uint16_t port);

/// Connect from this address, read until the server closes.
std::string ask_from(const std::string& from, const std::string& address, std::uint16_t port);

void send_all(const Fd& fd, std::string_view bytes);
/// So many bytes; throws when fewer come.
std::string receive(const Fd& fd, std::size_t size);
/// Everything up to the end; throws when that is a reset.
std::string receive_all(const Fd& fd);
/// The errno that ends what is received, 0 for an orderly end.
int end_of(const Fd& fd);
/// No more is sent.
void send_end(const Fd& fd);
/// The other side is told that nobody is here any more.
void reset(Fd fd);

/// The other side's kernel has everything that was sent.
bool is_delivered(const Fd& fd);
/// Something can be read, within this time.
bool is_readable(int fd, int milliseconds = 0);

/// Where this socket is bound: "127.0.0.1" and a port.
std::string own_address(const Fd& fd);
std::uint16_t own_port(const Fd& fd);

/// As many descriptors as the system gives this process.
void raise_descriptor_limit();

}  // namespace support
