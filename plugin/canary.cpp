// SPDX-License-Identifier: BSD-2-Clause
#include "plugin/canary.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>
#include <string>

#include "bpf/map_layout.h"

namespace plugin {

namespace {

/// Shared with the child.
struct Report {
  int join_errno;  // of moving into the cgroup
  bool done;
  CanaryResult seen;
};

sockaddr_in canary_address(std::uint16_t port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(CANARY_VIP);
  return address;
}

/// Connects to the canary's VIP; 0 or the errno. EADDRNOTAVAIL when it worked, but not by a rewrite to the loopback
/// address: the kernel chose another source.
int connect_to(std::uint16_t port) {
  const Fd fd(socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  const sockaddr_in address = canary_address(port);
  if (!fd || connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
    return errno;
  }
  sockaddr_in local{};
  socklen_t length = sizeof local;
  if (getsockname(fd.get(), reinterpret_cast<sockaddr*>(&local), &length) != 0) {
    return errno;
  }
  return local.sin_addr.s_addr == htonl(CANARY_BACKEND) ? 0 : EADDRNOTAVAIL;
}

/// In the child: nothing but system calls, since other threads of the host may have held locks when it was made.
[[noreturn]] void run_child(int cgroup, Report& report) {
  const int procs = openat(cgroup, "cgroup.procs", O_WRONLY | O_CLOEXEC);
  if (procs < 0 || write(procs, "0", 1) != 1) {
    report.join_errno = errno;
    _exit(1);
  }
  report.seen.rewrite_errno = connect_to(CANARY_PORT);
  const int refused = connect_to(CANARY_REFUSED_PORT);
  // Without our program there is no route to the VIP, or there is one: neither is a refusal of ours.
  report.seen.refuse_errno = refused == ECONNREFUSED || refused == EPERM ? refused : 0;
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
  int status = 0;
  while (waitpid(static_cast<pid_t>(child), &status, __WALL) < 0 && errno == EINTR) {
  }
  return {};
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
  if (report->join_errno != 0) {
    return fail_errno(report->join_errno, "moving the canary into the cgroup " + cgroup.path);
  }
  if (!report->done) {
    return fail(-ECHILD, "the canary died before it could tell");
  }
  return report->seen;
}

}  // namespace plugin
