// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <boost/asio/io_context.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <functional>

namespace userspace {

/// Calls `changed` when this host's addresses have changed, and `route_removed` when a local route of ours has gone,
/// whoever removed it (rtnetlink(7)). Where the kernel gives no such socket, nothing is ever called.
class AddressWatch {
 public:
  AddressWatch(boost::asio::io_context& io, std::function<void()> changed, std::function<void()> route_removed);

 private:
  struct News {
    bool has_changed = false;
    bool has_removed = false;
  };

  void wait();
  News read();

  boost::asio::posix::stream_descriptor socket_;
  const std::function<void()> changed_;
  const std::function<void()> route_removed_;
};

}  // namespace userspace
