// SPDX-License-Identifier: BSD-2-Clause
#include "tests/bench/proxy/stage.h"

#include <linux/sched.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <cstring>
#include <exception>
#include <fstream>
#include <new>
#include <stdexcept>

#include "tests/support/environment.h"
#include "tests/support/fd.h"

namespace bench {
namespace {

using support::checked;
using support::Fd;

/// Written by the trial, read when it has ended.
struct Note {
  bool finished = false;
  Figures figures;
  char error[1024] = {};
};

class SharedNote {
 public:
  SharedNote() {
    void* memory = ::mmap(nullptr, sizeof(Note), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
    note_ = new (memory) Note;
  }
  SharedNote(const SharedNote&) = delete;
  SharedNote& operator=(const SharedNote&) = delete;
  ~SharedNote() { ::munmap(note_, sizeof(Note)); }
  Note* operator->() const { return note_; }

 private:
  Note* note_;
};

void write_setting(const std::string& path, const std::string& value) {
  std::ofstream file(path);
  if (!(file << value << std::flush)) throw std::runtime_error(path + " cannot be set to " + value);
}

void set_the_stage(const std::string& congestion_control) {
  checked(::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr), "private mounts");
  checked(::mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, nullptr), "/proc");
  checked(::mount("bench", scratch, "tmpfs", MS_NOSUID | MS_NODEV, nullptr), scratch);
  support::raise_loopback();
  write_setting("/proc/sys/net/ipv4/tcp_congestion_control", congestion_control);
  // Both legs of a proxied connection end in TIME_WAIT: leave every port above the listeners' to clients.
  write_setting("/proc/sys/net/ipv4/ip_local_port_range", "1024 65535");
  write_setting("/proc/sys/net/ipv4/tcp_tw_reuse", "1");
  write_setting("/proc/sys/net/core/somaxconn", "4096");
}

[[noreturn]] void perform(const std::string& congestion_control, const std::function<Figures()>& body,
                          const SharedNote& note) {
  try {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    set_the_stage(congestion_control);
    note->figures = body();
    note->finished = true;
  } catch (const std::exception& error) {
    std::strncpy(note->error, error.what(), sizeof note->error - 1);
  }
  // The first process of a PID namespace takes all others with it.
  ::_exit(0);
}

}  // namespace

Trial on_stage(const std::string& congestion_control, std::chrono::seconds patience,
               const std::function<Figures()>& body) {
  const SharedNote note;
  int pidfd = -1;
  clone_args how{};
  how.flags = CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWNS | CLONE_PIDFD;
  how.pidfd = reinterpret_cast<std::uintptr_t>(&pidfd);
  how.exit_signal = SIGCHLD;
  const auto pid = static_cast<pid_t>(checked(::syscall(SYS_clone3, &how, sizeof how), "namespaces of one's own"));
  if (pid == 0) perform(congestion_control, body, note);

  const Fd life(pidfd);
  pollfd wait{life.get(), POLLIN, 0};
  const auto patience_ms = std::chrono::milliseconds(patience).count();
  const bool ended = checked(::poll(&wait, 1, static_cast<int>(patience_ms)), "poll") > 0;
  if (!ended) ::kill(pid, SIGKILL);
  int status = 0;
  checked(::waitpid(pid, &status, 0), "waitpid");

  if (!ended) return {.figures = {}, .error = "took longer than " + std::to_string(patience.count()) + " s"};
  if (note->finished) return {.figures = note->figures, .error = {}};
  if (WIFSIGNALED(status)) return {.figures = {}, .error = std::string("ended by ") + ::strsignal(WTERMSIG(status))};
  return {.figures = {}, .error = note->error};
}

}  // namespace bench
