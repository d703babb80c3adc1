// SPDX-License-Identifier: BSD-2-Clause
#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

#include "config/printable.h"
#include "config/read_config.h"

namespace config {
namespace {

constexpr std::size_t mebibyte = std::size_t{1024} * 1024;

struct File {
  explicit File(const std::string& path) : descriptor(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOCTTY)) {}
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

}  // namespace

Result<std::string> read_file(const std::string& path) {
  const File file(path);
  if (file.descriptor < 0) return failed(path, errno);
  std::string text;
  std::size_t length = 0;
  for (;;) {
    // Sizes from stat() mean nothing for pipes and are only a guess for a file that is being written.
    if (text.size() == length) text.resize(std::max<std::size_t>(mebibyte / 16, 2 * length));
    const ssize_t got = ::read(file.descriptor, text.data() + length, text.size() - length);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return failed(path, errno);
    if (got == 0) break;
    length += static_cast<std::size_t>(got);
    if (length > max_text_size) {
      return std::unexpected(Error{
          -EFBIG, fmt::format("{}: expected at most {} MiB, got more", printable(path), max_text_size / mebibyte)});
    }
  }
  text.resize(length);
  text.shrink_to_fit();
  return text;
}

}  // namespace config
