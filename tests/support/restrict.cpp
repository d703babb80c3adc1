// SPDX-License-Identifier: BSD-2-Clause
#include "tests/support/restrict.h"

#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/securebits.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

#include <cstddef>

#include "tests/support/fd.h"

namespace support {
namespace {

sock_filter statement(int code, std::uint32_t k) { return {static_cast<std::uint16_t>(code), 0, 0, k}; }

sock_filter skip_unless_equal(std::uint32_t k, std::uint8_t skipped) {
  return {BPF_JMP | BPF_JEQ | BPF_K, 0, skipped, k};
}

}  // namespace

void forbid(const std::vector<Forbidden>& calls) {
  std::vector<sock_filter> filter;
  for (const Forbidden& call : calls) {
    filter.push_back(statement(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)));
    filter.push_back(skip_unless_equal(static_cast<std::uint32_t>(call.system_call), call.command ? 3 : 1));
    if (call.command) {
      // The low half: the machines that this runs on are little-endian.
      filter.push_back(statement(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, args)));
      filter.push_back(skip_unless_equal(*call.command, 1));
    }
    filter.push_back(statement(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | static_cast<std::uint32_t>(call.error)));
  }
  filter.push_back(statement(BPF_RET | BPF_K, SECCOMP_RET_ALLOW));
  sock_fprog program{static_cast<unsigned short>(filter.size()), filter.data()};
  checked(::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS");
  checked(::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program), "PR_SET_SECCOMP");
}

void drop_capabilities() {
  checked(::prctl(PR_SET_SECUREBITS, SECBIT_NOROOT | SECBIT_NOROOT_LOCKED), "PR_SET_SECUREBITS");
  __user_cap_header_struct header{_LINUX_CAPABILITY_VERSION_3, 0};
  __user_cap_data_struct none[2] = {};
  checked(::syscall(SYS_capset, &header, none), "capset");
}

}  // namespace support
