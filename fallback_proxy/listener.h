// SPDX-License-Identifier: BSD-2-Clause
//
// The listening socket of one service. It belongs to one Worker and is used in its thread only; what it accepts goes to
// the worker that has the fewest connections. One socket, not one per thread with SO_REUSEPORT: closing one of those
// resets what is queued on it.
#pragma once

#include <boost/asio/io_context.hpp>
#include <boost/asio/posix/basic_stream_descriptor.hpp>
#include <memory>
#include <span>
#include <vector>

#include "config/fail.h"
#include "config/fd.h"
#include "fallback_proxy/admission.h"
#include "fallback_proxy/allowed.h"
#include "fallback_proxy/service.h"
#include "fallback_proxy/worker.h"

namespace userspace {

using Workers = std::vector<std::unique_ptr<Worker>>;

/// Why bind() failed, and what an operator can do about it. `error` is the errno.
std::unexpected<config::Error> binding_failed(int error, const SocketAddress& vip);

/// Lets the socket have a VIP that is local by a route alone: for IPv6, bind() looks for an address of a device.
void allow_vip_by_route(int fd, const SocketAddress& vip);

/// A listening socket on the service's VIP and port. `is_by_route`: the VIP is local by a route of ours. The error says
/// what the kernel said.
config::Result<config::Fd> open_listening_socket(const config::Service& service, bool is_by_route);

class Listener : public std::enable_shared_from_this<Listener> {
 public:
  Listener(Worker& worker, const Workers& workers, Admission& admission, config::Fd socket,
           std::shared_ptr<const Service> service, AllowedPointer allowed);

  void start() { wait(); }
  /// Until stop() is asked for, from any thread.
  int socket() { return socket_.native_handle(); }
  /// For connections that come from now on.
  void change(std::shared_ptr<const Service> service) { service_ = std::move(service); }
  void change(AllowedPointer allowed) { allowed_ = std::move(allowed); }
  /// Accepts what is queued, if `accept_queued`, and closes the socket.
  void stop(bool accept_queued);

 private:
  void wait();
  void accept_queued();
  bool accept_one();
  void pause();
  Worker& least_loaded() const;

  Worker& worker_;
  const Workers& workers_;
  Admission& admission_;
  boost::asio::posix::basic_stream_descriptor<boost::asio::io_context::executor_type> socket_;
  std::shared_ptr<const Service> service_;
  AllowedPointer allowed_;
};

}  // namespace userspace
