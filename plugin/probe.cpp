// SPDX-License-Identifier: BSD-2-Clause
#include "plugin/probe.h"

#include <linux/bpf.h>
#include <linux/membarrier.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <span>

#include "plugin/fd.h"

namespace plugin {

namespace {

long bpf(bpf_cmd command, bpf_attr& attr) { return syscall(SYS_bpf, command, &attr, sizeof attr); }

constexpr bpf_insn move(std::uint8_t reg, std::int32_t value) {
  return {.code = BPF_ALU64 | BPF_MOV | BPF_K,
          .dst_reg = static_cast<std::uint8_t>(reg & 0xf),
          .src_reg = 0,
          .off = 0,
          .imm = value};
}
constexpr bpf_insn call(std::int32_t helper) {
  return {.code = BPF_JMP | BPF_CALL, .dst_reg = 0, .src_reg = 0, .off = 0, .imm = helper};
}
constexpr bpf_insn exit_program() {
  return {.code = BPF_JMP | BPF_EXIT, .dst_reg = 0, .src_reg = 0, .off = 0, .imm = 0};
}

/// 0 when a connect4 program with these instructions loads, else the errno.
int try_connect4(std::span<const bpf_insn> instructions) {
  bpf_attr attr;
  std::memset(&attr, 0, sizeof attr);
  attr.prog_type = BPF_PROG_TYPE_CGROUP_SOCK_ADDR;
  attr.expected_attach_type = BPF_CGROUP_INET4_CONNECT;
  attr.insns = reinterpret_cast<std::uint64_t>(instructions.data());
  attr.insn_cnt = static_cast<std::uint32_t>(instructions.size());
  static constexpr char license[] = "Dual BSD/GPL";
  attr.license = reinterpret_cast<std::uint64_t>(license);
  const Fd program(static_cast<int>(bpf(BPF_PROG_LOAD, attr)));
  return program ? 0 : errno;
}

int try_mappable_array() {
  bpf_attr attr;
  std::memset(&attr, 0, sizeof attr);
  attr.map_type = BPF_MAP_TYPE_ARRAY;
  attr.key_size = sizeof(std::uint32_t);
  attr.value_size = sizeof(std::uint64_t);
  attr.max_entries = 1;
  attr.map_flags = BPF_F_MMAPABLE;
  const Fd map(static_cast<int>(bpf(BPF_MAP_CREATE, attr)));
  return map ? 0 : errno;
}

/// A kernel that knows the command looks at the descriptor first and says EBADF; one that does not says EINVAL.
bool knows(bpf_cmd command, bpf_attr& attr) { return bpf(command, attr) < 0 && errno == EBADF; }

bool knows_link() {
  bpf_attr attr;
  std::memset(&attr, 0, sizeof attr);
  attr.link_create.prog_fd = static_cast<std::uint32_t>(-1);
  attr.link_create.target_fd = static_cast<std::uint32_t>(-1);
  attr.link_create.attach_type = BPF_CGROUP_INET4_CONNECT;
  return knows(BPF_LINK_CREATE, attr);
}

bool knows_batch() {
  bpf_attr attr;
  std::memset(&attr, 0, sizeof attr);
  attr.batch.map_fd = static_cast<std::uint32_t>(-1);
  return knows(BPF_MAP_UPDATE_BATCH, attr);
}

bool is_unsupported(int error) { return error == ENOSYS || error == EINVAL || error == E2BIG; }

}  // namespace

Result<Capabilities> probe() {
  Capabilities can;
  static constexpr bpf_insn allow[] = {move(BPF_REG_0, 1), exit_program()};
  const int connect4 = try_connect4(allow);
  if (connect4 == EPERM || connect4 == EACCES) {
    return fail(
        -EPERM,
        "bpf() is not permitted: the fast path needs CAP_BPF and CAP_NET_ADMIN (or root), and before Linux 5.11 "
        "room in RLIMIT_MEMLOCK");
  }
  if (connect4 != 0 && !is_unsupported(connect4)) {
    return fail_errno(connect4, "trying a cgroup/connect4 program");
  }
  can.connect4 = connect4 == 0;
  if (!can.connect4) {
    can.reason = connect4 == ENOSYS ? "this kernel has no bpf() (CONFIG_BPF_SYSCALL)"
                                    : "this kernel has no cgroup/connect4 programs (Linux 4.17, CONFIG_CGROUP_BPF)";
    return can;
  }

  const int map_memory = try_mappable_array();
  if (map_memory != 0 && !is_unsupported(map_memory)) {
    return fail_errno(map_memory, "trying a memory-mapped BPF array");
  }
  can.map_memory = map_memory == 0;
  if (!can.map_memory) {
    can.reason = "this kernel has no memory-mapped BPF arrays (Linux 5.5)";
  }

  static constexpr bpf_insn refuse[] = {move(BPF_REG_1, -ECONNREFUSED), call(BPF_FUNC_set_retval), move(BPF_REG_0, 0),
                                        exit_program()};
  can.set_errno = try_connect4(refuse) == 0;
  can.link = knows_link();
  can.batch = knows_batch();
  const long commands = syscall(SYS_membarrier, MEMBARRIER_CMD_QUERY, 0, 0);
  can.membarrier = commands > 0 && (commands & MEMBARRIER_CMD_GLOBAL);
  return can;
}

}  // namespace plugin
