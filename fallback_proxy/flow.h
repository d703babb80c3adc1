// SPDX-License-Identifier: BSD-2-Clause
//
// One UDP client of a service and its backend. It belongs to one UdpListener and runs in that one's thread. It lives as
// long as it waits for its backend's next datagram: the wait holds it, and it holds the listener.
#pragma once

#include <boost/asio/io_context.hpp>
#include <boost/asio/posix/basic_stream_descriptor.hpp>
#include <memory>

#include "fallback_proxy/datagrams.h"
#include "fallback_proxy/deadlines.h"
#include "fallback_proxy/service.h"

namespace userspace {

class UdpListener;
class Worker;

class Flow : public Waiting, public std::enable_shared_from_this<Flow> {
 public:
  using Socket = boost::asio::posix::basic_stream_descriptor<boost::asio::io_context::executor_type>;

  /// Has its place in the Admission; `socket` is open, and connected to the backend.
  Flow(Worker& worker, std::shared_ptr<UdpListener> listener, const UdpClient& client, BackendPointer backend,
       Socket socket);

  void start();
  const Backend& backend() const { return *backend_; }

  /// Passes those of the worker's datagrams on that are from `begin` on and before `end`. Returns the first that is
  /// left: `end`, unless the backend has refused an earlier one, which ends the flow.
  std::size_t send(std::size_t begin, std::size_t end);

  /// Ends it; what the backend still sends is lost.
  void end();
  /// Ends it as well, but its place is the caller's.
  void give_up();
  /// It has been idle for too long.
  void expire() { end(); }

 private:
  void wait();
  void receive();
  void reached();
  void refused();
  void close();

  Worker& worker_;
  const std::shared_ptr<UdpListener> listener_;
  const UdpClient client_;
  const BackendPointer backend_;
  Socket socket_;
  const Clock::time_point began_ = Clock::now();
  bool has_reached_ = false;  // the backend, as far as one can know
};

}  // namespace userspace
