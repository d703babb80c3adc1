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
#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "config/fail.h"
#include "config/fd.h"
#include "config/printable.h"

namespace kubernetes {
namespace {

namespace asio = boost::asio;
using boost::system::error_code;

constexpr std::size_t max_output = std::size_t{1024} * 1024;
constexpr auto min_validity = std::chrono::seconds(10);
constexpr std::string_view exec_info = "KUBERNETES_EXEC_INFO";
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

/// What it is told otherwise, or what is between this process and the service manager: a plugin that says READY=1, or
/// watches the watchdog, would do so in its name.
bool is_not_inherited(const std::string& name) {
  return name == exec_info || name == "NOTIFY_SOCKET" || name.starts_with("WATCHDOG_");
}

/// The child's pid. Its output goes to `output`, its errors to ours.
config::Result<pid_t> spawn(const Exec& exec, int output) {
  std::vector<std::string> words = exec.command;
  std::vector<std::string> environment;
  for (char** one = ::environ; *one != nullptr; ++one) {
    const std::string_view text(*one);
    const std::string name(text.substr(0, text.find('=')));
    if (!exec.environment.contains(name) && !is_not_inherited(name)) environment.emplace_back(text);
  }
  for (const auto& [name, value] : exec.environment)
    if (name != exec_info) environment.push_back(fmt::format("{}={}", name, value));
  environment.push_back(fmt::format("{}={}", exec_info, info(exec)));
  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  ::posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  ::posix_spawn_file_actions_adddup2(&actions, output, STDOUT_FILENO);
  // A process group of its own, to be ended as a whole; and no signal that this process blocks or ignores.
  posix_spawnattr_t attributes;
  ::posix_spawnattr_init(&attributes);
  ::posix_spawnattr_setpgroup(&attributes, 0);
  sigset_t signals;
  ::sigemptyset(&signals);
  ::posix_spawnattr_setsigmask(&attributes, &signals);
  ::sigaddset(&signals, SIGPIPE);
  ::posix_spawnattr_setsigdefault(&attributes, &signals);
  ::posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
  pid_t pid = -1;
  const int error = ::posix_spawnp(&pid, words.front().c_str(), &actions, &attributes, pointers(words).data(),
                                   pointers(environment).data());
  ::posix_spawnattr_destroy(&attributes);
  ::posix_spawn_file_actions_destroy(&actions);
  if (error != 0) return config::fail_errno(error, config::printable(words.front()));
  return pid;
}

}  // namespace

/// One run of the command. Its handlers own it, so that none of them finds it gone.
class Plugin::Run : public std::enable_shared_from_this<Run> {
 public:
  /// `ended` is called once, and not by the constructor.
  Run(asio::io_context& io, std::string name, std::function<void(const config::Result<Credentials>&)> ended)
      : name_(std::move(name)), ended_(std::move(ended)), output_(io), child_(io), deadline_(io), finished_(io) {
    finished_.expires_at(std::chrono::steady_clock::time_point::max());
  }
  ~Run() { kill(); }
  Run(const Run&) = delete;
  Run& operator=(const Run&) = delete;

  void start(const Exec& exec, std::chrono::milliseconds max_time) {
    std::array<int, 2> ends{};
    if (::pipe2(ends.data(), O_CLOEXEC) != 0) return finish(config::fail_errno(errno, name_ + ": pipe"));
    config::Fd output(ends[0]);
    const config::Fd input(ends[1]);
    const auto pid = spawn(exec, input.get());
    if (!pid) return finish(std::unexpected(pid.error()));
    pid_ = *pid;
    config::Fd child(static_cast<int>(::syscall(SYS_pidfd_open, pid_, 0)));
    if (!child) return finish(config::fail_errno(errno, name_ + ": pidfd_open"));
    error_code error;
    output_.assign(output.get(), error);
    if (!error) output.release();
    if (!error) output_.non_blocking(true, error);
    if (!error) child_.assign(child.get(), error);
    if (error) return finish(config::fail(-EIO, fmt::format("{}: epoll: {}", name_, error.message())));
    child.release();
    wait_for_output();
    wait_for_the_end();
    deadline_.expires_after(max_time);
    deadline_.async_wait([self = shared_from_this(), max_time](const error_code& cancelled) {
      if (cancelled || self->result_) return;
      const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(max_time);
      self->finish(config::fail(-ETIMEDOUT, fmt::format("{} took more than {} s", self->name_, seconds.count())));
    });
  }

