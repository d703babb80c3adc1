// SPDX-License-Identifier: BSD-2-Clause
//
// The socket of one UDP service, and the flows of its clients. It belongs to one Worker and is used in its thread only;
// so are its flows.
//
//      client ──►  socket on VIP:port   ──►  Flow: a socket connected  ──►  backend
//             ◄──  (replies come from it) ◄──  to the client's backend   ◄──
#pragma once

#include <boost/asio/io_context.hpp>
#include <boost/asio/posix/basic_stream_descriptor.hpp>
#include <boost/unordered/unordered_flat_map.hpp>
#include <functional>
#include <memory>

#include "config/fail.h"
#include "config/fd.h"
#include "fallback_proxy/allowed.h"
#include "fallback_proxy/datagrams.h"
#include "fallback_proxy/flow.h"
#include "fallback_proxy/listener.h"
#include "fallback_proxy/service.h"
#include "fallback_proxy/worker.h"

namespace userspace {

/// A UDP socket on the service's VIP and port. The error says what the kernel said.
config::Result<config::Fd> open_udp_socket(const config::Service& service, bool is_by_route);

class UdpListener : public std::enable_shared_from_this<UdpListener> {
 public:
  UdpListener(Worker& worker, const Workers& workers, config::Fd socket, std::shared_ptr<const Service> service,
              bool is_by_route, AllowedPointer allowed);

  void start() { wait(); }
  int socket() { return socket_.native_handle(); }
  /// Ends the flows of backends that are not active any more, unless they are to be kept (on_remove).
  void change(std::shared_ptr<const Service> service);
  /// For flows that begin from now on.
  void change(AllowedPointer allowed) { allowed_ = std::move(allowed); }
  /// Begins no flow any more; closes the socket when the last has ended. `is_handed_over`: another process reads from
  /// the same socket, so this one only writes what backends still answer.
  void drain(bool is_handed_over);
  /// Ends the flows and closes the socket.
  void stop();

  // For its flows.

  const Service& service() const { return *service_; }
  void count_received(const Datagrams::Sent& sent);
  /// Passes the worker's first `count` datagrams on to the client.
  void reply(std::size_t count, const UdpClient& client);
  /// The client's flow has ended.
  void forget(const UdpClient& client);

 private:
  /// Clients choose their ports, and some their addresses: where they fall in the table, they cannot know.
  struct Hash {
    std::uint64_t salt;
    std::size_t operator()(const UdpClient& client) const;
  };

  void wait();
  void receive();
  bool is_forged(std::size_t index) const;
  void pass_on(std::size_t begin, std::size_t end);
  Flow* find(const UdpClient& client) const;
  Flow* begin_flow(const UdpClient& from, std::size_t count);
  Flow* reach_backend(const UdpClient& from, const SocketAddress& client);
  config::Fd connect_to(const Backend& backend);
  void end_flows(const std::function<bool(const Flow&)>& which);
  void ask_for_place();
  void close();

  Worker& worker_;
  const Workers& workers_;
  boost::asio::posix::basic_stream_descriptor<boost::asio::io_context::executor_type> socket_;
  std::shared_ptr<const Service> service_;
  AllowedPointer allowed_;
  const bool knows_devices_;  // by which datagrams come in
  boost::unordered_flat_map<UdpClient, Flow*, Hash> flows_;
  bool is_draining_ = false;
  bool is_handed_over_ = false;
};

}  // namespace userspace
