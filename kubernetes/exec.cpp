// SPDX-License-Identifier: BSD-2-Clause
#include "kubernetes/exec.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <spawn.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/buffer.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/json.hpp>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <string>
#include <utility>
#include <vector>

#include "config/fail.h"
#include "config/fd.h"
#include "config/printable.h"

namespace kubernetes {
namespace {

namespace asio = boost::asio;

constexpr auto max_time = std::chrono::seconds(60);
constexpr std::size_t max_output = std::size_t{1024} * 1024;
constexpr auto use_tuple = asio::as_tuple(asio::use_awaitable);

/// What the command is told of who asks, by the protocol.
std::string info(const Exec& exec) {
  return boost::json::serialize(boost::json::object{
      {"apiVersion", exec.api_version}, {"kind", "ExecCredential"}, {"spec", {{"interactive", false}}}});
}

std::vector<char*> pointers(std::vector<std::string>& strings) {
  std::vector<char*> result;
  for (std::string& one : strings) result.push_back(one.data());
  result.push_back(nullptr);
  return result;
}

/// The child's pid. Its output goes to `output`, its errors to ours.
config::Result<pid_t> spawn(const Exec& exec, int output) {
  std::vector<std::string> words = exec.command;
  std::vector<std::string> environment;
  for (char** one = ::environ; *one != nullptr; ++one) {
    const std::string_view text(*one);
    if (!exec.environment.contains(std::string(text.substr(0, text.find('='))))) environment.emplace_back(text);
  }
  for (const auto& [name, value] : exec.environment) environment.push_back(fmt::format("{}={}", name, value));
  environment.push_back(fmt::format("KUBERNETES_EXEC_INFO={}", info(exec)));
  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  ::posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  ::posix_spawn_file_actions_adddup2(&actions, output, STDOUT_FILENO);
  pid_t pid = -1;
  const int error = ::posix_spawnp(&pid, words.front().c_str(), &actions, nullptr, pointers(words).data(),
                                   pointers(environment).data());
  ::posix_spawn_file_actions_destroy(&actions);
  if (error != 0) return config::fail_errno(error, config::printable(words.front()));
  return pid;
}

}  // namespace

asio::awaitable<config::Result<Credentials>> run_exec(asio::io_context& io, const Exec& exec) {
  const std::string name = config::printable(exec.command.front());
  std::array<int, 2> ends{};
  if (::pipe2(ends.data(), O_CLOEXEC) != 0) co_return config::fail_errno(errno, "pipe");
  asio::posix::stream_descriptor output(io, ends[0]);
  config::Fd input(ends[1]);
  const auto pid = spawn(exec, input.get());
  input.reset();
  if (!pid) co_return std::unexpected(pid.error());
  asio::posix::stream_descriptor child(io, static_cast<int>(::syscall(SYS_pidfd_open, *pid, 0)));

  asio::steady_timer deadline(io, max_time);
  bool is_late = false;
  deadline.async_wait([&is_late, pid = *pid](const boost::system::error_code& cancelled) {
    if (cancelled) return;
    is_late = true;
    ::kill(pid, SIGKILL);
  });
  std::string text;
  std::array<char, 4096> buffer{};
  for (;;) {
    const auto [error, length] = co_await output.async_read_some(asio::buffer(buffer), use_tuple);
    if (error) break;
    if (text.size() < max_output) text.append(buffer.data(), length);
  }
  co_await child.async_wait(asio::posix::stream_descriptor::wait_read, use_tuple);
  deadline.cancel();
  int status = 0;
  ::waitpid(*pid, &status, 0);
  if (is_late) co_return config::fail(-ETIMEDOUT, fmt::format("{} took more than {} s", name, max_time.count()));
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
    co_return config::fail(-EIO, fmt::format("{} failed: {}", name,
                                             WIFEXITED(status) ? fmt::format("exit {}", WEXITSTATUS(status))
                                                               : fmt::format("signal {}", WTERMSIG(status))));
  auto credentials = parse_credentials(text);
  if (!credentials) co_return config::fail(-EINVAL, fmt::format("{}: {}", name, credentials.error().message));
  co_return std::move(*credentials);
}

}  // namespace kubernetes
