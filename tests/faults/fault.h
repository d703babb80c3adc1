// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <ostream>
#include <set>
#include <string>
#include <system_error>

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
  Fault(const Call& call, int nth) : Fault(call.call, call.command, nth, call.error) {}
  /// Nothing fails, but the calls are counted.
  static Fault none(const Call& call) { return {call, 0}; }

  /// In a child, before its program begins.
  void prepare() const {
    ::setenv("LD_PRELOAD", CLUSTERIP_FAULT_INJECTOR, 1);
    ::setenv("CLUSTERIP_FAULT", setting_.c_str(), 1);
  }
  /// The same, but calls count from begin() on.
  void prepare_for_later() const {
    prepare();
    ::setenv("CLUSTERIP_FAULT_WHEN", (directory_.path() + "/now").c_str(), 1);
  }
  void begin() const { directory_.write("now", ""); }
  void end() const { std::filesystem::remove(directory_.path() + "/now"); }

  /// Whether the program has come to this call.
  bool was_injected() const { return counted() != 0; }
  int counted() const {
    std::error_code none;
    const auto size = std::filesystem::file_size(directory_.path() + "/injected", none);
    return none ? 0 : static_cast<int>(size);
  }

 private:
  TemporaryDirectory directory_;
  std::string setting_;
};

/// Which of so many calls fail, where not all can: each of the first and of the last, and some between them.
inline std::set<int> positions(int calls, int at_the_ends, int between) {
  std::set<int> chosen;
  for (int i = 1; i <= calls; ++i)
    if (i <= at_the_ends || i > calls - at_the_ends) chosen.insert(i);
  for (int i = 1; calls > 0 && i <= between; ++i) chosen.insert(1 + i * (calls - 1) / (between + 1));
  return chosen;
}

}  // namespace support
