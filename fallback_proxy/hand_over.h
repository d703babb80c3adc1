// SPDX-License-Identifier: BSD-2-Clause
//
// What serves passes from one process to the one that replaces it, over a connection to the old one's control socket.
// Each line is a JSON object; descriptors (SCM_RIGHTS) travel with the line that names them:
//
//    new                                       old
//    {"request": "take_over", "protocol": 1} ──►
//                                            ◄── {"protocol": 1, "pid", "version", "vips": [...]}; the control socket
//                                            ◄── {"sockets": [{"vip", "port", "protocol"}, ...]}; one for each name
//                                            ◄── ... {"sockets": []} is the last
//    reads its configuration into service
//    {"request": "ready"} ─────────────────────►
//                                            ◄── {"handed_over": true}; it accepts nothing more and drains
//                                            ◄── end of the connection: it has ended
//
// Both processes hold the same sockets, so that at any moment somebody accepts, and nothing that is queued is lost when
// one of them closes its copy. In place of a line the old one may send {"error": "..."}: it goes on serving, and the
// new one ends. So it does when the new one closes the connection before it is ready. The VIPs are those that
// connections of the old one may still need: they stay local until it has ended.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "config/config.h"
#include "config/fail.h"
#include "config/fd.h"
#include "fallback_proxy/control_client.h"
#include "fallback_proxy/service.h"

namespace userspace {

inline constexpr std::int64_t hand_over_protocol = 1;

/// So many can travel with one message (SCM_MAX_FD).
inline constexpr std::size_t max_descriptors = 253;

/// What a process hands over. The descriptors remain the owner's.
struct Offer {
  std::vector<std::pair<SocketName, int>> sockets;
  std::vector<config::Address> vips;
};

/// What a process has been handed.
struct Inheritance {
  std::string version;  // of the old process
  config::Fd control;
  std::map<SocketName, config::Fd> sockets;
  std::vector<config::Address> vips;
};

/// Lines with the descriptors that travel with them. `control` is the listening control socket.
struct Message {
  std::string line;
  std::vector<int> descriptors;
};
std::vector<Message> messages(const Offer& offer, int control, std::string_view version);

/// sendmsg(2), never blocks: returns what it does.
ssize_t send_with_descriptors(int socket, std::string_view bytes, std::span<const int> descriptors);

// The new process's side.

config::Result<Inheritance> take_over(ControlClient& predecessor);
/// True when the predecessor serves no more; false when it has died instead of answering.
config::Result<bool> say_ready(ControlClient& predecessor);

}  // namespace userspace
