// SPDX-License-Identifier: BSD-2-Clause
//
// Lists and watches the Services and EndpointSlices of an API server, and keeps a Store current. Everything happens in
// the thread of its io_context.
#pragma once

#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kubernetes/access.h"
#include "kubernetes/exec.h"
#include "kubernetes/store.h"

namespace kubernetes {

/// What a client does when nobody says otherwise. Tests are less patient.
struct Pace {
  std::chrono::milliseconds first_pause{500};  // behind a failure; then twice as long each time, with chance
  std::chrono::milliseconds max_pause{30000};
  std::chrono::milliseconds max_silence{150000};  // of a watch that has brought bookmarks: one comes every minute
  std::chrono::seconds watch_time{300};           // that a watch lasts at least; up to twice
  std::chrono::seconds patience{30};              // with what should come at once
  std::chrono::milliseconds connect_time{4000};   // for one of several addresses, before the next is tried
  std::chrono::milliseconds proof{5000};          // a watch that lasts as long, or brings something, is one
  std::chrono::seconds exec_time{60};             // for a command that prints credentials
  std::size_t page = 500;                         // objects
  std::size_t max_objects = 200000;               // of a kind, in a list
};

struct Counts {
  std::uint64_t lists = 0;  // that came to their end
  std::uint64_t events = 0;
  std::uint64_t failures = 0;
  std::uint64_t bytes = 0;
};

class Client {
 public:
  struct Handlers {
    std::function<void()> changed;  // the store may have changed
    /// The server's addresses, each time before one of them is connected to.
    std::function<void(const std::vector<boost::asio::ip::tcp::endpoint>&)> resolved;
    std::function<void(bool is_error, const std::string&)> tell;  // a line for the log
  };

  /// Of one namespace; empty: all. `plugin`: for access.exec. The client has to live until `io` runs no more, and the
  /// store until then. Handlers are not called before create() has returned.
  static config::Result<std::unique_ptr<Client>> create(boost::asio::io_context& io, Access access,
                                                        std::shared_ptr<Plugin> plugin, const std::string& space,
                                                        const std::string& selector, const Pace& pace, Store& store,
                                                        Handlers handlers);
  virtual ~Client() = default;

  /// Both watches stand.
  [[nodiscard]] virtual bool is_current() const = 0;
  /// When that was so for the last time; the time of creation before.
  [[nodiscard]] virtual std::chrono::steady_clock::time_point last_current() const = 0;
  /// What the last attempt failed with; empty while all is well.
  [[nodiscard]] virtual std::string problem() const = 0;
  [[nodiscard]] virtual Counts counts() const = 0;
};

}  // namespace kubernetes
