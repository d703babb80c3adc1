// SPDX-License-Identifier: BSD-2-Clause
#include "plugin/grace_period.h"

#include <bpf/bpf.h>
#include <linux/membarrier.h>
#include <sys/syscall.h>

#include <cerrno>
#include <cstdint>

namespace plugin {

Result<GracePeriod> GracePeriod::create() {
  GracePeriod grace;
  const long commands = syscall(SYS_membarrier, MEMBARRIER_CMD_QUERY, 0, 0);
  if (commands > 0 && (commands & MEMBARRIER_CMD_GLOBAL)) {
    return grace;
  }
  // Under nohz_full the kernel refuses MEMBARRIER_CMD_GLOBAL. An update of a map-in-map waits for RCU readers, too
  // (kernel/bpf/syscall.c, maybe_wait_bpf_programs).
  grace.inner_ =
      Fd(bpf_map_create(BPF_MAP_TYPE_ARRAY, "Grace_Inner", sizeof(std::uint32_t), sizeof(std::uint32_t), 1, nullptr));
  if (!grace.inner_) {
    return fail_errno(errno, "creating a map to wait with");
  }
  LIBBPF_OPTS(bpf_map_create_opts, options, .inner_map_fd = static_cast<__u32>(grace.inner_.get()));
  grace.outer_ = Fd(bpf_map_create(BPF_MAP_TYPE_ARRAY_OF_MAPS, "Grace_Outer", sizeof(std::uint32_t),
                                   sizeof(std::uint32_t), 1, &options));
  if (!grace.outer_) {
    return fail_errno(errno, "creating a map of maps to wait with");
  }
  return grace;
}

Result<void> GracePeriod::wait() const {
  if (!outer_) {
    if (syscall(SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) != 0) {
      return fail_errno(errno, "membarrier, to wait for running programs");
    }
    return {};
  }
  const std::uint32_t index = 0;
  const int value = inner_.get();
  if (bpf_map_update_elem(outer_.get(), &index, &value, BPF_ANY) != 0) {
    return fail_errno(errno, "updating a map of maps, to wait for running programs");
  }
  return {};
}

bool GracePeriod::is_worth_it(std::uint64_t retired, std::uint64_t capacity) { return retired > capacity / 2; }

}  // namespace plugin
