// SPDX-License-Identifier: BSD-2-Clause
//
// What is set on sockets, and why. Failures are ignored: each option only makes a connection better.
#pragma once

namespace userspace {

/// Whoever wants to wait for more bytes before sending has done so already.
void set_no_delay(int fd);

/// Finds a peer that has died: after two minutes of silence it is asked every minute, and one that has answered nothing
/// for 15 minutes, or acknowledged no data, is gone (tcp(7); TCP_USER_TIMEOUT overrides the number of probes). No
/// sooner, because the kernel also ends a peer that lives but has not read for that long (seen on 6.18: a window that
/// stays at zero), and on the fast path such a reader may pause as long as it likes.
void set_keep_alive(int fd);

/// close() sends RST and forgets what is unsent.
void set_reset_on_close(int fd);

}  // namespace userspace
