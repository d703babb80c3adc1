// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include "config/fail.h"

namespace userspace {

/// Asio does not look at whether epoll takes the descriptors by which it wakes its threads, keeps time and hears of
/// signals; where it has no room for one (fs.epoll.max_user_watches), something would never happen. Fails when one of
/// this process's is in no epoll. To be asked when those are made, and before others make pipes.
config::Result<void> check_watched();

}  // namespace userspace
