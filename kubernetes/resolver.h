// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <boost/asio/awaitable.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "config/result.h"

namespace kubernetes {

/// The addresses of one host. The system's resolver takes its time, minutes with name servers that are silent, and
/// cannot be interrupted: it runs in a thread of its own, once for all who ask meanwhile, and nobody waits for its end.
class Resolver {
 public:
  using Endpoints = std::vector<boost::asio::ip::tcp::endpoint>;

  Resolver(boost::asio::io_context& io, std::string host, std::string port);
  ~Resolver();
  Resolver(const Resolver&) = delete;
  Resolver& operator=(const Resolver&) = delete;

  /// In the thread of `io`, for at most so long.
  boost::asio::awaitable<config::Result<Endpoints>> resolve(std::chrono::milliseconds patience);

 private:
  struct Question;

  config::Result<void> ask();

  boost::asio::io_context& io_;
  const std::string host_;
  const std::string port_;
  std::shared_ptr<Question> question_;  // the last one
};

}  // namespace kubernetes
