// SPDX-License-Identifier: BSD-2-Clause
//
// What is set on sockets, and why. Failures are ignored: each option only makes a connection better.
#pragma once

namespace userspace {

/// Whoever wants to wait for more bytes before sending has done so already.
void set_no_delay(int fd);

/// Finds a peer that has died: after a minute of silence it is asked every 15 s; one that has not answered for 5
/// minutes, or has not acknowledged data for so long, is gone (tcp(7): TCP_USER_TIMEOUT overrides the number of
/// probes). It is no shorter because a peer that lives but reads nothing would end as well.
void set_keep_alive(int fd);

/// close() sends RST and forgets what is unsent.
void set_reset_on_close(int fd);

}  // namespace userspace
