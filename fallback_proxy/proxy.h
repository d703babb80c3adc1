// SPDX-License-Identifier: BSD-2-Clause
//
// The control side of the proxy: turns a configuration into listeners, routes and threads, and a later one into changes
// of these. Used by the control thread only; what it tells the workers travels by post.
#pragma once

#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "config/config.h"
#include "config/fail.h"
#include "config/fd.h"
#include "fallback_proxy/address_watch.h"
#include "fallback_proxy/admission.h"
#include "fallback_proxy/listener.h"
#include "fallback_proxy/local_vips.h"
#include "fallback_proxy/service.h"
#include "fallback_proxy/status.h"
#include "fallback_proxy/udp_listener.h"
#include "fallback_proxy/worker.h"

namespace userspace {

/// What does not work although the configuration is right, in words for the log: "service web: binding ...".
using Problems = std::vector<std::string>;

class Proxy {
 public:
  /// Threads, timeouts and limits are those of `first`, for good.
  Proxy(boost::asio::io_context& control, const config::Config& first);
  ~Proxy();
  Proxy(const Proxy&) = delete;
  Proxy& operator=(const Proxy&) = delete;

  /// Makes `config` what is served, in place: connections go on. All its services, whatever their `engine`, which is
  /// for the caller to judge. Each service that cannot be served is a problem of its own, the others are served.
  Problems apply(config::Config config);

  /// What a health check says of a backend: active or down. For new connections, at once, until it says something else
  /// or apply() brings other states. Does nothing for what is not served, or drains. A service whose last backend is
  /// down refuses as one without a backend does, unless it has `panic`; its connections go on.
  void set_backend_state(const std::string& service, const config::Address& address, std::uint16_t port,
                         config::BackendState state);

  /// Waits until the workers have done what they were asked, a second at most: from then on, no connection is given
  /// away by what was in force before. A service that comes back right after it has left is served only then, when its
  /// old socket is closed.
  void wait_for_workers();

  /// Accepts nothing more, and calls `done` when the last connection has ended; what is left after `drain_timeout` is
  /// reset.
  void drain(std::function<void()> done);

  /// What another process has bound for its services, instead of sockets of the first configuration's own; what that
  /// does not want is closed. `vips` stay local until predecessor_has_ended(), and draining waits for it.
  void inherit(std::map<SocketName, config::Fd> sockets, std::vector<config::Address> vips);
  void predecessor_has_ended();

  /// From now on the VIPs are another process's to make local, also after the end of this one, unless
  /// cancel_hand_over() takes them back.
  void begin_hand_over();
  void cancel_hand_over();
  /// The sockets of the services. They are this object's, until the next apply() or drain().
  std::vector<std::pair<SocketName, int>> sockets() const;
  /// The VIPs that must be local for what is served, and for connections.
  std::vector<config::Address> vips() const;

  Status status() const;

  std::size_t services() const { return in_order_.size(); }
  /// Those that have a socket, or no active backend to need one for.
  std::size_t serving() const;
  std::size_t connections() const;

 private:
  /// One service across reloads.
  struct Served {
    std::shared_ptr<ServiceState> state = std::make_shared<ServiceState>();
    std::shared_ptr<const Service> service;
    std::vector<std::weak_ptr<const Service>> earlier;  // that connections may still have
    Worker* worker = nullptr;                           // of the listener
    std::shared_ptr<Listener> listener;                 // of TCP
    std::shared_ptr<UdpListener> udp_listener;          // of UDP
    std::string problem;                                // why it is not served
    bool waits_for_socket = false;                      // that it had before to be closed
  };

  /// A VIP that no service has any more: local until the last connection to it has ended.
  struct Leaving {
    config::Address vip;
    std::vector<std::weak_ptr<const Service>> services;
  };

  /// What a change asks of each worker: one post each, however many services there are.
  class Posts;

  std::shared_ptr<const Service> next_service(config::Service settings, Served& served);
  void update(Served& served, std::shared_ptr<const Service> next, Posts& posts);
  bool is_by_route(const config::Address& vip) const;
  config::Result<config::Fd> socket_for(const Service& service);
  void open_listener(Served& served, Posts& posts);
  void listener_closed(const SocketName& name, std::uint64_t number);
  void open_waiting(Served& served);
  void close_listener(Served& served, bool accept_queued, Posts& posts);
  void leave_backends(const Service& before, const std::shared_ptr<const Service>& after, Posts& posts);
  Worker& next_worker();
  std::vector<config::Address> vips_to_serve() const;
  Problems make_vips_local();
  Problems late_changes(const config::Userspace& next) const;
  void wait_for_vips(Clock::duration pause);
  void open_missing_listeners();
  void route_removed();
  void add_removed_routes();
  ServiceStatus status_of(const Served& served) const;
  static std::string problem_of(const Served& served);
  void watch_leaving();
  void allow();
  void wait_for_end(Clock::time_point until, std::function<void()> done);

  const std::chrono::system_clock::time_point since_ = std::chrono::system_clock::now();
  boost::asio::io_context& control_;
  const config::Userspace first_;  // some of it holds for good
  config::Userspace userspace_;    // as the last configuration has it
  Admission admission_;
  Workers workers_;
  std::size_t next_worker_ = 0;
  AllowedPointer allowed_;
  AddressWatch addresses_;
  std::optional<LocalVips> local_vips_;
  std::map<config::Address, std::string> vip_problems_;  // why it is not local by our doing
  std::string vips_problem_;                             // the same for all of them
  std::map<SocketName, config::Fd> inherited_;           // and not used yet
  std::vector<config::Address> predecessor_vips_;        // that it has made local
  bool is_handing_over_ = false;
  bool has_given_vips_up_ = false;  // with the hand-over
  boost::asio::steady_timer vips_timer_;
  boost::asio::steady_timer repair_timer_;
  bool is_repairing_ = false;
  Clock::duration repair_pause_;
  Clock::time_point last_repair_;
  bool is_draining_ = false;
  bool is_drain_over_ = false;
  struct State {
    std::string service;
    config::Address address;
    std::uint16_t port;
    config::BackendState state;
  };
  std::vector<State> held_states_;  // while nothing may change
  std::map<SocketName, Served> served_;
  std::vector<Served*> in_order_;  // of the configuration
  std::unordered_map<std::string, Served*> by_name_;
  std::map<SocketName, std::set<std::uint64_t>> closing_;  // sockets that their workers have yet to close
  std::uint64_t closings_ = 0;                             // so far: each has its number
  std::vector<Leaving> leaving_;
  boost::asio::steady_timer leaving_timer_;
  boost::asio::steady_timer drain_timer_;
  std::atomic<std::size_t> workers_accepting_ = 0;                          // while draining
  const std::shared_ptr<const bool> alive_ = std::make_shared<bool>(true);  // what workers post may come later
};

}  // namespace userspace
