// SPDX-License-Identifier: BSD-2-Clause
#include "fallback_proxy/hand_over.h"

#include <fmt/format.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <boost/json.hpp>
#include <cerrno>
#include <cstring>

#include "config/names.h"

namespace userspace {
namespace {

boost::json::object to_json(const SocketName& name) {
  const auto& [vip, port, protocol] = name;
  return {{"vip", vip.to_string()}, {"port", port}, {"protocol", config::name_of(config::protocol_names, protocol)}};
}

SocketName to_name(const boost::json::object& json) {
  return {boost::asio::ip::make_address(std::string_view(json.at("vip").as_string())),
          json.at("port").to_number<std::uint16_t>(),
          json.at("protocol").as_string() == "udp" ? config::Protocol::udp : config::Protocol::tcp};
}

std::string to_line(const boost::json::object& object) { return serialize(object) + "\n"; }

int option(int fd, int name) {
  int value = -1;
  socklen_t length = sizeof value;
  return ::getsockopt(fd, SOL_SOCKET, name, &value, &length) == 0 ? value : -1;
}

/// Whether it is the socket that its line says it is.
bool is_socket_of(int fd, const SocketName& name) {
  const auto& [vip, port, protocol] = name;
  const bool is_udp = protocol == config::Protocol::udp;
  if (option(fd, SO_TYPE) != (is_udp ? SOCK_DGRAM : SOCK_STREAM) ||
      option(fd, SO_PROTOCOL) != (is_udp ? IPPROTO_UDP : IPPROTO_TCP) || option(fd, SO_ACCEPTCONN) != (is_udp ? 0 : 1))
    return false;
  SocketAddress bound;
  bound.length = sizeof bound.storage;
  return ::getsockname(fd, &bound.storage.any, &bound.length) == 0 &&
         bound.family() == SocketAddress(vip, port).family() && bound.address() == vip && bound.port() == port;
}

bool is_control_socket(int fd) {
  return option(fd, SO_DOMAIN) == AF_UNIX && option(fd, SO_TYPE) == SOCK_STREAM && option(fd, SO_ACCEPTCONN) == 1;
}

bool may_be_vip(const config::Address& address) {
  return !address.is_unspecified() && !address.is_multicast() &&
         address != config::Address(boost::asio::ip::address_v4::broadcast());
}

std::unexpected<config::Error> is_not(const ControlClient& from, std::string_view what) {
  return config::fail(-EPROTO, fmt::format("pid {} has handed over what is not {}", from.pid(), what));
}

config::Result<config::Fd> next_descriptor(ControlClient& from) {
  if (auto descriptor = from.take_descriptor()) return std::move(*descriptor);
  return config::fail(-EPROTO, fmt::format("pid {} has named a socket that it did not send", from.pid()));
}

/// Throws where the lines are not what they should be.
config::Result<Inheritance> receive_inheritance(ControlClient& from) {
  const auto first = from.ask({{"request", "take_over"}, {"protocol", hand_over_protocol}});
  if (!first) return std::unexpected(first.error());
  if (const auto protocol = first->at("protocol").to_number<std::int64_t>(); protocol != hand_over_protocol) {
    return config::fail(-EPROTO, fmt::format("pid {} speaks version {} of the hand-over, this version speaks {}",
                                             from.pid(), protocol, hand_over_protocol));
  }
  Inheritance result;
  result.version = first->at("version").as_string();
  for (const auto& vip : first->at("vips").as_array()) {
    result.vips.push_back(boost::asio::ip::make_address(std::string_view(vip.as_string())));
    if (!may_be_vip(result.vips.back()))
      return is_not(from, fmt::format("a VIP: {}", std::string_view(vip.as_string())));
  }
  auto control = next_descriptor(from);
  if (!control) return std::unexpected(control.error());
  result.control = std::move(*control);
  if (!is_control_socket(result.control.get())) return is_not(from, "its control socket");

  for (;;) {
    const auto line = from.receive();
    if (!line) return std::unexpected(line.error());
    const auto& sockets = line->at("sockets").as_array();
    if (sockets.empty()) return result;
    for (const auto& name : sockets) {
      auto socket = next_descriptor(from);
      if (!socket) return std::unexpected(socket.error());
      const SocketName bound = to_name(name.as_object());
      if (!is_socket_of(socket->get(), bound)) return is_not(from, fmt::format("the socket of {}", serialize(name)));
      result.sockets.emplace(bound, std::move(*socket));
    }
  }
}

}  // namespace

std::vector<Message> messages(const Offer& offer, int control, std::string_view version) {
  boost::json::array vips;
  for (const config::Address& vip : offer.vips) vips.emplace_back(vip.to_string());
  std::vector<Message> result;
  result.push_back(
      {to_line(
           {{"protocol", hand_over_protocol}, {"pid", ::getpid()}, {"version", version}, {"vips", std::move(vips)}}),
       {control}});
  std::span<const std::pair<SocketName, int>> left = offer.sockets;
  while (!left.empty()) {
    const auto chunk = left.first(std::min(left.size(), max_descriptors));
    left = left.subspan(chunk.size());
    boost::json::array names;
    Message& message = result.emplace_back();
    for (const auto& [name, socket] : chunk) {
      names.push_back(to_json(name));
      message.descriptors.push_back(socket);
    }
    message.line = to_line({{"sockets", std::move(names)}});
  }
  result.push_back({to_line({{"sockets", boost::json::array()}}), {}});
  return result;
}

ssize_t send_with_descriptors(int socket, std::string_view bytes, std::span<const int> descriptors) {
  alignas(cmsghdr) char control[CMSG_SPACE(max_descriptors * sizeof(int))] = {};
  iovec from{.iov_base = const_cast<char*>(bytes.data()), .iov_len = bytes.size()};
  msghdr message{};
  message.msg_iov = &from;
  message.msg_iovlen = 1;
  if (!descriptors.empty()) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(descriptors.size_bytes());
    cmsghdr* rights = CMSG_FIRSTHDR(&message);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(descriptors.size_bytes());
    std::memcpy(CMSG_DATA(rights), descriptors.data(), descriptors.size_bytes());
  }
  return ::sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
}

config::Result<Inheritance> take_over(ControlClient& predecessor) {
  auto received = predecessor.understand([&] { return receive_inheritance(predecessor); });
  if (!received) return std::unexpected(received.error());
  return std::move(*received);
}

config::Result<bool> say_ready(ControlClient& predecessor) {
  // Its end may be noticed by either call.
  if (auto sent = predecessor.send({{"request", "ready"}}); !sent && sent.error().code != -EPIPE)
    return std::unexpected(sent.error());
  const auto answer = predecessor.receive();
  if (!answer && answer.error().code == -EPIPE) return false;
  if (!answer) return std::unexpected(answer.error());
  return true;
}

}  // namespace userspace
