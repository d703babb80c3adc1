// SPDX-License-Identifier: BSD-2-Clause
#include "plugin/probe.h"

#include <linux/bpf.h>
#include <linux/membarrier.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "plugin/fd.h"
#include "plugin/privileges.h"

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
/// To the stack, 8 bytes below its end. `size`: BPF_DW, BPF_W.
constexpr bpf_insn store(std::uint8_t size, std::uint8_t reg) {
  return {.code = static_cast<std::uint8_t>(BPF_STX | BPF_MEM | size),
          .dst_reg = BPF_REG_10,
          .src_reg = static_cast<std::uint8_t>(reg & 0xf),
          .off = -8,
          .imm = 0};
}
constexpr bpf_insn exit_program() {
  return {.code = BPF_JMP | BPF_EXIT, .dst_reg = 0, .src_reg = 0, .off = 0, .imm = 0};
}

/// What was lacking is no property of this kernel: another time there may be enough.
bool is_shortage(int error) {
  return error == ENOMEM || error == EMFILE || error == ENFILE || error == EAGAIN || error == EINTR;
}

/// What is tried, one after the other. A shortage tells nothing, and so leaves all of it untold.
class Trials {
 public:
  /// 0 when a program of this hook with these instructions loads, else the errno. `log` receives what the verifier
  /// says.
  int program(Hook hook, std::span<const bpf_insn> instructions, std::span<char> log = {});
  /// Whether programs of this hook may call the helper. The call has no arguments: a kernel that knows the helper
  /// complains of those, another one of the helper.
  bool may_call(Hook hook, bpf_func_id helper);
  bool ring_buffer();
  int mappable_array();

  /// The errno of a shortage that was met; 0.
  int shortage() const { return shortage_; }

 private:
  int noted(const Fd& made) {
    const int error = made ? 0 : errno;
    if (is_shortage(error)) {
      shortage_ = error;
    }
    return error;
  }

  int shortage_ = 0;
};

int Trials::program(Hook hook, std::span<const bpf_insn> instructions, std::span<char> log) {
  const HookInfo& info = info_of(hook);
  bpf_attr attr;
  std::memset(&attr, 0, sizeof attr);
  attr.prog_type = info.program_type;
  attr.expected_attach_type = info.attach_type;
  if (!log.empty()) {
    attr.log_buf = reinterpret_cast<std::uint64_t>(log.data());
    attr.log_size = static_cast<std::uint32_t>(log.size());
    attr.log_level = 1;
  }
  attr.insns = reinterpret_cast<std::uint64_t>(instructions.data());
  attr.insn_cnt = static_cast<std::uint32_t>(instructions.size());
  static constexpr char license[] = "Dual BSD/GPL";
  attr.license = reinterpret_cast<std::uint64_t>(license);
  return noted(Fd(static_cast<int>(bpf(BPF_PROG_LOAD, attr))));
}

bool Trials::may_call(Hook hook, bpf_func_id helper) {
  const bpf_insn instructions[] = {call(helper), move(BPF_REG_0, 1), exit_program()};
  std::array<char, 4096> log{};
  if (program(hook, instructions, log) == 0) {
    return true;
  }
  const std::string_view said(log.data());
  return !said.empty() && !said.contains("unknown func") && !said.contains("invalid func") &&
         !said.contains("cannot use helper");
}

bool Trials::ring_buffer() {
  bpf_attr attr;
  std::memset(&attr, 0, sizeof attr);
  attr.map_type = BPF_MAP_TYPE_RINGBUF;
  attr.max_entries = static_cast<std::uint32_t>(sysconf(_SC_PAGESIZE));
  return noted(Fd(static_cast<int>(bpf(BPF_MAP_CREATE, attr)))) == 0;
}

