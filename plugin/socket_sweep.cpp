// SPDX-License-Identifier: BSD-2-Clause
#include "plugin/socket_sweep.h"

#include <bpf/bpf.h>
#include <bpf/btf.h>
#include <bpf/libbpf.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <sched.h>
#include <socket_sweep.skel.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <system_error>
#include <utility>
#include <vector>

#include "plugin/fd.h"
#include "plugin/privileges.h"
#include "plugin/system_error.h"

namespace plugin {

namespace {

struct Destroy {
  void operator()(socket_sweep_bpf* skeleton) const { socket_sweep_bpf__destroy(skeleton); }
};
using Skeleton = std::unique_ptr<socket_sweep_bpf, Destroy>;

/// CAP_PERFMON, or before Linux 5.8 CAP_SYS_ADMIN.
bool may_trace() { return has_privilege(CAP_PERFMON) || has_privilege(CAP_SYS_ADMIN); }

/// Network namespaces, as far as this process may look.
struct Namespaces {
  ino_t own = 0;
  std::map<ino_t, Fd> others;  // that some process is in
  bool is_all = true;
};

Namespaces all_namespaces() {
  Namespaces found;
  struct stat status{};
  if (stat("/proc/self/ns/net", &status) == 0) {
    found.own = status.st_ino;
  }
  std::error_code ignored;
  for (const auto& process : std::filesystem::directory_iterator("/proc", ignored)) {
    if (process.path().filename().string().find_first_not_of("0123456789") != std::string::npos) {
      continue;
    }
    const std::string path = process.path().string() + "/ns/net";
    if (stat(path.c_str(), &status) != 0) {
      const bool is_hidden = errno == EACCES && !has_privilege(CAP_SYS_PTRACE);  // else it has just ended
      found.is_all = found.is_all && !is_hidden;
    } else if (status.st_ino != found.own && !found.others.contains(status.st_ino)) {
      if (!has_privilege(CAP_SYS_ADMIN)) {  // without which it can be seen, but not entered
        found.is_all = false;
      } else if (Fd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC)); fd) {
        found.others.emplace(status.st_ino, std::move(fd));
      }
    }
  }
  return found;
}

struct Excursion {
  int network_namespace;
  int link;
  int iterator;
  int error;
};

/// In a child that shares memory and descriptors with us, but not the namespace: only system calls.
int create_iterator_there(void* argument) {
  auto& excursion = *static_cast<Excursion*>(argument);
  if (setns(excursion.network_namespace, CLONE_NEWNET) == 0) {
    excursion.iterator = bpf_iter_create(excursion.link);
  }
  excursion.error = excursion.iterator < 0 ? errno : 0;
  syscall(SYS_exit,
          0);  // not _exit(): AddressSanitizer takes a call that does not return to be on the thread's own stack
  return 0;
}

/// An iterator goes over the sockets of the namespace in which it was made. No thread of the host ever changes its own.
Result<Fd> create_iterator_in(const Fd& network_namespace, const Fd& link) {
  constexpr std::size_t stack_size = std::size_t{64} * 1024;
  const auto stack = std::make_unique<std::byte[]>(stack_size);
  Excursion excursion{.network_namespace = network_namespace.get(), .link = link.get(), .iterator = -1, .error = 0};
  const pid_t child =
      clone(create_iterator_there, stack.get() + stack_size, CLONE_VM | CLONE_VFORK | CLONE_FILES, &excursion);
  if (child < 0) {
    return fail_errno(errno, "entering a network namespace");
  }
  while (waitpid(child, nullptr, __WALL) < 0 && errno == EINTR) {
  }
  if (excursion.iterator < 0) {
    return fail_errno(excursion.error, "entering a network namespace");
  }
  return Fd(excursion.iterator);
}

/// Reading an iterator to its end is what runs its program for each socket.
Result<void> run(const Fd& iterator) {
  char nothing[64];
  for (;;) {
    const ssize_t size = read(iterator.get(), nothing, sizeof nothing);
    if (size == 0) {
      return {};
    }
    if (size < 0 && errno != EAGAIN && errno != EINTR) {
      return fail_errno(errno, "going over the sockets of a network namespace");
    }
  }
}

Result<void> sweep_all(const bpf_program* program, const Namespaces& namespaces) {
  const Fd link(bpf_link_create(bpf_program__fd(program), 0, BPF_TRACE_ITER, nullptr));
  if (!link) {
    return fail_errno(errno, "making an iterator over sockets");
  }
  const Fd here(bpf_iter_create(link.get()));
  auto result = here ? run(here) : fail_errno(errno, "making an iterator over sockets");
  for (const auto& [inode, network_namespace] : namespaces.others) {
    const auto iterator = create_iterator_in(network_namespace, link);
    auto ran = iterator ? run(*iterator) : std::unexpected(iterator.error());
    if (!ran && result) {
      result = std::move(ran);  // and on, to the next
    }
  }
  return result;
}

Result<void> try_to_end(const Maps& maps, const Sweep& sweep) {
  std::vector<char> log(std::size_t{64} * 1024);
  LIBBPF_OPTS(bpf_object_open_opts, options, .kernel_log_buf = log.data(), .kernel_log_size = log.size());
  const Skeleton skeleton(socket_sweep_bpf__open_opts(&options));
  if (!skeleton) {
    return fail_errno(errno, "opening the compiled-in BPF object");
  }
  bpf_program__set_autoload(skeleton->progs.end_udp, sweep.udp);
  bpf_program__set_autoload(skeleton->progs.end_tcp, sweep.tcp);
  if (bpf_map__reuse_fd(skeleton->maps.Session_Map, maps.sessions().get()) != 0 ||
      bpf_map__reuse_fd(skeleton->maps.Backend_Map, maps.backend_fd().get()) != 0) {
    return fail_errno(errno, "using the maps");
  }
  if (const int error = socket_sweep_bpf__load(skeleton.get()); error != 0) {
    return fail_errno(-error, "loading the iterators over sockets");
  }
  const auto namespaces = all_namespaces();
  Result<void> result;
  if (sweep.udp) {
    result = sweep_all(skeleton->progs.end_udp, namespaces);
  }
  if (sweep.tcp) {
    auto swept = sweep_all(skeleton->progs.end_tcp, namespaces);
    if (result) {
      result = std::move(swept);
    }
  }
  if (result && !namespaces.is_all) {
    return fail(-EACCES, "looking into the network namespaces of all processes takes CAP_SYS_PTRACE and CAP_SYS_ADMIN");
  }
  return result;
}

}  // namespace

bool can_end_sockets() {
  constexpr const char* path = "/sys/kernel/btf/vmlinux";
  enum Answer : std::uint8_t { unknown, yes, no };
  static std::atomic<Answer> known = unknown;  // it takes tens of milliseconds, and is true until the next boot
  if (!may_trace() || access(path, R_OK) != 0) {
    return false;
  }
  if (known != unknown) {
    return known == yes;
  }
  btf* types = btf__parse(path, nullptr);
  if (types == nullptr) {
    return false;
  }
  const bool found = btf__find_by_name_kind(types, "bpf_sock_destroy", BTF_KIND_FUNC) > 0;
  btf__free(types);
  known = found ? yes : no;
  return found;
}

std::string end_sockets(const Maps& maps, const Sweep& sweep) {
  const auto done = try_to_end(maps, sweep);
  return done ? std::string() : "connected sockets may stay with a backend that left: " + done.error().message;
}

}  // namespace plugin
