// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <sys/types.h>

#include <functional>
#include <string>
#include <vector>

#include "tests/support/cgroup.h"
#include "tests/support/fd.h"

namespace support {

struct Finished {
  int exit_code = 0;  // 128 + signal when killed by one
  std::string out;
  std::string err;
};

/// Another program. It is ended with this object, or with this process.
class Process {
 public:
  /// `prepare` runs in the child before the program does.
  explicit Process(const std::vector<std::string>& command, const Cgroup* cgroup = nullptr,
                   const std::function<void()>& prepare = {});
  ~Process();
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  /// Block until the program has written `text` to its stdout. Throws when it ends without.
  void wait_for_output(const std::string& text);

  /// Block until the program has written `text` to its stderr, behind what an earlier call has found there; returns
  /// what it wrote up to the end of that line. Throws when it ends without.
  std::string wait_for_error(const std::string& text);

  /// Block until it ends.
  Finished wait();

  pid_t pid() const { return pid_; }

 private:
  bool read_more();

  pid_t pid_ = -1;
  Fd out_;
  Fd err_;
  Finished finished_;
  std::size_t heard_ = 0;  // of what it wrote to stderr
};

Finished run(const std::vector<std::string>& command);
Finished run_in_cgroup(const Cgroup& cgroup, const std::vector<std::string>& command);

/// What jq makes of a JSON text; empty when it is none.
std::string jq(const std::string& filter, const std::string& json);

/// One end of a conversation between a test and its child, in single letters.
class Channel {
 public:
  explicit Channel(Fd fd) : fd_(std::move(fd)) {}
  void tell(char letter) const;

  /// Block for the next letter. Throws when the other side has ended.
  char hear() const;

  /// To wait for the next letter among other things.
  int get() const { return fd_.get(); }

 private:
  Fd fd_;
};

/// A forked copy of this process that runs one function.
class Child {
 public:
  explicit Child(const std::function<void(const Channel&)>& body);
  ~Child();
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;

  const Channel& channel() const { return channel_; }
  pid_t pid() const { return pid_; }
  void kill();

  /// Block until it ends: empty when the function returned, else what it threw or the signal that ended it.
  std::string wait();

 private:
  pid_t pid_ = -1;
  Channel channel_{Fd()};
  Fd complaint_;
};

/// Run a function in a forked copy of this process; returns what Child::wait does.
std::string in_child(const std::function<void()>& body);

}  // namespace support
