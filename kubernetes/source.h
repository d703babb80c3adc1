// SPDX-License-Identifier: BSD-2-Clause
//
// The services of a cluster: what [kubernetes] asks for. Everything happens in the thread of its io_context.
#pragma once

#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <chrono>
#include <functional>
#include <list>
#include <memory>
#include <string>
#include <vector>

#include "kubernetes/client.h"
#include "kubernetes/store.h"

namespace kubernetes {

struct SourceStatus {
  std::string server;
  bool is_complete = false;  // all was listed once
  bool is_current = false;   // all is being watched
  std::chrono::steady_clock::time_point last_current;
  std::string problem;
  std::size_t services = 0;  // objects, those that are none of ours included
  std::size_t slices = 0;
  Counts counts;
};

class Source {
 public:
  struct Handlers {
    /// What has changed since the last time. Not before all was listed: then it is all there is, also when that is
    /// nothing.
    std::function<void(std::vector<Change>)> changed;
    std::function<void(bool is_error, const std::string&)> tell;  // a line for the log
  };

  /// It has to live until `io` runs no more.
  static config::Result<std::unique_ptr<Source>> create(boost::asio::io_context& io, const config::Kubernetes& choices,
                                                        const Pace& pace, Handlers handlers);

  [[nodiscard]] SourceStatus status() const;

 private:
  struct Part {
    explicit Part(const config::Kubernetes& choices) : store(choices) {}
    Store store;
    std::unique_ptr<Client> client;
  };

  Source(boost::asio::io_context& io, Handlers handlers) : handlers_(std::move(handlers)), coalescing_(io) {}
  void note_change();
  void hand_on();
  [[nodiscard]] bool is_complete() const;

  const Handlers handlers_;
  std::string server_;
  std::list<Part> parts_;  // one for each namespace, or one for all
  boost::asio::steady_timer coalescing_;
  bool is_waiting_ = false;
  bool has_handed_on_ = false;
};

}  // namespace kubernetes
