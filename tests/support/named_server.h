// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <thread>

#include "tests/support/fd.h"

namespace support {

/// A TCP server that answers each connection and closes it, so that a test can assert who answered. Its thread has
/// begun when the constructor returns, and allocates nothing afterwards: a test may fork (see Asker).
class NamedServer {
 public:
  enum class Speaks {
    name,           // its name, at once
    local_address,  // the address that it was reached at: one server on 0.0.0.0 stands for many backends
    http,           // reads a request first; the response's body is its name
  };

  /// With port 0 the kernel chooses one.
  explicit NamedServer(std::string name, const std::string& address = "127.0.0.1", Speaks speaks = Speaks::name,
                       std::uint16_t port = 0);
  ~NamedServer();
  NamedServer(const NamedServer&) = delete;
  NamedServer& operator=(const NamedServer&) = delete;

  const std::string& name() const { return name_; }
  const std::string& address() const { return address_; }
  std::uint16_t port() const { return port_; }

  /// Connections accepted so far; a client that has its answer is among them.
  std::uint64_t accepted() const { return accepted_; }

 private:
  void serve();
  void answer(int connection) const;

  std::string name_;
  std::string address_;
  Speaks speaks_;
  std::uint16_t port_ = 0;
  Fd listener_;
  std::atomic<std::uint64_t> accepted_ = 0;
  std::thread thread_;
};

/// The same for UDP: answers each datagram with its name, from the address that it was bound to.
class NamedUdpServer {
 public:
  explicit NamedUdpServer(std::string name, const std::string& address = "127.0.0.1", std::uint16_t port = 0);
  ~NamedUdpServer();
  NamedUdpServer(const NamedUdpServer&) = delete;
  NamedUdpServer& operator=(const NamedUdpServer&) = delete;

  const std::string& address() const { return address_; }
  std::uint16_t port() const { return port_; }

 private:
  void serve() const;

  std::string name_;
  std::string address_;
  std::uint16_t port_ = 0;
  Fd socket_;
  std::thread thread_;
};

}  // namespace support
