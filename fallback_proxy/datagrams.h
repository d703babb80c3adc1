// SPDX-License-Identifier: BSD-2-Clause
//
// Datagrams on their way through a thread: read by one system call, written by another. One object per thread.
#pragma once

#include <netinet/in.h>
#include <sys/socket.h>

#include <array>
#include <cstddef>
#include <memory>

#include "fallback_proxy/backend.h"

namespace userspace {

/// Where a datagram comes from, as the kernel writes it: an address takes the same bytes each time.
struct UdpClient {
  SocketAddress socket_address() const;
  bool operator==(const UdpClient& other) const;

  sockaddr_in6 storage{};  // or a sockaddr_in
  socklen_t length = 0;
};

class Datagrams {
 public:
  /// So many are read at once.
  static constexpr std::size_t most = 32;

  Datagrams();
  Datagrams(const Datagrams&) = delete;
  Datagrams& operator=(const Datagrams&) = delete;

  /// Reads what has come, whole, at most `most`; returns how many. 0 leaves errno.
  std::size_t receive(int fd);

  const UdpClient& source(std::size_t index) const { return sources_[index]; }
  /// The index of the device that it came in by, until it is sent; 0 where the socket does not tell (IPV6_RECVPKTINFO).
  unsigned device(std::size_t index) const;

  struct Sent {
    std::size_t next = 0;  // the first that was neither sent nor dropped: a refusal came between
    std::size_t bytes = 0;
    std::size_t dropped = 0;
  };
  /// Writes those from `begin` on and before `end`, to `client` or, when that is null, to what the socket is connected
  /// to. What the kernel does not take is dropped. Stops at ECONNREFUSED, which is the answer to an earlier datagram.
  Sent send(int fd, std::size_t begin, std::size_t end, const UdpClient* client);

 private:
  void empty_buffers(std::size_t count);

  struct alignas(cmsghdr) Control {
    char bytes[CMSG_SPACE(sizeof(in6_pktinfo))];
  };

  std::unique_ptr<char[]> area_;
  std::array<mmsghdr, most> headers_{};
  std::array<iovec, most> buffers_{};
  std::array<UdpClient, most> sources_;
  std::array<Control, most> controls_{};
  std::size_t used_ = most;  // headers that do not describe an empty buffer
};

}  // namespace userspace
