// SPDX-License-Identifier: BSD-2-Clause
//
// Where in the kernel the programs of clusterip.bpf.c run.
#pragma once

#include <linux/bpf.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

namespace plugin {

enum class Hook : std::uint8_t {
  connect4,  // stands for all: what it runs is the fast path that is live
  connect6,
  sendmsg4,
  sendmsg6,
  recvmsg4,
  recvmsg6,
  getpeer4,
  getpeer6,
  release,
  sock_ops,
};

struct HookInfo {
  Hook hook;
  const char* program;  // its name in clusterip.bpf.c, and of its pin
  bpf_prog_type program_type;
  bpf_attach_type attach_type;
};

inline constexpr std::array all_hooks{
    HookInfo{Hook::connect4, "sock4_connect", BPF_PROG_TYPE_CGROUP_SOCK_ADDR, BPF_CGROUP_INET4_CONNECT},
    HookInfo{Hook::connect6, "sock6_connect", BPF_PROG_TYPE_CGROUP_SOCK_ADDR, BPF_CGROUP_INET6_CONNECT},
    HookInfo{Hook::sendmsg4, "sock4_sendmsg", BPF_PROG_TYPE_CGROUP_SOCK_ADDR, BPF_CGROUP_UDP4_SENDMSG},
    HookInfo{Hook::sendmsg6, "sock6_sendmsg", BPF_PROG_TYPE_CGROUP_SOCK_ADDR, BPF_CGROUP_UDP6_SENDMSG},
    HookInfo{Hook::recvmsg4, "sock4_recvmsg", BPF_PROG_TYPE_CGROUP_SOCK_ADDR, BPF_CGROUP_UDP4_RECVMSG},
    HookInfo{Hook::recvmsg6, "sock6_recvmsg", BPF_PROG_TYPE_CGROUP_SOCK_ADDR, BPF_CGROUP_UDP6_RECVMSG},
    HookInfo{Hook::getpeer4, "sock4_getpeer", BPF_PROG_TYPE_CGROUP_SOCK_ADDR, BPF_CGROUP_INET4_GETPEERNAME},
    HookInfo{Hook::getpeer6, "sock6_getpeer", BPF_PROG_TYPE_CGROUP_SOCK_ADDR, BPF_CGROUP_INET6_GETPEERNAME},
    HookInfo{Hook::release, "sock_release", BPF_PROG_TYPE_CGROUP_SOCK, BPF_CGROUP_INET_SOCK_RELEASE},
    HookInfo{Hook::sock_ops, "sock_ops", BPF_PROG_TYPE_SOCK_OPS, BPF_CGROUP_SOCK_OPS},
};

constexpr std::size_t index_of(Hook hook) { return std::to_underlying(hook); }
constexpr const HookInfo& info_of(Hook hook) { return all_hooks[index_of(hook)]; }

inline std::string link_name(Hook hook) { return std::string(info_of(hook).program) + "_link"; }

/// A set of hooks.
class Hooks {
 public:
  constexpr Hooks() = default;
  constexpr bool contains(Hook hook) const { return (bits_ & bit(hook)) != 0; }
  constexpr void insert(Hook hook) { bits_ |= bit(hook); }
  constexpr bool includes(Hooks other) const { return (other.bits_ & ~bits_) == 0; }
  constexpr Hooks operator|(Hooks other) const { return Hooks(bits_ | other.bits_); }
  constexpr Hooks operator&(Hooks other) const { return Hooks(bits_ & other.bits_); }

 private:
  constexpr explicit Hooks(std::uint32_t bits) : bits_(bits) {}
  static constexpr std::uint32_t bit(Hook hook) { return 1u << std::to_underlying(hook); }
  std::uint32_t bits_ = 0;
};

template <class T>
using PerHook = std::array<T, all_hooks.size()>;

}  // namespace plugin
