// SPDX-License-Identifier: BSD-2-Clause
#include "fallback_proxy/control_socket.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <filesystem>
#include <thread>

#include "fallback_proxy/control_client.h"

namespace userspace {
namespace {

constexpr int backlog = 16;

constexpr int lock_attempts = 100;
constexpr std::chrono::milliseconds lock_pause(20);

}  // namespace

sockaddr_un control_address(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  path.copy(address.sun_path, sizeof address.sun_path - 1);
  return address;
}

config::Result<config::Fd> listen_control(const std::string& path) {
  const std::string directory = std::filesystem::path(path).parent_path();
  if (::mkdir(directory.c_str(), 0755) != 0 && errno != EEXIST) return config::fail_errno(errno, "making " + directory);

  // Of two processes that find a file left behind, the second must not remove what the first has made of it. The lock
  // ends with this function.
  const std::string lock_path = path + ".lock";
  const config::Fd lock(::open(lock_path.c_str(), O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600));
  if (!lock) return config::fail_errno(errno, "opening " + lock_path);
  // Another start has it for a moment; who else holds it is not waited for.
  for (int attempt = 0; ::flock(lock.get(), LOCK_EX | LOCK_NB) != 0; ++attempt) {
    if (errno != EWOULDBLOCK && errno != EINTR) return config::fail_errno(errno, "locking " + lock_path);
    if (attempt == lock_attempts) return config::fail(-EBUSY, "another process holds " + lock_path);
    std::this_thread::sleep_for(lock_pause);
  }

  const auto live = ControlClient::connect(path);
  if (!live) return std::unexpected(live.error());
  if (*live) {
    return config::fail(-EADDRINUSE, fmt::format("pid {} serves already (it listens at {})", (*live)->pid(), path));
  }
  struct stat left{};
  if (::lstat(path.c_str(), &left) == 0) {
    if (!S_ISSOCK(left.st_mode)) return config::fail(-ENOTSOCK, path + " is there and no socket");
    if (::unlink(path.c_str()) != 0) return config::fail_errno(errno, "removing " + path);
  }

  config::Fd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!socket) return config::fail_errno(errno, "socket");
  // bind() gives the file the mode of the socket: at no moment can others connect.
  const auto address = control_address(path);
  if (::fchmod(socket.get(), 0600) != 0 ||
      ::bind(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0)
    return config::fail_errno(errno, "binding " + path);
  if (::listen(socket.get(), backlog) != 0) return config::fail_errno(errno, "listening at " + path);
  return socket;
}

void adopt_control(int socket) { ::listen(socket, backlog); }

}  // namespace userspace
