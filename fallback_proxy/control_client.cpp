// SPDX-License-Identifier: BSD-2-Clause
#include "fallback_proxy/control_client.h"

#include <fmt/format.h>
#include <sys/socket.h>
#include <sys/time.h>

#include <boost/json.hpp>
#include <cerrno>
#include <cstring>

#include "fallback_proxy/control_socket.h"
#include "fallback_proxy/hand_over.h"

namespace userspace {
namespace {

constexpr timeval patience{.tv_sec = 10, .tv_usec = 0};

}  // namespace

config::Result<std::optional<ControlClient>> ControlClient::connect(const std::string& path) {
  const auto address = control_address(path);
  config::Fd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!socket) return config::fail_errno(errno, "socket");
  ::setsockopt(socket.get(), SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
  ::setsockopt(socket.get(), SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
  if (::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
    if (errno == ENOENT || errno == ECONNREFUSED) return std::nullopt;
    return config::fail_errno(errno, "connecting to " + path);
  }
  ucred other{};
  socklen_t length = sizeof other;
  if (::getsockopt(socket.get(), SOL_SOCKET, SO_PEERCRED, &other, &length) != 0)
    return config::fail_errno(errno, "asking whose " + path + " is");
  // Whoever could bind the path would be believed otherwise.
  if (other.uid != 0 && other.uid != ::geteuid())
    return config::fail(-EPERM, fmt::format("{} is user {}'s, who is neither root nor this one", path, other.uid));
  return ControlClient(std::move(socket), other.pid);
}

std::string ControlClient::who() const { return fmt::format("pid {}", pid_); }

std::unexpected<config::Error> ControlClient::not_understood(const std::exception& error) const {
  return config::fail(-EPROTO,
                      fmt::format("{} has answered what this version does not understand: {}", who(), error.what()));
}

config::Result<void> ControlClient::send(const boost::json::object& request) {
  const std::string line = serialize(request) + "\n";
  if (::send(socket_.get(), line.data(), line.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(line.size())) return {};
  const int error = errno;
  // Who turns somebody away has said why before.
  if (const auto said = receive(); !said && said.error().code == -EREMOTEIO) return std::unexpected(said.error());
  return config::fail_errno(error, "writing to " + who());
}

config::Result<boost::json::object> ControlClient::receive() {
  std::size_t searched = 0;
  std::size_t end = 0;
  while ((end = text_.find('\n', searched)) == std::string::npos) {
    searched = text_.size();
    if (auto more = receive_more(); !more) return std::unexpected(more.error());
  }
  boost::system::error_code error;
  auto value = boost::json::parse(std::string_view(text_).substr(0, end), error);
  text_.erase(0, end + 1);
  if (error || !value.is_object()) return config::fail(-EPROTO, who() + " has sent what is no JSON object");
  if (const auto* why = value.as_object().if_contains("error"); why != nullptr && why->is_string())
    return config::fail(-EREMOTEIO, fmt::format("{}: {}", who(), std::string_view(why->as_string())));
  return std::move(value.as_object());
}

config::Result<boost::json::object> ControlClient::ask(const boost::json::object& request) {
  if (auto sent = send(request); !sent) return std::unexpected(sent.error());
  return receive();
}

config::Result<void> ControlClient::receive_more() {
  char bytes[65536];
  alignas(cmsghdr) char control[CMSG_SPACE(max_descriptors * sizeof(int))];
  iovec into{.iov_base = bytes, .iov_len = sizeof bytes};
  msghdr message{};
  message.msg_iov = &into;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  ssize_t size = -1;
  do {
    size = ::recvmsg(socket_.get(), &message, MSG_CMSG_CLOEXEC);
  } while (size < 0 && errno == EINTR);  // a process that takes over acts on a signal when it has
  if (size < 0 && errno == EAGAIN) return config::fail(-ETIMEDOUT, who() + " does not answer");
  if (size < 0 && errno != ECONNRESET) return config::fail_errno(errno, "reading from " + who());
  if (size <= 0) return config::fail(-EPIPE, who() + " has closed the connection");
  for (const cmsghdr* part = CMSG_FIRSTHDR(&message); part != nullptr;
       part = CMSG_NXTHDR(&message, const_cast<cmsghdr*>(part))) {
    if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) continue;
    for (std::size_t at = CMSG_LEN(0); at + sizeof(int) <= part->cmsg_len; at += sizeof(int)) {
      int fd = -1;
      std::memcpy(&fd, reinterpret_cast<const char*>(part) + at, sizeof fd);
      descriptors_.emplace_back(fd);
    }
  }
  if ((message.msg_flags & MSG_CTRUNC) != 0) return config::fail(-EMFILE, "too few file descriptors (RLIMIT_NOFILE)");
  text_.append(bytes, static_cast<std::size_t>(size));
  return {};
}

void ControlClient::wait_for_ever() {
  constexpr timeval no_limit{};
  ::setsockopt(socket_.get(), SOL_SOCKET, SO_RCVTIMEO, &no_limit, sizeof no_limit);
}

std::optional<config::Fd> ControlClient::take_descriptor() {
  if (descriptors_.empty()) return {};
  config::Fd first = std::move(descriptors_.front());
  descriptors_.pop_front();
  return first;
}

}  // namespace userspace
