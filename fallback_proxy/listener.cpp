// SPDX-License-Identifier: BSD-2-Clause
#include "fallback_proxy/listener.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>

#include "fallback_proxy/socket_options.h"

namespace userspace {
namespace {

// So many are accepted before others have their turn.
constexpr int batch = 64;

// As many as net.core.somaxconn allows.
constexpr int backlog = 65535;

/// A client that gave up while it was queued is no reason to stop.
bool is_of_one_client(int error) { return error == ECONNABORTED || error == EINTR || error == EPROTO; }

/// Connections that can be accepted.
std::uint32_t queue_length(int fd) {
  tcp_info info{};
  socklen_t length = sizeof info;
  return ::getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &length) == 0 ? info.tcpi_unacked : 0;
}

}  // namespace

std::unexpected<config::Error> binding_failed(int error, const SocketAddress& vip) {
  auto failure = config::fail_errno(error, "binding " + vip.text());
  if (error == EADDRINUSE)
    failure.error().message += " (another program has it, or listens on all addresses: ss -tulnp shows it)";
  if (error == EADDRNOTAVAIL) failure.error().message += " (the VIP is not an address of this machine)";
  if (error == EACCES) failure.error().message += " (ports below 1024 take CAP_NET_BIND_SERVICE)";
  return failure;
}

void allow_vip_by_route(int fd, const SocketAddress& vip) {
  const int on = 1;
  if (vip.family() == AF_INET6) ::setsockopt(fd, IPPROTO_IPV6, IPV6_FREEBIND, &on, sizeof on);
}

config::Result<config::Fd> open_listening_socket(const config::Service& service, bool is_by_route) {
  const SocketAddress vip(service.vip, service.port);
  config::Fd socket(::socket(vip.family(), SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, IPPROTO_TCP));
  if (!socket) return config::fail_errno(errno, "socket");
  const int on = 1;
  ::setsockopt(socket.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  if (vip.family() == AF_INET6) ::setsockopt(socket.get(), IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof on);
  if (is_by_route) allow_vip_by_route(socket.get(), vip);
  // What is accepted inherits these.
  set_no_delay(socket.get());
  set_keep_alive(socket.get());
  if (::bind(socket.get(), vip.get(), vip.length) != 0) return binding_failed(errno, vip);
  // Another program may have the port by SO_REUSEADDR, and listen since.
  if (::listen(socket.get(), backlog) != 0) return binding_failed(errno, vip);
  return socket;
}

Listener::Listener(Worker& worker, const Workers& workers, Admission& admission, config::Fd socket,
                   std::shared_ptr<const Service> service, AllowedPointer allowed)
    : worker_(worker),
      workers_(workers),
      admission_(admission),
      socket_(worker.io()),
      service_(std::move(service)),
      allowed_(std::move(allowed)) {
  socket_.assign(socket.get());
  socket.release();
}

void Listener::wait() {
  socket_.async_wait(socket_.wait_read, [self = shared_from_this()](const boost::system::error_code& error) {
    if (!error) self->accept_queued();
  });
}

void Listener::accept_queued() {
  for (int i = 0; i < batch; ++i) {
    if (!admission_.take()) return pause();
    if (!accept_one()) {
      const int error = errno;
      admission_.give_back();
      if (is_of_one_client(error)) continue;
      if (error == EAGAIN || error == EWOULDBLOCK) break;
      return pause();
    }
  }
  wait();
}

bool Listener::accept_one() {
  Accepted accepted;
  accepted.client.length = sizeof accepted.client.storage;
  accepted.socket = config::Fd(::accept4(socket_.native_handle(), reinterpret_cast<sockaddr*>(&accepted.client.storage),
                                         &accepted.client.length, SOCK_NONBLOCK | SOCK_CLOEXEC));
  if (!accepted.socket) return false;
  if (!allowed_->contains(accepted.client)) {
    service_->state().denied.fetch_add(1, std::memory_order_relaxed);
    set_reset_on_close(accepted.socket.get());
    admission_.give_back();
    return true;
  }
  accepted.service = service_;
  Worker& target = least_loaded();
  if (&target == &worker_) {
    worker_.start(std::move(accepted));
  } else {
    target.take(std::move(accepted));
  }
  return true;
}

Worker& Listener::least_loaded() const {
  Worker* least = &worker_;
  for (const auto& worker : workers_) {
    if (worker->live() < least->live()) least = worker.get();
  }
  return *least;
}

/// No room, or no descriptors: what is queued waits in the kernel.
void Listener::pause() {
  worker_.when_there_is_room([self = shared_from_this()] {
    if (self->socket_.is_open()) self->accept_queued();
  });
}

void Listener::stop(bool accept_queued) {
  // What comes meanwhile as well, within bounds: clients may keep the queue full for ever.
  const std::uint32_t most = accept_queued ? queue_length(socket_.native_handle()) + batch : 0;
  for (std::uint32_t i = 0; i < most && admission_.take(); ++i) {
    if (accept_one()) continue;
    const int error = errno;
    admission_.give_back();
    if (!is_of_one_client(error)) break;
  }
  boost::system::error_code ignored;
  socket_.close(ignored);
}

}  // namespace userspace
