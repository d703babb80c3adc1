// SPDX-License-Identifier: BSD-2-Clause
#include "fallback_proxy/flow.h"

#include <cerrno>
#include <utility>

#include "fallback_proxy/udp_listener.h"
#include "fallback_proxy/worker.h"

namespace userspace {
namespace {

using namespace std::chrono_literals;

// A backend that always has more to say lets others have their turn after so many reads.
constexpr int rounds = 4;

// A backend that has neither answered nor refused for so long is one that never answers (syslog, metrics).
constexpr auto answer_time = 1s;

}  // namespace

Flow::Flow(Worker& worker, std::shared_ptr<UdpListener> listener, const UdpClient& client, BackendPointer backend,
           Socket socket)
    : worker_(worker),
      listener_(std::move(listener)),
      client_(client),
      backend_(std::move(backend)),
      socket_(std::move(socket)) {
  backend_->live.fetch_add(1, std::memory_order_relaxed);
}

void Flow::start() {
  worker_.wait(*this);
  wait();
}

void Flow::wait() {
  socket_.async_wait(socket_.wait_read, [self = shared_from_this()](const boost::system::error_code&) {
    if (self->socket_.is_open()) self->receive();
  });
}

std::size_t Flow::send(std::size_t begin, std::size_t end) {
  const Datagrams::Sent sent = worker_.datagrams().send(socket_.native_handle(), begin, end, nullptr);
  listener_->count_received(sent);
  if (sent.next < end) {
    refused();
  } else {
    worker_.wait(*this);
    if (Clock::now() - began_ >= answer_time) reached();
  }
  return sent.next;
}

void Flow::receive() {
  bool has_refused = false;
  for (int round = 0; round < rounds; ++round) {
    const std::size_t count = worker_.datagrams().receive(socket_.native_handle());
    if (count > 0) {
      reached();
      listener_->reply(count, client_);
      worker_.wait(*this);
      if (count < Datagrams::most) break;
    } else if (errno == ECONNREFUSED) {
      has_refused = true;  // what the backend has sent before is still there
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      break;
    }
  }
  if (has_refused) return refused();
  wait();
}

void Flow::reached() {
  if (std::exchange(has_reached_, true)) return;
  listener_->service().reached(*backend_);
}

void Flow::refused() {
  has_reached_ = true;  // it has not, and close() shall not think so
  listener_->service().failed(*backend_, ECONNREFUSED, Clock::now(), began_);
  end();
}

void Flow::end() {
  close();
  worker_.flow_ended();
}

void Flow::give_up() { close(); }

void Flow::close() {
  if (Clock::now() - began_ >= answer_time) reached();
  if (is_linked()) unlink();
  boost::system::error_code ignored;
  socket_.close(ignored);
  backend_->live.fetch_sub(1, std::memory_order_relaxed);
  listener_->forget(client_);
}

}  // namespace userspace
