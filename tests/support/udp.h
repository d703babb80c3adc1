// SPDX-License-Identifier: BSD-2-Clause
//
// Both ends of UDP exchanges, IPv4 and IPv6. What goes wrong is thrown.
#pragma once

#include <atomic>
#include <cstdint>
#include <iosfwd>
#include <string>
#include <string_view>
#include <thread>

#include "tests/support/fd.h"
#include "tests/support/toml.h"

namespace support {

/// A datagram, and where it came from.
struct Datagram {
  std::string bytes;
  std::string address;
  std::uint16_t port = 0;
};

/// A bound UDP socket whose calls end after some seconds at the latest.
class UdpSocket {
 public:
  /// Port 0: any that is free.
  explicit UdpSocket(const std::string& address = "127.0.0.1", std::uint16_t port = 0);

  std::uint16_t port() const { return port_; }
  Backend backend() const { return {address_, port_}; }
  int get() const { return fd_.get(); }
  void close() { fd_.reset(); }

  void connect(const std::string& address, std::uint16_t port) const;
  /// For connected ones.
  void send(std::string_view bytes) const;
  void send_to(const std::string& address, std::uint16_t port, std::string_view bytes) const;
  void answer(const Datagram& question, std::string_view bytes) const {
    send_to(question.address, question.port, bytes);
  }

  /// Blocks for the next datagram.
  Datagram receive() const;
  /// Blocks for what the kernel knows of earlier datagrams: ECONNREFUSED. 0 when a datagram has come instead.
  int error() const;

 private:
  std::string address_;
  Fd fd_;
  std::uint16_t port_ = 0;
};

/// What a UdpServer said, and the port at which it saw who asked.
struct UdpAnswer {
  std::string name;
  std::uint16_t seen_port = 0;
  friend bool operator==(const UdpAnswer&, const UdpAnswer&) = default;
};
std::ostream& operator<<(std::ostream& out, const UdpAnswer& answer);

/// Answers each datagram with its name and the port that it came from.
class UdpServer {
 public:
  explicit UdpServer(std::string name, const std::string& address = "127.0.0.1");
  ~UdpServer() { stop(); }
  UdpServer(const UdpServer&) = delete;
  UdpServer& operator=(const UdpServer&) = delete;

  const std::string& name() const { return name_; }
  Backend backend() const { return socket_.backend(); }
  /// Datagrams so far; those that have been answered are among them.
  std::uint64_t received() const { return received_; }
  /// Closes its socket: from now on the kernel refuses.
  void stop();

 private:
  void serve();

  std::string name_;
  UdpSocket socket_;
  Fd stopping_;
  std::atomic<std::uint64_t> received_ = 0;
  std::thread thread_;
};

/// Sends a datagram to where a UdpServer is reached; the answer has to come from there.
UdpAnswer ask(const UdpSocket& client, const std::string& address, std::uint16_t port);
/// The same over and over until it is answered: datagrams may be lost.
UdpAnswer ask_until_answered(const UdpSocket& client, const std::string& address, std::uint16_t port);

}  // namespace support
