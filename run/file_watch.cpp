// SPDX-License-Identifier: BSD-2-Clause
#include "run/file_watch.h"

#include <sys/inotify.h>
#include <unistd.h>

#include <boost/system/system_error.hpp>
#include <cerrno>
#include <chrono>
#include <system_error>
#include <utility>

namespace run {
namespace {

namespace fs = std::filesystem;

// Editors and scripts do several things in a row.
constexpr auto quiet_time = std::chrono::milliseconds(100);
// Between two looks for a directory that is gone.
constexpr auto missing_time = std::chrono::seconds(2);

constexpr std::uint32_t events = IN_CLOSE_WRITE | IN_MOVED_TO | IN_MOVED_FROM | IN_CREATE | IN_DELETE | IN_ATTRIB |
                                 IN_DELETE_SELF | IN_MOVE_SELF | IN_ONLYDIR;

int open_inotify() {
  const int fd = ::inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
  if (fd < 0) throw boost::system::system_error(errno, boost::system::system_category(), "inotify");
  return fd;
}

/// The directory that each name on the way to the file stands in.
std::set<fs::path> directories_to(fs::path file) {
  std::set<fs::path> result;
  constexpr int max_links = 40;  // as the kernel's
  std::error_code error;
  file = fs::absolute(file, error);
  for (int links = 0; links < max_links;) {
    fs::path so_far;
    fs::path next;
    for (auto part = file.begin(); part != file.end(); ++part) {
      const fs::path here = so_far / *part;
      if (fs::is_symlink(here, error)) {
        result.insert(so_far);
        next = so_far / fs::read_symlink(here, error);
        for (++part; part != file.end(); ++part) next /= *part;
        break;
      }
      so_far = here;
    }
    if (next.empty()) break;
    file = next.lexically_normal();
    ++links;
  }
  result.insert(file.parent_path());
  return result;
}

}  // namespace

FileWatch::FileWatch(boost::asio::io_context& io, std::string file, std::function<void()> changed)
    : file_(std::move(file)), changed_(std::move(changed)), inotify_(io, open_inotify()), pause_(io) {
  watch_directories();
  wait();
}

/// A directory that is watched already is not watched twice: the kernel knows it by its inode.
/// False when one of them is missing.
bool FileWatch::watch_directories() {
  bool all = true;
  for (const fs::path& directory : directories_to(file_))
    all = ::inotify_add_watch(inotify_.native_handle(), directory.c_str(), events) >= 0 && all;
  return all;
}

void FileWatch::look_again(std::chrono::milliseconds pause) {
  pause_.expires_after(pause);
  pause_.async_wait([this](const boost::system::error_code& cancelled) {
    if (cancelled) return;
    // The links may lead elsewhere now. Nothing tells when a directory comes back.
    if (!watch_directories()) look_again(missing_time);
    changed_();
  });
}

void FileWatch::wait() {
  inotify_.async_wait(inotify_.wait_read, [this](const boost::system::error_code& error) {
    if (error) return;
    if (read_events()) {
      look_again(quiet_time);
    }
    wait();
  });
}

/// Whatever happens in these directories may be about the file: its text decides. True when there was anything.
bool FileWatch::read_events() {
  alignas(inotify_event) char buffer[16384];
  bool any = false;
  while (::read(inotify_.native_handle(), buffer, sizeof buffer) > 0) any = true;
  return any;
}

}  // namespace run
