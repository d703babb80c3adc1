// SPDX-License-Identifier: BSD-2-Clause
#include "plugin/canary.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <ctime>
#include <memory>
#include <string>

#include "bpf/map_layout.h"

namespace plugin {

namespace {

/// Shared with the child.
struct Report {
  int join_errno;      // of moving into the cgroup
  int loopback_errno;  // of connecting to the canary's backend itself
  int socket_errno;    // of a socket that was not to be had: nothing is known
  bool done;
  CanaryResult seen;
};

/// Connects a UDP socket; 0 or the errno. EADDRNOTAVAIL when it worked, but the kernel chose another source than the
/// loopback address: the connect went elsewhere.
int connect_to(std::uint32_t host, std::uint16_t port, Report& report) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(host);
  const Fd fd(socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  if (!fd) {
    report.socket_errno = errno;
    return errno;
  }
  if (connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
    return errno;
  }
  sockaddr_in local{};
  socklen_t length = sizeof local;
  if (getsockname(fd.get(), reinterpret_cast<sockaddr*>(&local), &length) != 0) {
    return errno;
  }
  return local.sin_addr.s_addr == htonl(CANARY_BACKEND) ? 0 : EADDRNOTAVAIL;
}

/// Of a connect() of UDP, which the kernel itself never refuses: a program has.
bool is_refusal(int error) { return error == ECONNREFUSED || error == EPERM; }

/// In the child: nothing but system calls, since other threads of the host may have held locks when it was made.
[[noreturn]] void run_child(int cgroup, Report& report) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  const int procs = openat(cgroup, "cgroup.procs", O_WRONLY | O_CLOEXEC);
  if (procs < 0) {
    report.join_errno = errno;
  }
  // The host's descriptors must not outlive it here: one of them is the lock of the pins. (Linux 5.9; before, they
  // may.)
  if (procs > 0) {
    syscall(SYS_close_range, 0, procs - 1, 0);
  }
  syscall(SYS_close_range, procs + 1, ~0u, 0);
  if (procs >= 0 && write(procs, "0", 1) != 1) {
    report.join_errno = errno;
  }
  if (report.join_errno == EBUSY) {
    _exit(1);
  }
  // In a container it may not go there: the tree is read-only, or begins above its cgroup namespace. It stays where it
  // is: if that is below the cgroup, the same program runs there.
  report.loopback_errno = connect_to(CANARY_BACKEND, CANARY_PORT, report);
  report.seen.rewrite_errno = connect_to(CANARY_VIP, CANARY_PORT, report);
  const int refused = connect_to(CANARY_VIP, CANARY_REFUSED_PORT, report);
  // Without our program there is no route to the VIP, or there is one: neither is a refusal of ours.
  report.seen.refuse_errno = is_refusal(refused) ? refused : 0;
  report.done = true;
  _exit(0);
}

Result<void> run_in(int cgroup, Report& report) {
  // Not fork(): its exit would raise SIGCHLD in the host, and its handlers of pthread_atfork() would run.
  const long child = syscall(SYS_clone, 0, nullptr, nullptr, nullptr, 0);
  if (child < 0) {
    return fail_errno(errno, "starting the canary");
  }
  if (child == 0) {
    run_child(cgroup, report);
  }
  // In a frozen cgroup it does not run, but dies.
  constexpr int patience = 5000;  // milliseconds
  constexpr timespec pause{.tv_sec = 0, .tv_nsec = 1'000'000};
  for (int waited = 0; waited < patience; ++waited) {
    if (waitpid(static_cast<pid_t>(child), nullptr, __WALL | WNOHANG) != 0) {
      return {};
    }
    nanosleep(&pause, nullptr);
  }
  kill(static_cast<pid_t>(child), SIGKILL);
  while (waitpid(static_cast<pid_t>(child), nullptr, __WALL) < 0 && errno == EINTR) {
  }
  return fail(-ETIMEDOUT, "the canary did not end within 5 s: is the cgroup frozen?");
}

}  // namespace

Result<CanaryResult> run_canary(const Cgroup& cgroup) {
  void* page = mmap(nullptr, sizeof(Report), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (page == MAP_FAILED) {
    return fail_errno(errno, "memory for the canary");
  }
  const auto unmap = [](Report* report) { munmap(report, sizeof *report); };
  const std::unique_ptr<Report, decltype(unmap)> report(new (page) Report{}, unmap);

  auto ran = run_in(cgroup.fd.get(), *report);
  if (ran && report->join_errno == EBUSY) {
    // A cgroup that hands controllers down may hold no processes itself (cgroups(7), "no internal processes"). A child
    // cgroup runs its programs, too.
    const std::string name = "clusterip-canary-" + std::to_string(getpid());
    if (mkdirat(cgroup.fd.get(), name.c_str(), S_IRWXU) != 0) {
      return fail_errno(errno, "creating " + cgroup.path + "/" + name + " for the canary");
    }
    *report = {};
    if (const Fd child(openat(cgroup.fd.get(), name.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)); child) {
      ran = run_in(child.get(), *report);
    }
    unlinkat(cgroup.fd.get(), name.c_str(), AT_REMOVEDIR);
  }
  if (!ran) {
    return std::unexpected(ran.error());
  }
  const CanaryResult& seen = report->seen;
  const bool is_proof = report->done && seen.rewrite_errno == 0 && seen.refuse_errno != 0;
  if (report->join_errno != 0 && !is_proof) {
    return fail_errno(report->join_errno, "moving the canary into the cgroup " + cgroup.path);
  }
  if (report->socket_errno != 0) {
    return fail_errno(report->socket_errno, "a socket for the canary");
  }
  // Refused is reachable: 127.0.0.1 is a VIP itself, without a service at this port.
  if (report->loopback_errno != 0 && !is_refusal(report->loopback_errno)) {
    return fail_errno(report->loopback_errno, "the canary cannot tell, 127.0.0.1 is not reachable here (is lo up?)");
  }
  if (!report->done) {
    return fail(-ECHILD, "the canary died before it could tell");
  }
  return report->seen;
}

}  // namespace plugin
