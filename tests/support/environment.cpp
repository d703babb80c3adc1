// SPDX-License-Identifier: BSD-2-Clause
#include "tests/support/environment.h"

#include <linux/bpf.h>
#include <net/if.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <sstream>
#include <stdexcept>

#include "tests/support/bpf_objects.h"
#include "tests/support/cgroup.h"
#include "tests/support/fd.h"

namespace support {
namespace {

std::string missing = "the test program has made no private environment";

}  // namespace

void enter_private_environment() {
  try {
    if (::geteuid() != 0) throw std::runtime_error("not root");
    checked(::unshare(CLONE_NEWNET | CLONE_NEWNS), "unshare");
    checked(::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr), "private mounts");
    raise_loopback();
    if (cgroup2_mount().empty()) throw std::runtime_error("no cgroup v2 hierarchy is mounted");
    if (std::getenv("CLUSTERIP_WITHOUT_BPF") == nullptr) {
      checked(::mount("bpf", bpffs, "bpf", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=0700"), "BPF filesystem");
      bpf_attr attr{};
      attr.map_type = BPF_MAP_TYPE_ARRAY;
      attr.key_size = 4;
      attr.value_size = 4;
      attr.max_entries = 1;
      Fd map(checked(bpf(BPF_MAP_CREATE, attr), "bpf()"));
    }
    remove_stale_cgroups();
    Cgroup writable;
    missing.clear();
  } catch (const std::exception& error) {
    missing = error.what();
  }
}

void raise_loopback() {
  Fd fd(checked(::socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), "socket"));
  ifreq request{};
  std::strcpy(request.ifr_name, "lo");
  checked(::ioctl(fd.get(), SIOCGIFFLAGS, &request), "flags of lo");
  request.ifr_flags = static_cast<short>(request.ifr_flags | IFF_UP);
  checked(::ioctl(fd.get(), SIOCSIFFLAGS, &request), "lo up");
}

const std::string& missing_privilege() { return missing; }

bool must_run() { return std::getenv("CLUSTERIP_REQUIRE_PRIVILEGE") != nullptr; }

std::string cgroup2_mount() {
  std::ifstream mounts("/proc/self/mountinfo");
  for (std::string line; std::getline(mounts, line);) {
    // "31 23 0:28 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw": the fifth field, and the first behind the dash
    const auto dash = line.find(" - ");
    if (dash == std::string::npos || line.compare(dash + 3, 8, "cgroup2 ") != 0) continue;
    std::istringstream fields(line);
    std::string path;
    for (int field = 0; field < 5; ++field) fields >> path;
    return path;
  }
  return {};
}

}  // namespace support
