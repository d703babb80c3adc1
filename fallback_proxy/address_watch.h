// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <boost/asio/io_context.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <functional>

namespace userspace {

/// Calls `changed` when this host's addresses have changed (rtnetlink(7), RTMGRP_IPV4_IFADDR). Where the kernel gives
/// no such socket, nothing is ever called.
class AddressWatch {
 public:
  AddressWatch(boost::asio::io_context& io, std::function<void()> changed);

 private:
  void wait();

  boost::asio::posix::stream_descriptor socket_;
  std::function<void()> changed_;
};

}  // namespace userspace
