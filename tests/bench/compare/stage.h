// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <sys/types.h>

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>

#include "tests/support/cgroup.h"
#include "tests/support/fd.h"
#include "tests/support/other_host.h"
#include "tests/support/process.h"

namespace bench {

inline constexpr double not_measured = std::numeric_limits<double>::quiet_NaN();
inline constexpr std::size_t most_columns = 4;

/// What one turn has measured.
struct Figures {
  std::array<double, most_columns> values = {not_measured, not_measured, not_measured, not_measured};
  double others = not_measured;  // CPUs that everybody else on the machine kept busy meanwhile
  std::uint64_t failures = 0;
};

/// Ctrl-C, or somebody else's wish that this program end.
struct Interrupted : std::runtime_error {
  Interrupted() : std::runtime_error("interrupted") {}
};

/// From now on SIGINT, SIGTERM and SIGHUP make whoever waits for a stage throw Interrupted.
void catch_interrupts();

/// Where a stage may write: a file system in memory that ends with it.
inline constexpr const char* scratch = "/mnt";

/// What the process on a stage has around it.
class Place {
 public:
  /// `veth`: the backends are in a network namespace of their own, at the far end of a virtual cable; else in this one.
  Place(const std::string& congestion_control, bool veth, const support::Cgroup& cgroup);

  /// Whatever makes sockets in there makes them where the backends are.
  void at_the_backends(const std::function<void()>& body) const;

  /// Of the clients. Not entered yet, so that what is made before belongs to nobody whom the fast path serves.
  const support::Cgroup& cgroup() const { return cgroup_; }

 private:
  std::unique_ptr<support::OtherHost> other_host_;
  const support::Cgroup& cgroup_;
};

/// What the kernel charges for this process, and for what it starts: its own pages and the kernel's, from when this
/// object was made. Needs the memory controller, in whichever hierarchy of cgroups it is.
class MemoryAccount {
 public:
  explicit MemoryAccount(const support::Cgroup& cgroup);

  /// NaN where nothing is accounted.
  double kib() const;

  /// Once no process is left in it.
  static void close(const support::Cgroup& cgroup);

 private:
  std::string file_;
};

/// A forked copy of this process with namespaces of its own (network, PID, mount) and a cgroup. Everything that it has
/// started ends with this object, or with this process.
class Stage {
 public:
  using Turn = std::function<Figures()>;

  /// `set_up` is called there, once; what it returns at each turn. Throws what went wrong.
  Stage(const std::string& congestion_control, bool veth, const std::function<Turn(const Place&)>& set_up);
  ~Stage();
  Stage(const Stage&) = delete;
  Stage& operator=(const Stage&) = delete;

  /// One turn. Throws what went wrong there.
  Figures turn();

 private:
  struct Note;
  void await() const;
  void end() const;

  support::Cgroup cgroup_;
  Note* note_;
  support::Channel channel_{support::Fd()};
  pid_t pid_ = -1;
};

}  // namespace bench
