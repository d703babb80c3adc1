// SPDX-License-Identifier: BSD-2-Clause
#include "fallback_proxy/watched.h"

#include <fcntl.h>

#include <cerrno>
#include <charconv>
#include <filesystem>
#include <fstream>
#include <set>
#include <string>
#include <string_view>
#include <system_error>

namespace userspace {
namespace {

/// "tfd:        5 events:       1f ...": a line for each descriptor that is watched.
void read_watched(const std::string& fdinfo, std::set<int>& watched) {
  std::ifstream file(fdinfo);
  for (std::string key; file >> key;) {
    if (int fd = -1; key == "tfd:" && file >> fd) watched.insert(fd);
  }
}

/// Whoever made this process may have left it some of its own, which stay open when a program begins.
bool is_ours(int fd) {
  const int flags = ::fcntl(fd, F_GETFD);
  return flags >= 0 && (flags & FD_CLOEXEC) != 0;
}

bool is_for_reading(int fd) { return (::fcntl(fd, F_GETFL) & O_ACCMODE) == O_RDONLY; }

}  // namespace

config::Result<void> check_watched() {
  std::set<int> wanted;
  std::set<int> watched;
  std::error_code unreadable;  // no /proc: nothing is known
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd", unreadable)) {
    const std::string name = entry.path().filename();
    int fd = -1;
    std::from_chars(name.data(), name.data() + name.size(), fd);
    std::error_code closed;  // that of the iterator itself
    const std::string target = std::filesystem::read_symlink(entry.path(), closed);
    if (closed || !is_ours(fd)) continue;
    if (target == "anon_inode:[eventpoll]") read_watched("/proc/self/fdinfo/" + name, watched);
    if (target == "anon_inode:[eventfd]" || target == "anon_inode:[timerfd]" ||
        (target.starts_with("pipe:") && is_for_reading(fd)))
      wanted.insert(fd);
  }
  for (const int fd : wanted) {
    if (!watched.contains(fd))
      return config::fail(-ENOSPC,
                          "epoll has no room for what this process waits for: raise fs.epoll.max_user_watches");
  }
  return {};
}

}  // namespace userspace
