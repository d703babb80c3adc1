// SPDX-License-Identifier: BSD-2-Clause
#include "plugin/privileges.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

namespace plugin {

PrivilegeSet privileges() {
  __user_cap_header_struct header{.version = _LINUX_CAPABILITY_VERSION_3, .pid = 0};
  __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3]{};
  PrivilegeSet effective{};
  if (syscall(SYS_capget, &header, data) == 0) {
    std::ranges::transform(data, effective.begin(), &__user_cap_data_struct::effective);
  }
  return effective;
}

bool has_privilege(unsigned capability) {
  return (privileges()[CAP_TO_INDEX(capability)] & CAP_TO_MASK(capability)) != 0;
}

}  // namespace plugin
