// SPDX-License-Identifier: BSD-2-Clause
#include "fallback_proxy/address_watch.h"

#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <sys/socket.h>

#include <cerrno>
#include <utility>

#include "config/fd.h"

namespace userspace {

AddressWatch::AddressWatch(boost::asio::io_context& io, std::function<void()> changed)
    : socket_(io), changed_(std::move(changed)) {
  config::Fd socket(::socket(AF_NETLINK, SOCK_RAW | SOCK_NONBLOCK | SOCK_CLOEXEC, NETLINK_ROUTE));
  sockaddr_nl address{};
  address.nl_family = AF_NETLINK;
  address.nl_groups = RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR;
  if (!socket || ::bind(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) return;
  socket_.assign(socket.release());
  wait();
}

void AddressWatch::wait() {
  socket_.async_wait(socket_.wait_read, [this](const boost::system::error_code& error) {
    if (error) return;
    // That something has changed is enough; a queue that ran over (ENOBUFS) says so as well.
    char messages[8192];
    while (::recv(socket_.native_handle(), messages, sizeof messages, 0) > 0 || errno == ENOBUFS) {
    }
    changed_();
    wait();
  });
}

}  // namespace userspace
