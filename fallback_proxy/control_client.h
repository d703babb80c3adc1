// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <sys/types.h>

#include <boost/json/object.hpp>
#include <boost/system/system_error.hpp>
#include <deque>
#include <exception>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "config/fail.h"
#include "config/fd.h"

namespace userspace {

/// A connection to the control socket of another process. Each call blocks, for ten seconds without a byte at most.
/// Errors name the other process.
class ControlClient {
 public:
  /// Nothing where nobody listens: there is no such file, or a killed process has left it.
  static config::Result<std::optional<ControlClient>> connect(const std::string& path);

  /// Of the other process; 0 where it is in another PID namespace.
  pid_t pid() const { return pid_; }

  config::Result<void> send(const boost::json::object& request);
  /// The next line. {"error": "..."} is a failure with the code -EREMOTEIO, the end of the connection one with -EPIPE.
  config::Result<boost::json::object> receive();
  config::Result<boost::json::object> ask(const boost::json::object& request);

  /// What `read` makes of what has been received. The other process may be of another version: where a key is not there
  /// or a value is of another kind, Boost.JSON throws, and the error says so.
  template <typename Read>
  config::Result<std::invoke_result_t<Read>> understand(Read read) const;

  /// From now on, receive() waits for as long as it takes.
  void wait_for_ever();

  /// The first of the descriptors that have come and that nobody has taken yet. They come before the end of the line
  /// that they belong to.
  std::optional<config::Fd> take_descriptor();

  /// The connection itself.
  config::Fd release() { return std::move(socket_); }

 private:
  ControlClient(config::Fd socket, pid_t pid) : socket_(std::move(socket)), pid_(pid) {}
  config::Result<void> receive_more();
  std::string who() const;
  std::unexpected<config::Error> not_understood(const std::exception& error) const;

  config::Fd socket_;
  pid_t pid_;
  std::string text_;  // received, and not yet returned
  std::deque<config::Fd> descriptors_;
};

template <typename Read>
config::Result<std::invoke_result_t<Read>> ControlClient::understand(Read read) const {
  try {
    return read();
  } catch (const boost::system::system_error& error) {
    return not_understood(error);
  } catch (const std::logic_error& error) {  // which of the two it is depends on Boost's version, too
    return not_understood(error);
  }
}

}  // namespace userspace
