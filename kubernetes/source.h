// SPDX-License-Identifier: BSD-2-Clause
//
// The services of a cluster: what [kubernetes] asks for. Everything happens in the thread of its io_context.
#pragma once

#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
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
    /// All of this namespace was listed for the first time, with "" all of them: called before the changed() that has
    /// all of it.
    std::function<void(const std::string& space)> listed;
    /// What has changed since the last time, of what was listed: at first all that there is of it, also when that is
    /// nothing. One namespace without permission keeps no other from being served.
    std::function<void(std::vector<Change>)> changed;
    /// The API server's addresses, each time before one of them is connected to.
    std::function<void(const std::vector<boost::asio::ip::tcp::endpoint>&)> resolved;
    std::function<void(bool is_error, const std::string&)> tell;  // a line for the log
  };

  /// It has to live until `io` runs no more. Handlers are not called before create() has returned.
  static config::Result<std::unique_ptr<Source>> create(boost::asio::io_context& io, const config::Kubernetes& choices,
                                                        const Pace& pace, Handlers handlers);

  [[nodiscard]] SourceStatus status() const;

 private:
  struct Part {
    Part(std::string name, const config::Kubernetes& choices) : space(std::move(name)), store(choices) {}
    const std::string space;  // empty: all
    Store store;
    std::unique_ptr<Client> client;
    bool is_handed_on = false;
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
};

}  // namespace kubernetes
