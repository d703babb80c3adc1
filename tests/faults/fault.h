// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <fmt/format.h>

#include <cstdlib>
#include <filesystem>
#include <ostream>
#include <string>

#include "tests/support/observe.h"

namespace support {

/// Which system call fails, and how; `command` of those that have commands.
struct Call {
  const char* name;  // of the test
  const char* call;
  long command;
  int error;
};

inline std::ostream& operator<<(std::ostream& out, const Call& call) { return out << call.name; }

/// One system call of a program that fails, once: see inject.c.
class Fault {
 public:
  Fault(std::string call, long command, int nth, int error)
      : setting_(fmt::format("{} {} {} {} {}/injected", call, command, nth, error, directory_.path())) {}

  /// In a child, before its program begins.
  void prepare() const {
    ::setenv("LD_PRELOAD", CLUSTERIP_FAULT_INJECTOR, 1);
    ::setenv("CLUSTERIP_FAULT", setting_.c_str(), 1);
  }

  /// Whether the program has come to this call.
  bool was_injected() const { return std::filesystem::exists(directory_.path() + "/injected"); }

 private:
  TemporaryDirectory directory_;
  std::string setting_;
};

}  // namespace support
