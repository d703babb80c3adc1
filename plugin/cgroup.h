// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <cstdint>
#include <string>

#include "plugin/fd.h"
#include "plugin/system_error.h"

namespace plugin {

/// A cgroup v2 directory.
struct Cgroup {
  Fd fd;
  std::string path;
  std::uint64_t id = 0;
};

/// `path` empty: the root of the cgroup2 hierarchy, wherever it is mounted. -ENOENT, -ENOTDIR: no such directory (or no
/// mount); -EINVAL: not on a cgroup2 filesystem; -ENAMETOOLONG.
Result<Cgroup> open_cgroup(const std::string& path);

}  // namespace plugin
