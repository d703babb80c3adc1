// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <boost/asio/io_context.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/json/object.hpp>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <string>

#include "config/fail.h"
#include "run/fast_path.h"

namespace run {

/// A decision of the kernel, as `clusterip trace --json` prints it: docs/cli.md.
boost::json::object to_json(const clusterip_event& event);

/// "service virtual_svc2 192.10.100.100:5201 -> 10.244.105.222:5201, 1 of 3 backends, iperf3[116306]": the same for
/// people. Throws boost::system::system_error where something is missing.
std::string to_line(const boost::json::object& decision);

/// The decisions of the fast path, for whoever wants to hear them. While nobody does, the kernel writes none; and when
/// this process dies, it stops by itself. Used by one thread.
class Decisions {
 public:
  using Tell = std::function<void(const boost::json::object&)>;

  explicit Decisions(boost::asio::io_context& io) : descriptor_(io), renewal_(io) {}
  ~Decisions();
  Decisions(const Decisions&) = delete;
  Decisions& operator=(const Decisions&) = delete;

  /// Calls `tell` for each decision until what is returned goes. `fast_path` null: there are none.
  config::Result<std::shared_ptr<void>> subscribe(FastPath* fast_path, Tell tell);

  /// It has loaded a configuration: events may come by another descriptor.
  void fast_path_changed();

  /// Events that nobody read in time, since the fast path was first loaded; as of the last event.
  std::uint64_t lost() const { return lost_; }

 private:
  config::Result<void> renew();
  config::Result<void> watch(int events);
  void wait();
  void hand_out();

  FastPath* fast_path_ = nullptr;  // while there are subscribers
  std::shared_ptr<std::list<Tell>> subscribers_ = std::make_shared<std::list<Tell>>();
  boost::asio::posix::stream_descriptor descriptor_;  // a copy of the fast path's
  boost::asio::steady_timer renewal_;
  int watched_ = -1;  // what it is a copy of
  std::uint64_t lost_ = 0;
  bool is_first_ = true;  // event of these subscribers: what was lost before is not theirs
};

}  // namespace run
