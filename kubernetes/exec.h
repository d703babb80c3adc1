// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <boost/asio/awaitable.hpp>
#include <boost/asio/io_context.hpp>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>

#include "config/result.h"
#include "kubernetes/access.h"

namespace kubernetes {

/// Credentials that a command prints, for all who ask in the thread of its io_context, which is not waited in. It has
/// to live until `io` runs no more.
class Plugin {
 public:
  struct Issue {
    Credentials credentials;
    std::uint64_t number = 0;  // of this run of the command; grows
  };

  /// A run that takes more than `max_time` is ended.
  Plugin(boost::asio::io_context& io, Exec exec, std::chrono::milliseconds max_time);
  /// Ends what runs.
  ~Plugin();
  Plugin(const Plugin&) = delete;
  Plugin& operator=(const Plugin&) = delete;

  /// Those of the last run while they are valid; else the command is run, once for all who ask meanwhile. What it has
  /// started in its process group ends with it.
  boost::asio::awaitable<config::Result<Issue>> credentials();
  /// Whoever was given those of that run could do nothing with them: the next who asks gets others.
  void reject(std::uint64_t number);

 private:
  class Run;

  boost::asio::io_context& io_;
  const Exec exec_;
  const std::chrono::milliseconds max_time_;
  std::shared_ptr<Run> run_;  // that has not ended
  std::optional<Issue> issue_;
  std::uint64_t runs_ = 0;
};

}  // namespace kubernetes
