// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <boost/asio/io_context.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <boost/asio/steady_timer.hpp>
#include <chrono>
#include <filesystem>
#include <functional>
#include <set>
#include <string>

namespace run {

/// Tells when a file has been written or replaced (`watch = true`). Editors write a new file and rename it over the old
/// one, and a ConfigMap swaps a symbolic link to a directory: so all directories on the way to the file, through every
/// symbolic link, are watched (inotify(7)), not the file. Used by one thread.
class FileWatch {
 public:
  /// `changed` is called in the thread of `io`, a moment after the last change: a file that is being written is left
  /// alone. It may be called when nothing has changed. Throws boost::system::system_error where inotify is used up.
  FileWatch(boost::asio::io_context& io, std::string file, std::function<void()> changed);

 private:
  bool watch_directories();
  void look_again(std::chrono::milliseconds pause);
  void wait();
  bool read_events();

  const std::filesystem::path file_;
  const std::function<void()> changed_;
  boost::asio::posix::stream_descriptor inotify_;
  boost::asio::steady_timer pause_;
};

}  // namespace run
