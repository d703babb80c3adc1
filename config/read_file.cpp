// SPDX-License-Identifier: BSD-2-Clause
#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <system_error>

#include "config/printable.h"
#include "config/read_config.h"

namespace config {
namespace {

// For whoever writes to a pipe; a service that reads its configuration again does nothing else meanwhile.
constexpr auto pipe_patience = std::chrono::seconds(5);

constexpr std::size_t mebibyte = std::size_t{1024} * 1024;

struct File {
  // Without O_NONBLOCK, opening a FIFO waits until somebody writes to it.
  explicit File(const std::string& path)
      : descriptor(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK)) {}
  ~File() {
    if (descriptor >= 0) ::close(descriptor);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  const int descriptor;
};

std::unexpected<Error> failed(const std::string& path, int code) {
  return std::unexpected(Error{-code, fmt::format("{}: {}", printable(path), std::generic_category().message(code))});
}

/// Waits until more can be read, or nobody has the other end of the pipe any more. False when that takes too long.
bool wait_for_more(int pipe, std::chrono::steady_clock::time_point until) {
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(until - std::chrono::steady_clock::now());
  pollfd readable{.fd = pipe, .events = POLLIN, .revents = 0};
  return left.count() > 0 && ::poll(&readable, 1, static_cast<int>(left.count())) != 0;
}

}  // namespace

Result<std::string> read_file(const std::string& path, struct stat* status) {
  const File file(path);
  if (file.descriptor < 0) return failed(path, errno);
  struct stat opened{};
  if (::fstat(file.descriptor, &opened) != 0) return failed(path, errno);
  if (status != nullptr) *status = opened;
  const bool is_pipe = S_ISFIFO(opened.st_mode);
  // A device may never end, or wait for somebody to type.
  if (!S_ISREG(opened.st_mode) && !S_ISDIR(opened.st_mode) && !is_pipe)
    return std::unexpected(Error{-EINVAL, fmt::format("{}: expected a file or a pipe", printable(path))});
  const auto until = std::chrono::steady_clock::now() + pipe_patience;
  std::string text;
  std::size_t length = 0;
  for (;;) {
    // Sizes from stat() mean nothing for pipes and are only a guess for a file that is being written.
    if (text.size() == length) text.resize(std::max<std::size_t>(mebibyte / 16, 2 * length));
    const ssize_t got = ::read(file.descriptor, text.data() + length, text.size() - length);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && errno == EAGAIN && wait_for_more(file.descriptor, until)) continue;
    if (got < 0 && errno == EAGAIN) {
      return std::unexpected(
          Error{-ETIMEDOUT, fmt::format("{}: a pipe, whose writer has not come to an end within {} s", printable(path),
                                        pipe_patience.count())});
    }
    if (got < 0) return failed(path, errno);
    if (got == 0) break;
    length += static_cast<std::size_t>(got);
    if (length > max_text_size) {
      return std::unexpected(Error{
          -EFBIG, fmt::format("{}: expected at most {} MiB, got more", printable(path), max_text_size / mebibyte)});
    }
  }
  if (is_pipe && length == 0)
    return std::unexpected(Error{-EPIPE, fmt::format("{}: a pipe, and nobody writes to it", printable(path))});
  text.resize(length);
  text.shrink_to_fit();
  return text;
}

}  // namespace config
