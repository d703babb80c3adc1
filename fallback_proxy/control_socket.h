// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <sys/un.h>

#include <string>

#include "config/fail.h"
#include "config/fd.h"

namespace userspace {

/// `path` has at most 107 bytes.
sockaddr_un control_address(const std::string& path);

/// A listening socket at `path`, for this user only. Makes the directory if need be, and replaces the file that a
/// killed process has left. -EADDRINUSE: a process listens there; the message names it.
config::Result<config::Fd> listen_control(const std::string& path);

/// Listens on the socket that another process has handed over, in the name of this process from now on: clients see
/// its pid.
void adopt_control(int socket);

}  // namespace userspace
