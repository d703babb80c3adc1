// SPDX-License-Identifier: BSD-2-Clause
//
// One proxied TCP connection: from the client that was accepted to a backend that takes it, until both have said all.
// It belongs to one Worker and runs in its thread, which deletes it once it has ended.
//
//        legs_[client]                                   legs_[backend]
//      ┌──────────────┐   directions_[client]  ───────►  ┌──────────────┐
//      │ accepted     │                                  │ connected    │
//      └──────────────┘  ◄───────  directions_[backend]  └──────────────┘
//
// Each direction reads one leg and writes the other. It holds bytes only while the other side takes none, and reads
// nothing more meanwhile: that is the back-pressure. Small messages go through the thread's buffer, bulk through a pipe
// (splice), so that an idle connection holds neither.
#pragma once

#include <boost/intrusive/list.hpp>
#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include "config/fd.h"
#include "fallback_proxy/deadlines.h"
#include "fallback_proxy/pipe_pool.h"
#include "fallback_proxy/service.h"

namespace userspace {

class Worker;

/// A connection that a listener has accepted. Non-blocking; has its place in the Admission.
struct Accepted {
  config::Fd socket;
  SocketAddress client;
  std::shared_ptr<const Service> service;
};

struct ListedTag;
using Listed = boost::intrusive::list_base_hook<boost::intrusive::tag<ListedTag>,
                                                boost::intrusive::link_mode<boost::intrusive::auto_unlink>>;

class Relay : public Waiting, public Listed {
 public:
  enum Side : std::uint8_t { client, backend_side };

  /// One of its two sockets. The address is what Worker::watch() gives to epoll.
  struct Leg {
    void close();

    Relay* relay;
    config::Fd socket = {};
    std::uint32_t watched = 0;  // EPOLL*: 0 when it is not watched yet
    Side side;
    bool waits_to_write = false;
    bool has_more = false;   // its end, an error or urgent data is behind what can be read: a short read was not all
    bool is_broken = false;  // writing failed: what it still sends is passed on, then the other side is reset
  };

  static void start(Worker& worker, Accepted accepted);
  ~Relay();  // by its worker

  const Service& service() const { return *service_; }
  /// Null while none is chosen.
  const BackendPointer& shared_backend() const { return backend_; }

  /// A reload: what is tried from now on is one of these backends. Nothing, when one has taken the connection.
  void change(const std::shared_ptr<const Service>& service);
  /// Ends it now: both sides see a reset. It may be gone when this returns.
  void end();
  /// What Worker::wait() was asked to wait for is due.
  void expire();
  /// The socket is ready for `events` (EPOLL*).
  void ready(Side side, std::uint32_t events);

 private:
  enum class Phase : std::uint8_t { connecting, open, delivering, closed };
  enum class Flushed : std::uint8_t { all, blocked, broken };

  /// Bytes that were read and that the other side did not take.
  struct Held {
    std::vector<char> bytes;
    std::size_t sent = 0;
  };

  struct Direction {
    std::unique_ptr<Held> held;
    std::optional<Pipe> pipe;  // while splicing
    std::uint32_t in_pipe = 0;
    std::uint32_t unreported = 0;  // bytes that the service's counter does not have yet
    std::uint8_t streak = 0;       // large reads in a row while copying, small ones while splicing
    bool can_splice = true;
    bool has_read_all = false;  // the reader's FIN has come
    bool is_finished = false;   // and has been passed on; or nothing is read any more
  };

  /// What is needed only until a backend has taken the connection.
  struct Attempt {
    SocketAddress client;
    std::vector<BackendPointer> tried;
  };

  Relay(Worker& worker, Accepted accepted);

  static Side other(Side side) { return side == client ? backend_side : client; }
  int fd(Side side) const { return legs_[side].socket.get(); }

  void try_backends();
  int connect_to(const Backend& backend);
  void attempt_failed(int error);
  void connect_outcome();
  void connected();
  bool send_proxy_header();

  bool watch(Side side, std::uint32_t events);
  void watch_for_reading();
  void wait_to_write(Side side);
  void go_on_later(Side side);
  void pump_what_is_ready(Side side, std::uint32_t events);

  void pump(Side from);
  std::int64_t receive(Side from);
  std::int64_t splice_in(Side from);
  void second_send_sets_no_delay();
  void hold(Side from, std::string_view bytes);
  Flushed flush(Side from);
  Flushed flush_held(Side from);
  Flushed flush_pipe(Side from);
  void adapt(Side from, std::int64_t size);
  void leave_splicing(Direction& direction);
  void count(Side from, std::size_t bytes);
  void report(Side from);
  void progress();

  void finish(Side from);
  void writing_failed(Side from);
  void reset_when_delivered(Side side);
  void keep_alive();
  void reset();
  void close();
  void release_if_closed();

  Worker& worker_;
  std::shared_ptr<const Service> service_;
  BackendPointer backend_;
  std::unique_ptr<Attempt> attempt_;
  Leg legs_[2] = {{.relay = this, .side = client}, {.relay = this, .side = backend_side}};
  Direction directions_[2];
  std::uint16_t checks_ = 0;  // of an undelivered end, without progress
  std::uint32_t undelivered_ = 0;
  Phase phase_ = Phase::connecting;
  std::uint8_t sends_ = 0;  // to the backend, as far as 2
  bool is_kept_alive_ = false;
};

}  // namespace userspace
