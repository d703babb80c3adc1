// SPDX-License-Identifier: BSD-2-Clause
//
// The metrics in Prometheus' text format 0.0.4. Names and labels are a contract: docs/metrics.md.
#pragma once

#include <boost/asio/awaitable.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/beast/core/tcp_stream.hpp>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>

#include "config/fail.h"
#include "config/fd.h"
#include "run/status.h"

namespace run {

/// What /metrics answers.
std::string to_metrics(const Status& status);

class Metrics {
 public:
  /// Serves http://`listen`/metrics by a thread of its own, until the end of the object, which has to come in the
  /// thread of `control`; `status` is called there, too. -EADDRINUSE and the like: another program has the port.
  static config::Result<std::unique_ptr<Metrics>> serve(boost::asio::io_context& control, const std::string& listen,
                                                        std::function<Status()> status);
  ~Metrics();
  Metrics(const Metrics&) = delete;
  Metrics& operator=(const Metrics&) = delete;

 private:
  Metrics(boost::asio::io_context& control, config::Fd listening, boost::asio::ip::tcp protocol,
          std::function<Status()> status);

  boost::asio::awaitable<void> accept();
  boost::asio::awaitable<void> answer(boost::beast::tcp_stream client, std::shared_ptr<void> one_more);
  boost::asio::awaitable<std::optional<Status>> ask();

  boost::asio::io_context& control_;
  const std::function<Status()> status_;
  boost::asio::io_context io_{1};
  boost::asio::ip::tcp::acceptor acceptor_;
  const std::shared_ptr<void> sessions_ = std::make_shared<char>();  // each scrape shares it: that is their number
  const std::shared_ptr<void> alive_ = std::make_shared<char>();     // goes with the object
  std::jthread thread_;
};

}  // namespace run
