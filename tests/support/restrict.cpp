// SPDX-License-Identifier: BSD-2-Clause
#include "tests/support/restrict.h"

#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/securebits.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>

#include "tests/support/fd.h"

namespace support {
namespace {

sock_filter statement(int code, std::uint32_t k) { return {static_cast<std::uint16_t>(code), 0, 0, k}; }

sock_filter skip_unless_equal(std::uint32_t k, std::uint8_t skipped) {
  return {BPF_JMP | BPF_JEQ | BPF_K, 0, skipped, k};
}

void install(std::vector<sock_filter>& filter) {
  sock_fprog program{static_cast<unsigned short>(filter.size()), filter.data()};
  checked(::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS");
  checked(::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program), "PR_SET_SECCOMP");
}

}  // namespace

namespace {

void install_for(const std::vector<Forbidden>& calls, bool dies) {
  std::vector<sock_filter> filter;
  for (const Forbidden& call : calls) {
    filter.push_back(statement(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)));
    filter.push_back(skip_unless_equal(static_cast<std::uint32_t>(call.system_call), call.command ? 3 : 1));
    if (call.command) {
      // The low half: the machines that this runs on are little-endian.
      filter.push_back(statement(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, args)));
      filter.push_back(skip_unless_equal(*call.command, 1));
    }
    filter.push_back(statement(
        BPF_RET | BPF_K, dies ? SECCOMP_RET_KILL_PROCESS : SECCOMP_RET_ERRNO | static_cast<std::uint32_t>(call.error)));
  }
  filter.push_back(statement(BPF_RET | BPF_K, SECCOMP_RET_ALLOW));
  install(filter);
}

}  // namespace

void forbid(const std::vector<Forbidden>& calls) { install_for(calls, false); }

void die_at(long system_call, std::uint32_t command) { install_for({{system_call, command, 0}}, true); }

void forbid_watching_from(std::uint32_t descriptor) {
  const auto argument = [](std::size_t index) {
    return statement(BPF_LD | BPF_W | BPF_ABS,
                     static_cast<std::uint32_t>(offsetof(seccomp_data, args) + index * sizeof(std::uint64_t)));
  };
  std::vector<sock_filter> filter = {
      statement(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      skip_unless_equal(SYS_epoll_ctl, 5),
      argument(1),
      skip_unless_equal(EPOLL_CTL_ADD, 3),
      argument(2),
      {BPF_JMP | BPF_JGE | BPF_K, 0, 1, descriptor},
      statement(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSPC),
      statement(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  install(filter);
}

void drop_capabilities_except(const std::vector<unsigned>& kept) {
  __user_cap_header_struct header{_LINUX_CAPABILITY_VERSION_3, 0};
  __user_cap_data_struct data[2] = {};
  for (const unsigned capability : kept) {
    data[capability / 32].effective |= 1u << capability % 32;
    data[capability / 32].permitted |= 1u << capability % 32;
    data[capability / 32].inheritable |= 1u << capability % 32;
  }
  checked(::prctl(PR_SET_SECUREBITS, SECBIT_NOROOT | SECBIT_NOROOT_LOCKED), "PR_SET_SECUREBITS");
  // Of the capabilities that this kernel knows; the next number is none.
  for (unsigned capability = 0; ::prctl(PR_CAPBSET_READ, capability) >= 0; ++capability)
    if (std::ranges::find(kept, capability) == kept.end())
      checked(::prctl(PR_CAPBSET_DROP, capability), "PR_CAPBSET_DROP");
  checked(::syscall(SYS_capset, &header, data), "capset");
  // A program that is run then has these, too.
  for (const unsigned capability : kept)
    checked(::prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability, 0, 0), "PR_CAP_AMBIENT_RAISE");
}

FewFiles::FewFiles(unsigned more) {
  checked(::getrlimit(RLIMIT_NOFILE, &before_), "RLIMIT_NOFILE");
  const Fd next(checked(::dup(STDIN_FILENO), "dup"));  // the lowest that is free
  const rlimit few{static_cast<rlim_t>(next.get()) + more, before_.rlim_max};
  checked(::setrlimit(RLIMIT_NOFILE, &few), "RLIMIT_NOFILE");
}

FewFiles::~FewFiles() { ::setrlimit(RLIMIT_NOFILE, &before_); }

}  // namespace support
