// SPDX-License-Identifier: BSD-2-Clause
#include "run/control_server.h"

#include <fmt/format.h>
#include <sys/socket.h>
#include <unistd.h>

#include <boost/asio/as_tuple.hpp>
#include <boost/asio/buffer.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/read_until.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/asio/write.hpp>
#include <boost/json.hpp>
#include <cerrno>
#include <chrono>
#include <string_view>
#include <utility>

namespace run {
namespace {

using boost::asio::awaitable;
using Clock = std::chrono::steady_clock;
using namespace std::chrono_literals;

// Only the user's own processes and root's can connect. The bounds are for those that hang or run wild: what one of
// them costs is little, and is over soon.
constexpr long max_sessions = 16;
constexpr std::string_view turned_away =
    "{\"error\":\"16 others ask it already, with trace for the most part: end some\"}\n";
constexpr std::size_t max_request = 4096;  // bytes
constexpr auto request_time = 10s;         // for a request to come, and for its answer to be taken
constexpr auto hand_over_time = 60s;       // for the other process to be ready
constexpr auto pause_time = 100ms;         // when accepting fails, as it does without descriptors
constexpr std::size_t max_untold = 8192;   // decisions that a tracer may be behind; what comes then is lost to it

constexpr auto use_tuple = boost::asio::as_tuple(boost::asio::use_awaitable);

struct Request {
  std::string name;  // empty: it was none
  std::int64_t protocol = 0;
};

Request parse_request(std::string_view line) {
  boost::system::error_code error;
  const auto value = boost::json::parse(line, error);
  if (error || !value.is_object()) return {};
  Request request;
  const auto& object = value.as_object();
  if (const auto* name = object.if_contains("request"); name != nullptr && name->is_string())
    request.name = name->as_string();
  if (const auto* protocol = object.if_contains("protocol"); protocol != nullptr && protocol->is_int64())
    request.protocol = protocol->as_int64();
  return request;
}

}  // namespace

struct ControlServer::Session : std::enable_shared_from_this<Session> {
  Session(Socket accepted, std::shared_ptr<void> one_more)
      : socket(std::move(accepted)), deadline(socket.get_executor()), token(std::move(one_more)) {}

  /// Whatever is being waited for after `time` fails.
  void limit(Clock::duration time) {
    deadline.expires_after(time);
    deadline.async_wait([weak = weak_from_this()](const boost::system::error_code& error) {
      const auto self = weak.lock();
      if (error || !self || self->deadline.expiry() > Clock::now()) return;
      self->socket.cancel();
      self->limit(1s);  // again: what was waited for may have come at this moment, and more is waited for then
    });
  }

  /// The next line; empty when there is none.
  awaitable<std::string> read_line() {
    const auto [error, length] =
        co_await boost::asio::async_read_until(socket, boost::asio::dynamic_buffer(text, max_request), '\n', use_tuple);
    if (error == boost::asio::error::not_found)
      co_await fail(fmt::format("a request has at most {} bytes", max_request));
    if (error) co_return std::string();
    std::string line = text.substr(0, length);
    text.erase(0, length);
    co_return line;
  }

  void limit_nothing() { deadline.expires_at(Clock::time_point::max()); }

  awaitable<bool> write(boost::json::object object) {
    const std::string line = serialize(object) + "\n";
    co_return co_await write(line);
  }

  awaitable<bool> write(std::string_view line) {
    const auto [error, length] = co_await boost::asio::async_write(socket, boost::asio::buffer(line), use_tuple);
    co_return !error;
  }

  awaitable<bool> fail(std::string_view message) {
    boost::json::object object{{"error", message}};
    return write(std::move(object));
  }

