// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <fstream>
#include <sstream>
#include <string>

#include "tests/support/environment.h"
#include "tests/support/fd.h"
#include "tests/support/observe.h"

namespace support {

/// A limit of memory, the kernel's on behalf of its processes included: maps and programs count.
class MemoryCgroup {
 public:
  /// Empty: this machine has none, or does not hand it down.
  static std::string hierarchy() {
    std::string unified = cgroup2_mount();
    if (read_text(unified + "/cgroup.subtree_control").contains("memory")) return unified;
    std::ifstream mounts("/proc/self/mounts");
    for (std::string line; std::getline(mounts, line);) {
      std::istringstream fields(line);
      std::string device, path, type, options;
      fields >> device >> path >> type >> options;
      if (type == "cgroup" && ("," + options + ",").contains(",memory,")) return path;
    }
    return {};
  }

  explicit MemoryCgroup(std::uint64_t bytes)
      : path_(fmt::format("{}/clusterip-test-{}-memory", hierarchy(), ::getpid())) {
    checked(::mkdir(path_.c_str(), 0755), path_);
    const std::string limit = path_ + (hierarchy() == cgroup2_mount() ? "/memory.max" : "/memory.limit_in_bytes");
    write(limit, fmt::format("{}", bytes));
  }
  ~MemoryCgroup() { ::rmdir(path_.c_str()); }
  MemoryCgroup(const MemoryCgroup&) = delete;
  MemoryCgroup& operator=(const MemoryCgroup&) = delete;

  /// For this process.
  void enter() const { write(path_ + "/cgroup.procs", "0"); }

 private:
  static void write(const std::string& file, const std::string& text) {
    const Fd fd(checked(::open(file.c_str(), O_WRONLY | O_CLOEXEC), file));
    checked(::write(fd.get(), text.data(), text.size()), file);
  }

  std::string path_;
};

}  // namespace support
