// SPDX-License-Identifier: BSD-2-Clause
#include "tests/support/process.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include <array>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <thread>

#include "tests/support/observe.h"

namespace support {
namespace {

constexpr int patience = 55'000;  // ms without a byte; a test ends within a minute

struct Pipe {
  Fd read;
  Fd write;
};

Pipe make_pipe() {
  int fds[2];
  checked(::pipe2(fds, O_CLOEXEC), "pipe");
  return {Fd(fds[0]), Fd(fds[1])};
}

int wait_for_exit(pid_t pid) {
  int status = 0;
  while (::waitpid(pid, &status, 0) < 0)
    if (errno != EINTR) throw std::system_error(errno, std::generic_category(), "waitpid");
  return status;
}

#ifdef CLUSTERIP_COVERAGE
constexpr bool counts = true;
#else
constexpr bool counts = false;
#endif

/// What a program has counted (scripts/coverage) it writes when it exits, not when it is killed. A second SIGTERM is
/// for those that wait for connections to end.
bool has_written_counts(pid_t pid) {
  using namespace std::chrono_literals;
  for (int asked = 0; asked < 2; ++asked) {
    ::kill(pid, SIGTERM);
    for (int waited = 0; waited < 100; ++waited) {
      if (::waitpid(pid, nullptr, WNOHANG) != 0) return true;
      std::this_thread::sleep_for(10ms);
    }
  }
  return false;
}

void end(pid_t pid) {
  if (pid < 0 || (counts && has_written_counts(pid))) return;
  ::kill(pid, SIGKILL);
  wait_for_exit(pid);
}

bool append_from(const Fd& fd, std::string& text) {
  char buffer[4096];
  const ssize_t size = ::read(fd.get(), buffer, sizeof buffer);
  if (size > 0) text.append(buffer, static_cast<std::size_t>(size));
  return size > 0;
}

}  // namespace

Process::Process(const std::vector<std::string>& command, const Cgroup* cgroup, const std::function<void()>& prepare) {
  std::vector<char*> arguments;
  for (const std::string& argument : command) arguments.push_back(const_cast<char*>(argument.c_str()));
  arguments.push_back(nullptr);
  Pipe out = make_pipe();
  Pipe err = make_pipe();
  Fd procs;
  if (cgroup != nullptr) procs = Fd(checked(::open(cgroup->procs().c_str(), O_WRONLY | O_CLOEXEC), cgroup->procs()));

  pid_ = checked(::fork(), "fork");
  if (pid_ == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    ::dup2(out.write.get(), STDOUT_FILENO);
    ::dup2(err.write.get(), STDERR_FILENO);
    if (procs.get() >= 0 && ::write(procs.get(), "0", 1) != 1) ::_exit(126);
    try {
      if (prepare) prepare();
    } catch (...) {
      ::_exit(125);
    }
    ::execvp(arguments[0], arguments.data());
    ::_exit(127);
  }
  out_ = std::move(out.read);
  err_ = std::move(err.read);
}

Process::~Process() { end(pid_); }

bool Process::read_more() {
  if (out_.get() < 0 && err_.get() < 0) return false;
  std::array<pollfd, 2> files = {pollfd{out_.get(), POLLIN, 0}, pollfd{err_.get(), POLLIN, 0}};
  if (checked(::poll(files.data(), files.size(), patience), "poll") == 0)
    throw std::runtime_error("a program said nothing for too long; it wrote: " + finished_.out + finished_.err);
  if (files[0].revents != 0 && !append_from(out_, finished_.out)) out_.reset();
  if (files[1].revents != 0 && !append_from(err_, finished_.err)) err_.reset();
  return out_.get() >= 0 || err_.get() >= 0;
}

void Process::wait_for_output(const std::string& text) {
  while (finished_.out.find(text) == std::string::npos)
    if (!read_more())
      throw std::runtime_error("a program ended without \"" + text + "\"; it wrote: " + finished_.out + finished_.err);
}

std::string Process::wait_for_error(const std::string& text) {
  for (;;) {
    const std::size_t found = finished_.err.find(text, heard_);
    const std::size_t end = found == std::string::npos ? found : finished_.err.find('\n', found);
    if (end != std::string::npos) {
      const std::size_t start = std::exchange(heard_, end + 1);
      return finished_.err.substr(start, end - start);
    }
    if (!read_more()) throw std::runtime_error("a program ended without \"" + text + "\"; it wrote: " + finished_.err);
  }
}

Finished Process::wait() {
  while (read_more()) {
  }
  const int status = wait_for_exit(std::exchange(pid_, -1));
  finished_.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  return finished_;
}

Finished run(const std::vector<std::string>& command) { return Process(command).wait(); }

Finished run_in_cgroup(const Cgroup& cgroup, const std::vector<std::string>& command) {
  return Process(command, &cgroup).wait();
}

std::string jq(const std::string& filter, const std::string& json) {
  const TemporaryDirectory directory;
  return run({"jq", "--compact-output", "--raw-output", filter, directory.write("input.json", json)}).out;
}

void Channel::tell(char letter) const {
  checked(::send(fd_.get(), &letter, 1, MSG_NOSIGNAL), "the other side has ended");
}

char Channel::hear() const {
  char letter = 0;
  if (checked(::recv(fd_.get(), &letter, 1, 0), "recv") == 0) throw std::runtime_error("the other side has ended");
  return letter;
}

Child::Child(const std::function<void(const Channel&)>& body) {
  int ends[2];
  checked(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), "socketpair");
  Channel parent_end{Fd(ends[0])};
  Channel child_end{Fd(ends[1])};
  Pipe complaint = make_pipe();
  pid_ = checked(::fork(), "fork");
  if (pid_ == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    parent_end = Channel(Fd());
    int code = 0;
    std::string what;
    try {
      body(child_end);
    } catch (const std::exception& error) {
      what = error.what();
      code = 1;
    } catch (...) {
      what = "an unknown exception";
      code = 1;
    }
    (void)!::write(complaint.write.get(), what.data(), what.size());
    if (counts) std::exit(code);
    ::_exit(code);
  }
  channel_ = std::move(parent_end);
  complaint_ = std::move(complaint.read);
}

Child::~Child() { end(pid_); }

void Child::kill() { ::kill(pid_, SIGKILL); }

std::string Child::wait() {
  std::string complaint;
  while (append_from(complaint_, complaint)) {
  }
  const int status = wait_for_exit(std::exchange(pid_, -1));
  if (WIFSIGNALED(status)) return std::string("ended by ") + ::strsignal(WTERMSIG(status));
  return complaint;
}

std::string in_child(const std::function<void()>& body) {
  return Child([&](const Channel&) { body(); }).wait();
}

}  // namespace support