int Trials::mappable_array() {
  bpf_attr attr;
  std::memset(&attr, 0, sizeof attr);
  attr.map_type = BPF_MAP_TYPE_ARRAY;
  attr.key_size = sizeof(std::uint32_t);
  attr.value_size = sizeof(std::uint64_t);
  attr.max_entries = 1;
  attr.map_flags = BPF_F_MMAPABLE;
  return noted(Fd(static_cast<int>(bpf(BPF_MAP_CREATE, attr))));
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

/// What an answer depends on beside the kernel: a child, or a process that gave up a capability, has to ask again.
struct Asker {
  pid_t process = getpid();
  PrivilegeSet effective = privileges();
  bool operator==(const Asker&) const = default;
};

Result<Capabilities> try_all() {
  Capabilities can;
  Trials trials;
  static constexpr bpf_insn allow[] = {move(BPF_REG_0, 1), exit_program()};
  const int connect4 = trials.program(Hook::connect4, allow);
  if (connect4 == EPERM || connect4 == EACCES) {
    return fail(
        -EPERM,
        "bpf() is not permitted: the fast path needs CAP_BPF and CAP_NET_ADMIN (or root), and before Linux 5.11 "
        "room in RLIMIT_MEMLOCK");
  }
  if (connect4 != 0 && !is_unsupported(connect4)) {
    return fail_errno(connect4, "trying a cgroup/connect4 program");
  }
  if (connect4 != 0) {
    can.reason = connect4 == ENOSYS ? "this kernel has no bpf() (CONFIG_BPF_SYSCALL)"
                                    : "this kernel has no cgroup/connect4 programs (Linux 4.17, CONFIG_CGROUP_BPF)";
    return can;
  }

  // Before Linux 6.8 the verifier takes a number that the compiler has put on the stack for a pointer, and lets only
  // those who may see pointers overwrite a part of it (ab125ed3ec1c, "bpf: fix check for attempt to corrupt spilled
  // pointer").
  static constexpr bpf_insn overwrite[] = {move(BPF_REG_1, 1), store(BPF_DW, BPF_REG_1), store(BPF_W, BPF_REG_1),
                                           move(BPF_REG_0, 1), exit_program()};
  if (trials.program(Hook::connect4, overwrite) == EACCES) {
    return fail(-EPERM,
                "this kernel's verifier asks for CAP_PERFMON beside CAP_BPF and CAP_NET_ADMIN (before Linux 6.8)");
  }

  const int map_memory = trials.mappable_array();
  if (map_memory != 0 && !is_unsupported(map_memory)) {
    return fail_errno(map_memory, "trying a memory-mapped BPF array");
  }
  can.map_memory = map_memory == 0;
  if (!can.map_memory) {
    can.reason = "this kernel has no memory-mapped BPF arrays (Linux 5.5)";
  }

  for (const HookInfo& info : all_hooks) {
    if (info.hook == Hook::connect4 || trials.program(info.hook, allow) == 0) {
      can.hooks.insert(info.hook);
    }
  }
  can.sessions = trials.may_call(Hook::connect4, BPF_FUNC_sk_storage_get);
  if (can.map_memory && !can.sessions) {
    can.reason = "this kernel has no socket storage for cgroup/connect4 programs (Linux 5.3)";
  }
  can.mark = trials.may_call(Hook::connect4, BPF_FUNC_setsockopt);
  can.netns_client = trials.may_call(Hook::connect4, BPF_FUNC_get_netns_cookie);
  can.cgroup_client = trials.may_call(Hook::connect4, BPF_FUNC_get_current_cgroup_id);
  can.events = trials.ring_buffer() && trials.may_call(Hook::connect4, BPF_FUNC_ringbuf_reserve) && can.cgroup_client &&
               trials.may_call(Hook::connect4, BPF_FUNC_get_current_pid_tgid);
  can.comm = trials.may_call(Hook::connect4, BPF_FUNC_get_current_comm);

  static constexpr bpf_insn refuse[] = {move(BPF_REG_1, -ECONNREFUSED), call(BPF_FUNC_set_retval), move(BPF_REG_0, 0),
                                        exit_program()};
  can.set_errno = trials.program(Hook::connect4, refuse) == 0;
  can.link = knows_link();
  can.batch = knows_batch();
  const long commands = syscall(SYS_membarrier, MEMBARRIER_CMD_QUERY, 0, 0);
  can.membarrier = commands > 0 && (commands & MEMBARRIER_CMD_GLOBAL);
  if (trials.shortage() != 0) {
    return fail_errno(trials.shortage(), "trying what this kernel can do");
  }
  return can;
}

}  // namespace

Result<Capabilities> probe() {
  static std::mutex mutex;
  static std::optional<std::pair<Asker, Capabilities>> known;
  const Asker asker;
  const std::lock_guard lock(mutex);
  if (known && known->first == asker) {
    return known->second;
  }
  auto can = try_all();
  if (can) {
    known.emplace(asker, *can);
  }
  return can;
}

std::string Capabilities::reason_against(const config::Service& service) const {
  if (service.engine == config::EngineMode::userspace) {
    return "it asks for the engine userspace";
  }
  if (service.proxy_protocol != config::ProxyProtocol::none) {
    return "proxy_protocol: only a proxy sends a header";
  }
  if (service.vip.is_v6() && !hooks.contains(Hook::connect6)) {
    return "this kernel has no cgroup/connect6 programs";
  }
  if (service.protocol == config::Protocol::udp) {
    const bool v6 = service.vip.is_v6();
    if (!hooks.contains(v6 ? Hook::sendmsg6 : Hook::sendmsg4)) {
      return "UDP: this kernel has no cgroup/sendmsg programs (Linux 4.18)";
    }
    if (!hooks.contains(v6 ? Hook::recvmsg6 : Hook::recvmsg4)) {
      return "UDP: this kernel has no cgroup/recvmsg programs (Linux 5.2), replies would come from the backend";
    }
  }
  if (service.policy == config::Policy::least_conn && !hooks.contains(Hook::release)) {
    return "policy \"least_conn\": this kernel has no cgroup/sock_release programs (Linux 5.9), closed connections "
           "would "
           "count on";
  }
  if (service.eject && !hooks.contains(Hook::sock_ops)) {
    return "eject: this kernel has no sock_ops programs (Linux 4.16), which see connects fail";
  }
  if (service.mark != 0 && !mark) {
    return "mark: this kernel has no bpf_setsockopt() in cgroup/connect programs (Linux 5.8), and fallback_proxy sets "
           "none";
  }
  if (service.affinity || service.policy == config::Policy::maglev) {
    if (service.client == config::Client::netns && !netns_client) {
      return "client \"netns\": this kernel has no network namespace cookies (Linux 5.7)";
    }
    if (service.client == config::Client::cgroup && !cgroup_client) {
      return "client \"cgroup\": this kernel does not tell programs the cgroup (Linux 5.7)";
    }
  }
  return {};
}

std::string Capabilities::shortcoming(const config::Service& service, bool peer_names,
                                      const std::function<bool()>& can_end_sockets) const {
  if (peer_names && !hooks.contains(service.vip.is_v6() ? Hook::getpeer6 : Hook::getpeer4)) {
    return "getpeername() shows the backend: this kernel has no cgroup/getpeername programs (Linux 5.8)";
  }
  const bool ends_sockets = service.on_remove == config::OnRemove::reset ||
                            (service.protocol == config::Protocol::udp && service.on_remove != config::OnRemove::keep);
  if (ends_sockets && !can_end_sockets()) {
    return "connected sockets stay with a backend that leaves: ending them takes Linux 6.5 with BTF, and CAP_PERFMON";
  }
  return {};
}

}  // namespace plugin
