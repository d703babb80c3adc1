// SPDX-License-Identifier: BSD-2-Clause
#include "plugin/cgroup.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include <cerrno>
#include <fstream>
#include <sstream>

#include "bpf/map_layout.h"

namespace plugin {

namespace {

/// In mountinfo, blanks and the like are written as three octal digits (proc(5)).
std::string unescape(const std::string& field) {
  std::string path;
  for (std::size_t i = 0; i < field.size(); ++i) {
    if (field[i] == '\\' && i + 3 < field.size()) {
      path.push_back(static_cast<char>(std::stoi(field.substr(i + 1, 3), nullptr, 8)));
      i += 3;
    } else {
      path.push_back(field[i]);
    }
  }
  return path;
}

/// "36 35 0:33 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw": the fifth field, where the field after "-" is
/// the filesystem type.
Result<std::string> cgroup2_mount() {
  std::ifstream mounts("/proc/self/mountinfo");
  for (std::string line; std::getline(mounts, line);) {
    const auto separator = line.find(" - ");
    if (separator == std::string::npos || !line.substr(separator + 3).starts_with("cgroup2 ")) {
      continue;
    }
    std::istringstream fields(line);
    std::string id, parent, device, root, mount_point;
    if (fields >> id >> parent >> device >> root >> mount_point) {
      return unescape(mount_point);
    }
  }
  return fail(
      -ENOENT,
      "no cgroup2 filesystem is mounted here: mount one (mkdir -p /run/cgroup2 && mount -t cgroup2 none /run/cgroup2)");
}

}  // namespace

Result<Cgroup> open_cgroup(const std::string& path) {
  Cgroup cgroup{.fd = {}, .path = path, .id = 0};
  if (path.empty()) {
    auto mount = cgroup2_mount();
    if (!mount) {
      return std::unexpected(mount.error());
    }
    cgroup.path = *mount;
  }
  if (cgroup.path.size() >= CGROUP_PATH_SIZE) {
    return fail(-ENAMETOOLONG, "the path of the cgroup is too long");
  }
  cgroup.fd = Fd(open(cgroup.path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!cgroup.fd) {
    return fail_errno(errno, "opening the cgroup " + cgroup.path);
  }
  struct statfs filesystem{};
  struct stat status{};
  if (fstatfs(cgroup.fd.get(), &filesystem) != 0 || fstat(cgroup.fd.get(), &status) != 0) {
    return fail_errno(errno, "looking at the cgroup " + cgroup.path);
  }
  if (filesystem.f_type != CGROUP2_SUPER_MAGIC) {
    return fail(-EINVAL, cgroup.path + " is not a cgroup v2 directory");
  }
  cgroup.id = status.st_ino;  // cgroup2 inode numbers are the ids that the kernel reports for links
  return cgroup;
}

}  // namespace plugin
