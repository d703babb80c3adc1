// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <string>

namespace support {

/// A cgroup of the tests' own, removed at the end.
class Cgroup {
 public:
  Cgroup();
  ~Cgroup();
  Cgroup(const Cgroup&) = delete;
  Cgroup& operator=(const Cgroup&) = delete;

  const std::string& path() const { return path_; }
  std::string procs() const { return path_ + "/cgroup.procs"; }

  /// Move this process, with all its threads, into the cgroup; sockets belong to it that are made from then on.
  void enter() const;

  /// Move this process to where it was when the program began.
  static void leave();

 private:
  std::string path_;
};

/// Remove cgroups of test processes that ended without cleaning up. Removing one also detaches what was attached to it.
void remove_stale_cgroups();

}  // namespace support
