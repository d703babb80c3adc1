// SPDX-License-Identifier: BSD-2-Clause
#include "fallback_proxy/address_watch.h"

#include <libmnl/libmnl.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <sys/socket.h>

#include <cerrno>
#include <system_error>
#include <utility>

#include "config/fd.h"
#include "fallback_proxy/local_vips.h"

namespace userspace {

AddressWatch::AddressWatch(boost::asio::io_context& io, std::function<void()> changed,
                           std::function<void()> route_removed)
    : socket_(io), changed_(std::move(changed)), route_removed_(std::move(route_removed)) {
  config::Fd socket(::socket(AF_NETLINK, SOCK_RAW | SOCK_NONBLOCK | SOCK_CLOEXEC, NETLINK_ROUTE));
  sockaddr_nl address{};
  address.nl_family = AF_NETLINK;
  address.nl_groups = RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR | RTMGRP_IPV4_ROUTE | RTMGRP_IPV6_ROUTE;
  if (!socket || ::bind(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) return;
  boost::system::error_code error;
  socket_.assign(socket.get(), error);
  if (error) throw std::system_error(error.value(), std::generic_category(), "watching this machine's addresses");
  socket.release();
  wait();
}

void AddressWatch::wait() {
  socket_.async_wait(socket_.wait_read, [this](const boost::system::error_code& error) {
    if (error) return;
    const News news = read();
    if (news.has_changed) changed_();
    if (news.has_removed) route_removed_();
    wait();
  });
}

AddressWatch::News AddressWatch::read() {
  News news;
  alignas(nlmsghdr) char buffer[8192];
  for (;;) {
    const ssize_t size = ::recv(socket_.native_handle(), buffer, sizeof buffer, 0);
    if (size < 0 && errno == ENOBUFS) news = {.has_changed = true, .has_removed = true};  // some were lost
    if (size < 0 && (errno == ENOBUFS || errno == EINTR)) continue;
    if (size <= 0) return news;
    int left = static_cast<int>(size);
    for (auto* message = reinterpret_cast<const nlmsghdr*>(buffer); mnl_nlmsg_ok(message, left);
         message = mnl_nlmsg_next(message, &left)) {
      if (message->nlmsg_type == RTM_NEWADDR || message->nlmsg_type == RTM_DELADDR) news.has_changed = true;
      if (message->nlmsg_type != RTM_DELROUTE) continue;
      const auto* route = static_cast<const rtmsg*>(mnl_nlmsg_get_payload(message));
      if (is_in_table_local(*route) && route->rtm_protocol == route_protocol) news.has_removed = true;
    }
  }
}

}  // namespace userspace