  Socket socket;
  boost::asio::steady_timer deadline;
  std::shared_ptr<void> token;  // counts it
  std::string text;             // received, and not yet read
};

ControlServer::ControlServer(boost::asio::io_context& io, config::Fd listening, std::string path,
                             ControlHandlers handlers)
    : acceptor_(io, boost::asio::local::stream_protocol(), listening.release()),
      path_(std::move(path)),
      handlers_(std::move(handlers)) {
  co_spawn(io, accept(), boost::asio::detached);
}

ControlServer::~ControlServer() {
  // While the socket is still open: who finds neither makes both anew.
  if (!successor_) ::unlink(path_.c_str());
}

awaitable<void> ControlServer::accept() {
  boost::asio::steady_timer pause(acceptor_.get_executor());
  for (;;) {
    const auto [error] = co_await acceptor_.async_wait(acceptor_.wait_read, use_tuple);
    if (error) co_return;
    config::Fd accepted(::accept4(acceptor_.native_handle(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (!accepted) {
      pause.expires_after(pause_time);
      co_await pause.async_wait(use_tuple);
      continue;
    }
    if (sessions_.use_count() > max_sessions) {
      ::send(accepted.get(), turned_away.data(), turned_away.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
      continue;
    }
    Socket socket(acceptor_.get_executor());
    boost::system::error_code unwatched;  // epoll has no room
    socket.assign(boost::asio::local::stream_protocol(), accepted.get(), unwatched);
    if (unwatched) continue;
    accepted.release();
    co_spawn(acceptor_.get_executor(), converse(std::make_shared<Session>(std::move(socket), sessions_)),
             boost::asio::detached);
  }
}

awaitable<void> ControlServer::converse(std::shared_ptr<Session> session) {
  for (;;) {
    session->limit(request_time);
    const std::string line = co_await session->read_line();
    if (line.empty()) co_return;
    const Request request = parse_request(line);
    if (request.name == "take_over") co_return co_await hand_over(*session, request.protocol);
    if (request.name == "trace") co_return co_await trace(session);
    bool is_written = false;
    if (request.name == "status")
      is_written = co_await session->write(handlers_.status());
    else
      is_written =
          co_await session->fail("a request is \"status\", \"trace\" or \"take_over\", in a JSON object on one line");
    if (!is_written) co_return;
  }
}

awaitable<void> ControlServer::trace(std::shared_ptr<Session> session) {
  // Shared with what is called for each decision, and with what waits for the end of the connection.
  struct Untold {
    explicit Untold(const Socket::executor_type& executor) : news(executor, Clock::time_point::max()) {}
    std::string lines;
    std::size_t count = 0;
    std::uint64_t lost = 0;
    bool is_over = false;
    boost::asio::steady_timer news;  // cancelled when there are some
  };
  const auto untold = std::make_shared<Untold>(session->socket.get_executor());
  const auto subscription = handlers_.trace([untold](const boost::json::object& decision) {
    if (untold->count == max_untold) {
      ++untold->lost;
      return;
    }
    untold->lines += serialize(decision) + "\n";
    ++untold->count;
    untold->news.cancel();
  });
  if (!subscription) {
    co_await session->fail(subscription.error().message);
    co_return;
  }
  // A tracer says nothing more: what can be read is its end.
  session->socket.async_wait(Socket::wait_read, [untold](const boost::system::error_code&) {
    untold->is_over = true;
    untold->news.cancel();
  });
  boost::json::object begun{{"tracing", true}};
  bool is_written = co_await session->write(std::move(begun));
  while (is_written && !untold->is_over) {
    if (untold->count == 0) {
      session->limit_nothing();
      co_await untold->news.async_wait(use_tuple);
      continue;
    }
    std::string lines = std::exchange(untold->lines, {});
    if (untold->lost > 0) lines += fmt::format("{{\"lost\":{}}}\n", std::exchange(untold->lost, 0));
    untold->count = 0;
    session->limit(request_time);
    is_written = co_await session->write(lines);
  }
}

awaitable<void> ControlServer::hand_over(Session& session, std::int64_t protocol) {
  if (protocol != userspace::hand_over_protocol) {
    co_await session.fail(
        fmt::format("it speaks version {} of the hand-over, not version {}", userspace::hand_over_protocol, protocol));
    co_return;
  }
  const auto offered = handlers_.begin_hand_over();
  if (!offered) {
    co_await session.fail(offered.error().message);
    co_return;
  }
  session.limit(hand_over_time);
  const auto taken = co_await offer(session, *offered);
  if (taken) {
    // The new process accepts at the same socket.
    acceptor_.close();
    handlers_.end_hand_over(true);
    session.limit(request_time);
    boost::json::object answer{{"handed_over", true}};
    co_await session.write(std::move(answer));
    successor_ = std::move(session.socket);
  } else {
    handlers_.end_hand_over(false);
    session.limit(request_time);
    co_await session.fail(taken.error().message);
  }
}

awaitable<config::Result<void>> ControlServer::offer(Session& session, const userspace::Offer& offer) {
  for (const userspace::Message& message : userspace::messages(offer, acceptor_.native_handle(), CLUSTERIP_VERSION)) {
    std::string_view bytes = message.line;
    std::span<const int> descriptors = message.descriptors;
    while (!bytes.empty()) {
      const ssize_t sent = userspace::send_with_descriptors(session.socket.native_handle(), bytes, descriptors);
      if (sent < 0 && errno == EAGAIN) {
        const auto [error] = co_await session.socket.async_wait(session.socket.wait_write, use_tuple);
        if (error) co_return config::fail(-ETIMEDOUT, "the sockets were not taken in time");
      } else if (sent < 0) {
        co_return config::fail_errno(errno, "handing sockets over");
      } else {
        bytes.remove_prefix(static_cast<std::size_t>(sent));
        descriptors = {};  // they have gone with the first byte
      }
    }
  }
  if (parse_request(co_await session.read_line()).name != "ready")
    co_return config::fail(-EPROTO, "the process that was to take over was not ready in time");
  co_return config::Result<void>{};
}

}  // namespace run
