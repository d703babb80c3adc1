// SPDX-License-Identifier: BSD-2-Clause
//
// The control socket of the daemon: a request a line, an answer a line, both JSON objects. After "trace" a
// line follows for each decision; see fallback_proxy/hand_over.h for what follows "take_over". Used by the control
// thread only.
#pragma once

#include <boost/asio/awaitable.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <boost/json/object.hpp>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "config/fail.h"
#include "config/fd.h"
#include "fallback_proxy/hand_over.h"

namespace run {

/// What the server wants of the program.
struct ControlHandlers {
  std::function<boost::json::object()> status;
  /// Hands each decision to `tell`, as a JSON object, until what is returned goes.
  std::function<config::Result<std::shared_ptr<void>>(std::function<void(const boost::json::object&)> tell)> trace;
  /// Until the end of the hand-over, no socket of the offer is closed. An error: this is no moment for it.
  std::function<config::Result<userspace::Offer>()> begin_hand_over;
  /// `is_taken`: the other process serves from now on. Otherwise nothing has changed.
  std::function<void(bool is_taken)> end_hand_over;
};

class ControlServer {
 public:
  /// `listening`: of listen_control(), or inherited. The file is removed in the end, unless the socket has been handed
  /// over.
  ControlServer(boost::asio::io_context& io, config::Fd listening, std::string path, ControlHandlers handlers);
  ~ControlServer();
  ControlServer(const ControlServer&) = delete;
  ControlServer& operator=(const ControlServer&) = delete;

 private:
  using Socket = boost::asio::local::stream_protocol::socket;
  struct Session;

  boost::asio::awaitable<void> accept();
  boost::asio::awaitable<void> converse(std::shared_ptr<Session> session);
  boost::asio::awaitable<void> trace(std::shared_ptr<Session> session);
  boost::asio::awaitable<void> hand_over(Session& session, std::int64_t protocol);
  boost::asio::awaitable<config::Result<void>> offer(Session& session, const userspace::Offer& offer);

  boost::asio::local::stream_protocol::acceptor acceptor_;
  const std::string path_;
  const ControlHandlers handlers_;
  const std::shared_ptr<void> sessions_ = std::make_shared<char>();  // each session shares it: that is their number
  std::optional<Socket> successor_;  // open until this process ends: that is how the successor sees the end
};

}  // namespace run
