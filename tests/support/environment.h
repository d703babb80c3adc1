// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <string>

namespace support {

/// Where the tests' BPF filesystem is: mounted privately, so that two test processes never meet there.
inline constexpr const char* bpffs = "/sys/fs/bpf";

/// Give this process a network namespace with nothing but `lo`, a mount namespace, and a BPF filesystem of its own. All
/// of it ends with the process. To be called once, before the first thread. What is missing is told by
/// missing_privilege. With CLUSTERIP_WITHOUT_BPF, what the userspace engine needs: the kernel may have no BPF.
void enter_private_environment();

/// Bring up `lo` of the network namespace that this thread is in.
void raise_loopback();

/// Why tests that need the kernel cannot run here; empty when they can.
const std::string& missing_privilege();

/// Whether a test that cannot run here fails rather than be skipped: CLUSTERIP_REQUIRE_PRIVILEGE is set.
bool must_run();

/// The mount point of the cgroup v2 hierarchy; empty when there is none.
std::string cgroup2_mount();

}  // namespace support
