// SPDX-License-Identifier: BSD-2-Clause
#include "cli/outcome.h"

#include <cerrno>

namespace cli {

Exit exit_for(int error, Call call) {
  switch (-error) {
    case 0:
      return Exit::fine;
    case EBADMSG:
      return Exit::configuration;
    case EOPNOTSUPP:
    case EPERM:
    case EACCES:
    case ENOSYS:
    case ENOENT:
    case ENOTDIR:
    case ENODEV:
      return Exit::unsupported;
    case EINVAL:
      // Open says so of a path on a filesystem of the wrong kind; elsewhere it would be a misuse, that is a bug.
      return call == Call::open ? Exit::unsupported : Exit::failed;
    default:
      return Exit::failed;
  }
}

}  // namespace cli
