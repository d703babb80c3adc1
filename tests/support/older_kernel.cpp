// SPDX-License-Identifier: BSD-2-Clause
#include "tests/support/older_kernel.h"

#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <future>
#include <thread>
#include <vector>

#include "tests/support/fd.h"
#include "tests/support/process.h"

namespace support {
namespace {

constexpr std::int32_t unknown_helper = 1 << 20;

/// The memory of the thread that called.
class Memory {
 public:
  explicit Memory(std::uint32_t thread)
      : fd_(checked(::open(("/proc/" + std::to_string(thread) + "/mem").c_str(), O_RDWR | O_CLOEXEC), "mem")) {}

  void read(std::uint64_t address, void* to, std::size_t size) const {
    checked(::pread(fd_.get(), to, size, static_cast<off_t>(address)), "reading the caller's memory");
  }
  /// Also where the caller could not: constants. Newer kernels want them to be writable first; the caller is a thread
  /// of this process.
  void write(std::uint64_t address, const void* from, std::size_t size) const {
    const auto page = static_cast<std::uint64_t>(::getpagesize());
    const std::uint64_t begin = address / page * page;
    checked(::mprotect(reinterpret_cast<void*>(begin), address + size - begin, PROT_READ | PROT_WRITE), "mprotect");
    checked(::pwrite(fd_.get(), from, size, static_cast<off_t>(address)), "writing the caller's memory");
  }

 private:
  Fd fd_;
};

void forget_helpers(const Lacking& lacking, const Memory& memory, const bpf_attr& attr) {
  std::vector<bpf_insn> program(attr.insn_cnt);
  memory.read(attr.insns, program.data(), program.size() * sizeof(bpf_insn));
  for (std::size_t i = 0; i < program.size(); ++i) {
    bpf_insn& one = program[i];
    if (one.code != (BPF_JMP | BPF_CALL) || one.src_reg != 0 ||
        !lacking.helpers.contains(static_cast<bpf_func_id>(one.imm)))
      continue;
    one.imm = unknown_helper;
    memory.write(attr.insns + i * sizeof one, &one, sizeof one);
  }
}

/// 0 when the call may go on to the kernel, else what it fails with.
int judge(const Lacking& lacking, const seccomp_notif& call) {
  const auto command = static_cast<bpf_cmd>(call.data.args[0]);
  if (command != BPF_PROG_LOAD && command != BPF_MAP_CREATE) return 0;
  const Memory memory(call.pid);
  bpf_attr attr{};
  memory.read(call.data.args[1], &attr, std::min<std::size_t>(call.data.args[2], sizeof attr));
  if (command == BPF_MAP_CREATE) return lacking.maps.contains(static_cast<bpf_map_type>(attr.map_type)) ? EINVAL : 0;
  const bool is_for_cgroup = attr.prog_type == BPF_PROG_TYPE_CGROUP_SOCK_ADDR ||
                             attr.prog_type == BPF_PROG_TYPE_CGROUP_SOCK || attr.prog_type == BPF_PROG_TYPE_SOCK_OPS;
  if (is_for_cgroup && lacking.hooks.contains(static_cast<bpf_attach_type>(attr.expected_attach_type))) return EINVAL;
  forget_helpers(lacking, memory, attr);
  return 0;
}

void answer_calls(const Lacking& lacking, int listener) {
  for (;;) {
    seccomp_notif call{};
    if (::ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &call) != 0) {
      if (errno == EINTR || errno == ENOENT) continue;  // ENOENT: the caller is gone
      return;
    }
    seccomp_notif_resp answer{};
    answer.id = call.id;
    answer.error = -judge(lacking, call);
    if (answer.error == 0) answer.flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE;
    ::ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &answer);
  }
}

/// From now on each bpf() of this thread, and of what it forks, is told to the descriptor.
int listen_for_bpf() {
  sock_filter filter[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_bpf, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  sock_fprog program{std::size(filter), filter};
  checked(::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS");
  return static_cast<int>(
      checked(::syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &program), "seccomp"));
}

}  // namespace

std::string in_child_without(const Lacking& lacking, const std::function<void()>& body) {
  return in_child([&] {
    // The thread has no filter, since it began before there was one. It ends with the child.
    std::promise<int> listener;
    std::thread([&lacking, future = listener.get_future()]() mutable { answer_calls(lacking, future.get()); }).detach();
    listener.set_value(listen_for_bpf());
    body();
  });
}

}  // namespace support
