// SPDX-License-Identifier: BSD-2-Clause
//
// A thread of the proxy, with everything that its connections share: one event loop, one buffer, one pool of pipes.
#pragma once

#include <atomic>
#include <boost/asio/io_context.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/intrusive/list.hpp>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <thread>
#include <vector>

#include "config/fd.h"
#include "fallback_proxy/admission.h"
#include "fallback_proxy/datagrams.h"
#include "fallback_proxy/deadlines.h"
#include "fallback_proxy/flow.h"
#include "fallback_proxy/pipe_pool.h"
#include "fallback_proxy/relay.h"
#include "fallback_proxy/service.h"

namespace userspace {

/// What all threads are told at their start.
struct WorkerSettings {
  Clock::duration connect_timeout;
  Clock::duration idle_timeout;  // 0: none
  Clock::duration udp_timeout;
  std::size_t pipes = 0;  // at most so many
  std::size_t flows = 0;  // [limits] flows
};

class Worker {
 public:
  Worker(const WorkerSettings& settings, Admission& admission);
  ~Worker();
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  /// Ends the thread; the connections stay as they are until the object goes. For the thread that made it.
  void stop();

  // From any thread.

  /// Takes a connection over.
  void take(Accepted accepted);
  /// Runs `function` in this thread.
  void post(std::function<void()> function);
  /// Connections and UDP flows that this thread has or is about to have.
  std::uint32_t live() const { return live_.load(std::memory_order_relaxed); }
  /// The UDP flows among them.
  std::uint32_t flows() const { return flows_.load(std::memory_order_relaxed); }

  // In this thread only.

  boost::asio::io_context& io() { return io_; }
  std::span<char> buffer() { return buffer_; }
  PipePool& pipes() { return pipes_; }
  Random& random() { return random_; }
  const WorkerSettings& settings() const { return settings_; }

  void start(Accepted accepted);
  void add(Relay& relay);
  /// Calls relay.ready() when one of `events` (EPOLL*) begins to hold, and now if one does. False when the kernel has
  /// no room for that. Ends with the socket.
  bool watch(Relay::Leg& leg, std::uint32_t events);
  /// Deletes it, as soon as nothing can be reported of it any more.
  void release(Relay& relay);
  /// It has been deleted.
  void ended();

  enum class Wait : std::uint8_t { connecting, young, idle, half_closed, delivering };
  /// Calls relay.expire() once the time is over, unless it is told to wait for something else before.
  void wait(Relay& relay, Wait what);

  /// `function` may end the one that it is given.
  void for_each_relay(const std::function<void(Relay&)>& function);

  Datagrams& datagrams();
  /// A place for a UDP flow: a free one, or that of this thread's flow which has been idle for longest. False when this
  /// thread has none to give up.
  bool take_flow();
  /// Its place is free.
  void flow_ended();
  /// Has `other` give up a flow for one of this thread's, soon.
  void ask_for_place(Worker& other);
  /// Something has come or gone: calls flow.expire() when that has been `udp_timeout` ago.
  void wait(Flow& flow);
  /// From now on flows end when they have been idle for a second.
  void drain_flows();
  void end_flows();

  /// Descriptors ran out although there was room for the connection (other processes can use up the system's): the
  /// descriptor that is kept for this moment is given up, once. False when it is already.
  bool release_reserve();

  /// Calls `resume` as soon as a connection of this thread has ended, or in 100 ms.
  void when_there_is_room(std::function<void()> resume);

 private:
  void wait_for_relays();
  void run_ready_relays();
  void arm(Clock::time_point due);
  void expire();
  template <class Item>
  void expire(Deadlines<Item>& deadlines, Clock::time_point now);
  Flow* idlest_flow();
  bool give_up_flow();
  void has_room();
  void resume_accepting();

  boost::asio::io_context io_;
  boost::asio::executor_work_guard<boost::asio::io_context::executor_type> work_;
  const WorkerSettings settings_;
  Admission& admission_;
  std::atomic<std::uint32_t> live_ = 0;
  std::atomic<std::uint32_t> flows_ = 0;
  std::vector<char> buffer_;
  std::unique_ptr<Datagrams> datagrams_;  // once there is a UDP service
  PipePool pipes_;
  Random random_;
  config::Fd reserve_;
  // NOLINTNEXTLINE(modernize-use-default-member-init): the times are the settings'
  Deadlines<Relay> deadlines_[5];
  Deadlines<Flow> idle_flows_;
  Deadlines<Flow> draining_flows_;
  bool is_draining_flows_ = false;
  std::uint32_t places_ = 0;  // for flows, from other threads
  bool asks_for_place_ = false;
  boost::asio::steady_timer timer_;
  std::optional<Clock::time_point> armed_;
  boost::asio::steady_timer pause_;
  std::vector<std::function<void()>> paused_;
  boost::asio::posix::stream_descriptor epoll_;  // watches the relays' sockets
  bool is_running_relays_ = false;
  using Relays =
      boost::intrusive::list<Relay, boost::intrusive::base_hook<Listed>, boost::intrusive::constant_time_size<false>>;
  Relays relays_;
  Relays ended_relays_;
  std::thread thread_;
};

}  // namespace userspace
