// SPDX-License-Identifier: BSD-2-Clause
#include "tests/support/cgroup.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <charconv>
#include <filesystem>
#include <fstream>
#include <string_view>
#include <vector>

#include "tests/support/environment.h"
#include "tests/support/fd.h"

namespace support {
namespace {

constexpr std::string_view prefix = "clusterip-test-";

void move_self(const std::string& procs) {
  Fd fd(checked(::open(procs.c_str(), O_WRONLY | O_CLOEXEC), procs));
  checked(::write(fd.get(), "0", 1), procs);
}

std::string own_cgroup() {
  std::ifstream membership("/proc/self/cgroup");
  for (std::string line; std::getline(membership, line);)
    if (line.starts_with("0::")) return cgroup2_mount() + line.substr(3);
  return cgroup2_mount();
}

const std::string& first_cgroup() {
  static const std::string path = own_cgroup();
  return path;
}

}  // namespace

Cgroup::Cgroup() {
  first_cgroup();
  static int count = 0;
  path_ = cgroup2_mount() + "/" + std::string(prefix) + std::to_string(::getpid()) + "-" + std::to_string(++count);
  checked(::mkdir(path_.c_str(), 0755), path_);
}

Cgroup::~Cgroup() { ::rmdir(path_.c_str()); }

void Cgroup::enter() const { move_self(procs()); }

void Cgroup::leave() { move_self(first_cgroup() + "/cgroup.procs"); }

void remove_stale_cgroups() {
  std::vector<std::filesystem::path> stale;
  for (const auto& entry : std::filesystem::directory_iterator(cgroup2_mount())) {
    const std::string name = entry.path().filename();
    pid_t pid = 0;
    if (!name.starts_with(prefix)) continue;
    std::from_chars(name.data() + prefix.size(), name.data() + name.size(), pid);
    if (pid > 0 && ::kill(pid, 0) < 0 && errno == ESRCH) stale.push_back(entry.path());
  }
  for (const auto& path : stale) ::rmdir(path.c_str());
}

}  // namespace support
