// SPDX-License-Identifier: BSD-2-Clause
#include "fallback_proxy/datagrams.h"

#include <cerrno>
#include <cstring>

namespace userspace {
namespace {

// No UDP datagram is longer. Of a buffer, only the pages that datagrams have reached take memory.
constexpr std::size_t longest = 65536;
// The beginnings of the buffers are so far apart that they do not compete for the same lines of the cache.
constexpr std::size_t stride = longest + 64;

}  // namespace

SocketAddress UdpClient::socket_address() const {
  SocketAddress result;
  std::memcpy(&result.storage, &storage, length);
  result.length = length;
  return result;
}

bool UdpClient::operator==(const UdpClient& other) const {
  return length == other.length && std::memcmp(&storage, &other.storage, length) == 0;
}

Datagrams::Datagrams() : area_(std::make_unique_for_overwrite<char[]>(stride * most)) {
  for (std::size_t i = 0; i < most; ++i) {
    buffers_[i].iov_base = &area_[i * stride];
    headers_[i].msg_hdr.msg_iov = &buffers_[i];
    headers_[i].msg_hdr.msg_iovlen = 1;
  }
}

void Datagrams::empty_buffers(std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    buffers_[i].iov_len = longest;
    headers_[i].msg_hdr.msg_name = &sources_[i].storage;
    headers_[i].msg_hdr.msg_namelen = sizeof sources_[i].storage;
    headers_[i].msg_hdr.msg_control = &controls_[i];
    headers_[i].msg_hdr.msg_controllen = sizeof controls_[i];
  }
}

std::size_t Datagrams::receive(int fd) {
  empty_buffers(used_);
  const int count = ::recvmmsg(fd, headers_.data(), most, MSG_DONTWAIT, nullptr);
  used_ = count > 0 ? static_cast<std::size_t>(count) : 0;
  for (std::size_t i = 0; i < used_; ++i) {
    sources_[i].length = headers_[i].msg_hdr.msg_namelen;
    buffers_[i].iov_len = headers_[i].msg_len;
  }
  return used_;
}

unsigned Datagrams::device(std::size_t index) const {
  const msghdr& header = headers_[index].msg_hdr;
  const cmsghdr* part = CMSG_FIRSTHDR(&header);
  if (part == nullptr || part->cmsg_level != IPPROTO_IPV6 || part->cmsg_type != IPV6_PKTINFO) return 0;
  in6_pktinfo info{};
  std::memcpy(&info, CMSG_DATA(part), sizeof info);
  return info.ipi6_ifindex;
}

Datagrams::Sent Datagrams::send(int fd, std::size_t begin, std::size_t end, const UdpClient* client) {
  for (std::size_t i = begin; i < end; ++i) {
    msghdr& header = headers_[i].msg_hdr;
    header.msg_name = client == nullptr ? nullptr : const_cast<sockaddr_in6*>(&client->storage);
    header.msg_namelen = client == nullptr ? 0 : client->length;
    header.msg_control = nullptr;
    header.msg_controllen = 0;
  }
  Sent sent{.next = begin};
  std::size_t failed = end;
  while (sent.next < end) {
    const int count =
        ::sendmmsg(fd, &headers_[sent.next], static_cast<unsigned>(end - sent.next), MSG_DONTWAIT | MSG_NOSIGNAL);
    if (count > 0) {
      const std::size_t until = sent.next + static_cast<std::size_t>(count);
      for (; sent.next < until; ++sent.next) sent.bytes += buffers_[sent.next].iov_len;
    } else if (errno == ECONNREFUSED) {
      break;
    } else if (errno == EAGAIN || errno == EWOULDBLOCK || errno == ENOBUFS) {
      sent.dropped += end - sent.next;
      sent.next = end;
    } else if (failed != sent.next) {
      failed = sent.next;  // once more: the error may have been an earlier datagram's (EMSGSIZE by ICMP)
    } else {
      ++sent.dropped;
      ++sent.next;
    }
  }
  return sent;
}

}  // namespace userspace
