// SPDX-License-Identifier: BSD-2-Clause
#include "kubernetes/resolver.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <netdb.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#include <atomic>
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <cerrno>
#include <charconv>
#include <csignal>
#include <cstring>
#include <system_error>
#include <thread>
#include <utility>

#include "config/fail.h"
#include "config/fd.h"
#include "config/printable.h"
#include "config/values.h"

namespace kubernetes {
namespace {

namespace asio = boost::asio;

/// The error of getaddrinfo(), or 0.
int look_up(const std::string& host, const std::string& port, Resolver::Endpoints& out) {
  const addrinfo hints{.ai_flags = AI_ADDRCONFIG | AI_NUMERICSERV,
                       .ai_family = AF_UNSPEC,
                       .ai_socktype = SOCK_STREAM,
                       .ai_protocol = IPPROTO_TCP,
                       .ai_addrlen = 0,
                       .ai_addr = nullptr,
                       .ai_canonname = nullptr,
                       .ai_next = nullptr};
  addrinfo* found = nullptr;
  const int error = ::getaddrinfo(host.c_str(), port.c_str(), &hints, &found);
  if (error != 0) return error;
  for (const addrinfo* one = found; one != nullptr; one = one->ai_next) {
    asio::ip::tcp::endpoint endpoint;
    if (one->ai_addrlen > endpoint.capacity()) continue;
    std::memcpy(endpoint.data(), one->ai_addr, one->ai_addrlen);
    endpoint.resize(one->ai_addrlen);
    out.push_back(endpoint);
  }
  ::freeaddrinfo(found);
  return 0;
}

}  // namespace

/// Owned by the thread that asks and by whoever waits for it: the thread may outlive them all.
struct Resolver::Question {
  config::Fd answered;  // readable then
  std::atomic<bool> is_answered = false;
  int error = 0;
  Endpoints endpoints;
};

Resolver::Resolver(asio::io_context& io, std::string host, std::string port)
    : io_(io), host_(std::move(host)), port_(std::move(port)) {}

Resolver::~Resolver() = default;

config::Result<void> Resolver::ask() {
  auto question = std::make_shared<Question>();
  question->answered = config::Fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!question->answered) return config::fail_errno(errno, "eventfd");
  // Signals are for the thread that this process began with.
  sigset_t all;
  sigset_t before;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  int error = 0;
  try {
    std::thread([question, host = host_, port = port_] {
      question->error = look_up(host, port, question->endpoints);
      question->is_answered = true;
      ::eventfd_write(question->answered.get(), 1);
    }).detach();
  } catch (const std::system_error& failure) {
    error = failure.code().value();
  }
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (error != 0) return config::fail_errno(error, "a thread that resolves names");
  question_ = std::move(question);
  return {};
}

asio::awaitable<config::Result<Resolver::Endpoints>> Resolver::resolve(std::chrono::milliseconds patience) {
  if (const auto address = config::parse_address(host_)) {
    std::uint16_t port = 0;
    std::from_chars(port_.data(), port_.data() + port_.size(), port);
    co_return Endpoints{{*address, port}};
  }
  if (!question_ || question_->is_answered) {
    if (const auto asked = ask(); !asked) co_return std::unexpected(asked.error());
  }
  const auto question = question_;
  config::Fd copy(::fcntl(question->answered.get(), F_DUPFD_CLOEXEC, 0));
  if (!copy) co_return config::fail_errno(errno, "dup");
  const auto answered = std::make_shared<asio::posix::stream_descriptor>(io_);
  boost::system::error_code error;
  answered->assign(copy.get(), error);
  if (error) co_return config::fail(-EIO, fmt::format("epoll: {}", error.message()));
  copy.release();
  asio::steady_timer deadline(io_, patience);
  deadline.async_wait([waiting = std::weak_ptr(answered)](const boost::system::error_code& cancelled) {
    boost::system::error_code ignored;
    if (const auto one = waiting.lock(); one && !cancelled) one->close(ignored);
  });
  co_await answered->async_wait(asio::posix::stream_descriptor::wait_read, asio::as_tuple(asio::use_awaitable));
  const std::string host = config::printable(host_);
  if (!question->is_answered)
    co_return config::fail(-ETIMEDOUT, fmt::format("{}: no name server answers in time", host));
  if (question->error != 0)
    co_return config::fail(-ENOENT, fmt::format("{}: {}", host, ::gai_strerror(question->error)));
  if (question->endpoints.empty()) co_return config::fail(-ENOENT, fmt::format("{}: it has no address", host));
  co_return question->endpoints;
}

}  // namespace kubernetes