  asio::awaitable<config::Result<Credentials>> result() {
    const auto self = shared_from_this();
    while (!self->result_) co_await self->finished_.async_wait(use_tuple);
    co_return *self->result_;
  }

  /// Nobody waits for it any more.
  void abandon() {
    ended_ = nullptr;
    if (!result_) finish(config::fail(-ECANCELED, name_ + " was ended"));
  }

 private:
  // Reads nothing by itself: what comes with the end would be in a buffer that nobody has been told of.
  void wait_for_output() {
    output_.async_wait(asio::posix::stream_descriptor::wait_read, [self = shared_from_this()](const error_code& error) {
      if (error || self->result_ || !self->read()) return;
      self->wait_for_output();
    });
  }

  /// What is there now. False: there will be no more.
  bool read() {
    std::array<char, 4096> buffer;
    for (;;) {
      error_code error;
      const std::size_t length = output_.read_some(asio::buffer(buffer), error);
      if (error) return error == asio::error::would_block || error == asio::error::interrupted;
      text_.append(buffer.data(), length);
      if (text_.size() <= max_output) continue;
      finish(config::fail(-EMSGSIZE, fmt::format("{} prints more than {} bytes", name_, max_output)));
      return false;
    }
  }

  void wait_for_the_end() {
    child_.async_wait(asio::posix::stream_descriptor::wait_read, [self = shared_from_this()](const error_code& error) {
      if (error) return;
      self->kill();
      // Who has left the group may hold its output for ever: the end is the command's own.
      if (!self->result_) self->read();
      if (!self->result_) self->finish(self->outcome());
    });
  }

  config::Result<Credentials> outcome() const {
    if (!WIFEXITED(status_) || WEXITSTATUS(status_) != 0)
      return config::fail(-EIO, fmt::format("{} failed: {}", name_,
                                            WIFEXITED(status_) ? fmt::format("exit {}", WEXITSTATUS(status_))
                                                               : fmt::format("signal {}", WTERMSIG(status_))));
    auto credentials = parse_credentials(text_);
    if (!credentials) return config::fail(-EINVAL, fmt::format("{}: {}", name_, credentials.error().message));
    return credentials;
  }

  /// The whole group; before its leader is waited for, as its number may be another's afterwards. A leader that has not
  /// ended yet is waited for by wait_for_the_end().
  void kill() {
    if (pid_ < 0) return;
    ::kill(-pid_, SIGKILL);
    if (::waitpid(pid_, &status_, child_.is_open() ? WNOHANG : 0) == pid_) pid_ = -1;
  }

  void finish(config::Result<Credentials> result) {
    kill();
    result_ = std::move(result);
    error_code ignored;
    output_.close(ignored);
    deadline_.cancel();
    finished_.cancel();
    if (ended_) std::exchange(ended_, nullptr)(*result_);
  }

  const std::string name_;
  std::function<void(const config::Result<Credentials>&)> ended_;
  asio::posix::stream_descriptor output_;
  asio::posix::stream_descriptor child_;
  asio::steady_timer deadline_;
  asio::steady_timer finished_;  // ends when there is a result
  std::string text_;
  pid_t pid_ = -1;
  int status_ = 0;
  std::optional<config::Result<Credentials>> result_;
};

Plugin::Plugin(asio::io_context& io, Exec exec, std::chrono::milliseconds max_time)
    : io_(io), exec_(std::move(exec)), max_time_(max_time) {}

Plugin::~Plugin() {
  if (run_) run_->abandon();
}

asio::awaitable<config::Result<Plugin::Issue>> Plugin::credentials() {
  if (issue_ && issue_->credentials.expires &&
      *issue_->credentials.expires < std::chrono::system_clock::now() + min_validity)
    issue_.reset();
  if (issue_) co_return *issue_;
  std::shared_ptr<Run> run = run_;
  if (!run) {
    run = run_ = std::make_shared<Run>(io_, config::printable(exec_.command.front()),
                                       [this, number = ++runs_](const config::Result<Credentials>& result) {
                                         run_.reset();
                                         if (result) issue_ = Issue{.credentials = *result, .number = number};
                                       });
    run->start(exec_, max_time_);
  }
  const std::uint64_t number = runs_;
  auto result = co_await run->result();
  if (!result) co_return std::unexpected(result.error());
  co_return Issue{.credentials = std::move(*result), .number = number};
}

void Plugin::reject(std::uint64_t number) {
  if (issue_ && issue_->number == number) issue_.reset();
}

}  // namespace kubernetes
