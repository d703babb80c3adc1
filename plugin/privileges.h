// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <linux/capability.h>

#include <array>
#include <cstdint>

namespace plugin {

/// The effective capabilities of this thread, as capget(2) gives them. None when it does not say.
using PrivilegeSet = std::array<std::uint32_t, _LINUX_CAPABILITY_U32S_3>;
PrivilegeSet privileges();

/// Whether `capability` (CAP_*) is one of them.
bool has_privilege(unsigned capability);

}  // namespace plugin
