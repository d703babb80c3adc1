// SPDX-License-Identifier: BSD-2-Clause
#include "fallback_proxy/local_vips.h"

#include <fmt/format.h>
#include <libmnl/libmnl.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <linux/sock_diag.h>
#include <linux/unix_diag.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <optional>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "config/fail.h"

namespace userspace {
namespace {

using config::Address;
using config::Result;

constexpr std::uint32_t loopback = 1;  // the kernel makes it the first device of each network namespace

// The most that the kernel puts into one datagram of a dump; a request takes 76 bytes.
constexpr std::size_t buffer_size = std::size_t{32} * 1024;
constexpr int attempts = 10;  // of what others can disturb

constexpr std::string_view lock_name{"\0clusterip/local_vips", 21};

using Netlink = std::unique_ptr<mnl_socket, decltype([](mnl_socket* socket) { mnl_socket_close(socket); })>;

/// The attribute of this type behind the first `offset` bytes of the payload, or null.
const nlattr* find_attribute(const nlmsghdr* message, std::size_t offset, std::uint16_t type) {
  struct Search {
    std::uint16_t type;
    const nlattr* found = nullptr;
  } search{type};
  const auto look = [](const nlattr* attribute, void* data) -> int {
    auto* wanted = static_cast<Search*>(data);
    if (mnl_attr_get_type(attribute) == wanted->type) wanted->found = attribute;
    return MNL_CB_OK;
  };
  mnl_attr_parse(message, static_cast<unsigned>(offset), look, &search);
  return search.found;
}

/// The user who has bound the name of the lock. Nothing when nobody has, or where the kernel does not tell (before
/// Linux 5.3, or without CONFIG_UNIX_DIAG).
std::optional<uid_t> lock_holder() {
  const Netlink socket(mnl_socket_open2(NETLINK_SOCK_DIAG, SOCK_CLOEXEC));
  if (!socket || mnl_socket_bind(socket.get(), 0, MNL_SOCKET_AUTOPID) < 0) return {};
  std::vector<char> buffer(buffer_size);
  nlmsghdr* request = mnl_nlmsg_put_header(buffer.data());
  request->nlmsg_type = SOCK_DIAG_BY_FAMILY;
  request->nlmsg_flags = NLM_F_REQUEST | NLM_F_DUMP;
  auto* filter = static_cast<unix_diag_req*>(mnl_nlmsg_put_extra_header(request, sizeof(unix_diag_req)));
  filter->sdiag_family = AF_UNIX;
  filter->udiag_states = ~std::uint32_t{0};
  filter->udiag_show = UDIAG_SHOW_NAME | UDIAG_SHOW_UID;
  if (mnl_socket_sendto(socket.get(), request, request->nlmsg_len) < 0) return {};

  std::optional<uid_t> holder;
  const auto look = [](const nlmsghdr* message, void* data) -> int {
    // Sockets of another type may have the same name.
    if (static_cast<const unix_diag_msg*>(mnl_nlmsg_get_payload(message))->udiag_type != SOCK_DGRAM) return MNL_CB_OK;
    const nlattr* name = find_attribute(message, sizeof(unix_diag_msg), UNIX_DIAG_NAME);
    const nlattr* user = find_attribute(message, sizeof(unix_diag_msg), UNIX_DIAG_UID);
    if (name != nullptr && user != nullptr &&
        std::string_view(static_cast<const char*>(mnl_attr_get_payload(name)), mnl_attr_get_payload_len(name)) ==
            lock_name)
      *static_cast<std::optional<uid_t>*>(data) = mnl_attr_get_u32(user);
    return MNL_CB_OK;
  };
  for (int more = MNL_CB_OK; more > MNL_CB_STOP;) {
    const ssize_t size = mnl_socket_recvfrom(socket.get(), buffer.data(), buffer.size());
    if (size < 0) break;
    more = mnl_cb_run(buffer.data(), static_cast<std::size_t>(size), 0, 0, look, &holder);
  }
  return holder;
}

/// There is nobody to ask who began first; a bound name is in one network namespace, and goes with the process.
Result<config::Fd> lock() {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  lock_name.copy(address.sun_path, lock_name.size());
  config::Fd fd(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  if (!fd) return config::fail_errno(errno, "socket");
  const auto length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + lock_name.size());
  if (::bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), length) == 0) return fd;
  if (errno != EADDRINUSE) return config::fail_errno(errno, "binding @clusterip/local_vips");
  return config::fail(-EBUSY,
                      "another process makes VIPs local in this network namespace (ss -xap 'src @clusterip/local_vips' "
                      "shows it)");
}

/// Network byte order.
struct Bytes {
  std::uint8_t data[16] = {};
  std::uint16_t size = 0;
};

Bytes bytes_of(const Address& address) {
  Bytes bytes;
  const auto copy = [&](const auto& from) {
    bytes.size = static_cast<std::uint16_t>(from.size());
    std::ranges::copy(from, bytes.data);
  };
  if (address.is_v4()) {
    copy(address.to_v4().to_bytes());
  } else {
    copy(address.to_v6().to_bytes());
  }
  return bytes;
}

Address loopback_address(const Address& of_family) {
  if (of_family.is_v4()) return boost::asio::ip::address_v4::loopback();
  return boost::asio::ip::address_v6::loopback();
}

std::uint8_t family_of(const Address& address) { return address.is_v4() ? AF_INET : AF_INET6; }
std::uint8_t length_of(const Address& address) { return address.is_v4() ? 32 : 128; }

std::size_t put_request(char* buffer, std::uint16_t type, std::uint16_t flags, std::uint32_t sequence,
                        const Address& vip) {
  nlmsghdr* header = mnl_nlmsg_put_header(buffer);
  header->nlmsg_type = type;
  header->nlmsg_flags = flags;
  header->nlmsg_seq = sequence;
  auto* route = static_cast<rtmsg*>(mnl_nlmsg_put_extra_header(header, sizeof(rtmsg)));
  route->rtm_family = family_of(vip);
  route->rtm_dst_len = length_of(vip);
  route->rtm_table = RT_TABLE_LOCAL;
  route->rtm_protocol = route_protocol;
  route->rtm_scope = RT_SCOPE_HOST;
  route->rtm_type = RTN_LOCAL;
  const Bytes destination = bytes_of(vip);
  mnl_attr_put(header, RTA_DST, destination.size, destination.data);
  mnl_attr_put_u32(header, RTA_OIF, loopback);
  const Bytes source = bytes_of(loopback_address(vip));
  mnl_attr_put(header, RTA_PREFSRC, source.size, source.data);
  return header->nlmsg_len;
}

std::string error_text(int error) { return config::fail_errno(error, "").error().message.substr(2); }

/// The kernel's own words where it has any: "Permission denied" alone would not say that IPv6 is switched off.
std::string reason_of(const nlmsghdr* answer, const nlmsgerr* error) {
  if ((answer->nlmsg_flags & NLM_F_ACK_TLVS) != 0) {
    std::size_t offset = sizeof(nlmsgerr);
    if ((answer->nlmsg_flags & NLM_F_CAPPED) == 0) offset += mnl_nlmsg_get_payload_len(&error->msg);
    const nlattr* text = find_attribute(answer, offset, NLMSGERR_ATTR_MSG);
    if (text != nullptr) return mnl_attr_get_str(text);
  }
  return error_text(-error->error);
}

Address read_address(const nlattr* attribute, bool is_v4) {
  const auto bytes_of_type = [&]<class Bytes>(Bytes bytes) {
    std::memcpy(bytes.data(), mnl_attr_get_payload(attribute), bytes.size());
    return bytes;
  };
  if (is_v4) return boost::asio::ip::address_v4(bytes_of_type(boost::asio::ip::address_v4::bytes_type{}));
  return boost::asio::ip::address_v6(bytes_of_type(boost::asio::ip::address_v6::bytes_type{}));
}

/// Whether a client is delivered to this host's own VIP by a wider route: 127.0.0.0/8, or somebody's of type local.
bool covers(std::uint8_t length, const Address& destination, const Address& vip) {
  if (destination.is_v4() != vip.is_v4()) return false;
  const Bytes network = bytes_of(destination);
  const Bytes address = bytes_of(vip);
  for (int bit = 0; bit < length; ++bit) {
    const int mask = 0x80 >> bit % 8;
    if (((network.data[bit / 8] ^ address.data[bit / 8]) & mask) != 0) return false;
  }
  return true;
}

/// "10.96.0.10, 10.96.0.11 and 9998 more"
std::string list_of(std::span<const Address> vips) {
  constexpr std::size_t named = 5;
  std::string list;
  for (std::size_t i = 0; i < std::min(vips.size(), named); ++i) {
    if (i > 0) list += ", ";
    list += vips[i].to_string();
  }
  if (vips.size() > named) list += fmt::format(" and {} more", vips.size() - named);
  return list;
}

std::string_view name_of_type(std::uint8_t type) {
  switch (type) {
    case RTN_LOCAL:
      return "local";
    case RTN_BROADCAST:
      return "broadcast";
    case RTN_ANYCAST:
      return "anycast";
    case RTN_MULTICAST:
      return "multicast";
    case RTN_BLACKHOLE:
      return "blackhole";
    case RTN_UNREACHABLE:
      return "unreachable";
    case RTN_UNICAST:
      return "unicast";
    default:
      return "unknown";
  }
}

}  // namespace

bool is_in_table_local(const rtmsg& route) {
  if (route.rtm_table == RT_TABLE_LOCAL) return true;
  return route.rtm_family == AF_INET6 && route.rtm_table == RT_TABLE_MAIN && route.rtm_type == RTN_LOCAL;
}

bool LocalVips::Route::is_address() const { return type == RTN_LOCAL && protocol == RTPROT_KERNEL; }

void LocalVips::Close::operator()(mnl_socket* socket) const { mnl_socket_close(socket); }

LocalVips::LocalVips(config::Fd lock, mnl_socket* socket)
    : lock_(std::move(lock)), socket_(socket), buffer_(buffer_size) {}

Result<LocalVips> LocalVips::open() {
  auto locked = lock();
  std::string warning;
  if (!locked) {
    // Every user may bind the name. Root and this process's own user are believed to have it for our routes.
    const auto holder = locked.error().code == -EBUSY ? lock_holder() : std::nullopt;
    if (!holder || *holder == 0 || *holder == ::geteuid()) return std::unexpected(locked.error());
    warning = fmt::format(
        "user {} holds @clusterip/local_vips, which is to keep two proxies from one another's routes, and is neither "
        "root nor this process's user: passed over (ss -xap 'src @clusterip/local_vips' shows who it is)",
        *holder);
    locked = config::Fd();
  }
  mnl_socket* socket = mnl_socket_open2(NETLINK_ROUTE, SOCK_CLOEXEC);
  if (socket == nullptr) return config::fail_errno(errno, "rtnetlink socket");
  LocalVips vips(std::move(*locked), socket);
  vips.warning_ = std::move(warning);
  if (mnl_socket_bind(socket, 0, MNL_SOCKET_AUTOPID) < 0)
    return config::fail_errno(errno, "binding an rtnetlink socket");

  // All of these only help, and old kernels lack some: answers without the request, and with words; a dump of one table
  // instead of all.
  int on = 1;
  for (const int option : {NETLINK_CAP_ACK, NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK})
    mnl_socket_setsockopt(socket, option, &on, sizeof on);
  // The kernel answers before it returns from sending, so that this is reached by no kernel known.
  const timeval patience{.tv_sec = 5, .tv_usec = 0};
  ::setsockopt(mnl_socket_get_fd(socket), SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
  return vips;
}

Result<std::vector<VipFailure>> LocalVips::reconcile(std::span<const Address> wanted, std::span<const Address> kept) {
  for (int attempt = 1;; ++attempt) {
    auto failures = try_reconcile(wanted, kept);
    if (failures || attempt == attempts) return failures;
    // A dump that was given up goes on when its socket is read, and the kernel begins no other there before its end.
    if (failures.error().code == -EBUSY) continue;
    if (failures.error().code != -ENOBUFS) return failures;
    // Answers were lost, since somebody has made receive buffers small. The next look shows what has been done, and one
    // answer always finds room.
    batch_ = std::max(batch_ / 2, std::size_t{1});
  }
}

Result<std::vector<VipFailure>> LocalVips::try_reconcile(std::span<const Address> wanted,
                                                         std::span<const Address> kept) {
  added_ = 0;
  const auto found = routes();
  if (!found) return std::unexpected(found.error());
  std::unordered_set<Address> ours;
  std::unordered_map<Address, const Route*> of_others;
  for (const Route& route : *found) {
    if (route.length != length_of(route.destination)) continue;
    if (route.protocol == route_protocol) {
      ours.insert(route.destination);
    } else if (const auto [known, is_new] = of_others.try_emplace(route.destination, &route);
               !is_new && route.is_address()) {
      known->second = &route;
    }
  }

  std::vector<VipFailure> failures;
  std::vector<Address> missing;
  std::unordered_set<Address> seen;
  for (const Address& vip : wanted) {
    if (!seen.insert(vip).second || ours.erase(vip) > 0) continue;
    const auto other = of_others.find(vip);
    if (other == of_others.end()) {
      missing.push_back(vip);
    } else if (!other->second->is_address()) {
      failures.push_back({vip, fmt::format("somebody else's route for it is in table local (type {}, protocol {})",
                                           name_of_type(other->second->type), other->second->protocol)});
    }
  }
  for (const Address& vip : kept) ours.erase(vip);
  const std::vector<Address> stale(ours.begin(), ours.end());

  const auto not_added = change(RTM_NEWROUTE, missing);
  if (!not_added) return std::unexpected(not_added.error());
  added_ = missing.size() - not_added->size();
  const auto not_removed = change(RTM_DELROUTE, stale);
  if (!not_removed) return std::unexpected(not_removed.error());

  std::string forbidden;
  for (const Refusal& refusal : *not_added) {
    if (refusal.error != EPERM) {
      failures.push_back({missing[refusal.index], "making it local: " + refusal.reason});
      continue;
    }
    std::erase_if(missing, [&](const Address& vip) {
      return std::ranges::any_of(*found, [&](const Route& route) {
        return route.type == RTN_LOCAL && covers(route.length, route.destination, vip);
      });
    });
    if (missing.empty()) break;
    forbidden = fmt::format("making VIPs local takes CAP_NET_ADMIN; not local: {}", list_of(missing));
    break;
  }
  for (const Refusal& refusal : *not_removed) {
    if (refusal.error == ESRCH) continue;  // somebody was quicker
    if (refusal.error != EPERM) {
      failures.push_back({stale[refusal.index], "making it local no more: " + refusal.reason});
      continue;
    }
    if (!forbidden.empty()) forbidden += "; ";
    forbidden += fmt::format("removing local routes takes CAP_NET_ADMIN; not removed: {}", list_of(stale));
    break;
  }
  if (!forbidden.empty()) return config::fail(-EPERM, std::move(forbidden));
  return failures;
}

Result<std::vector<LocalVips::Route>> LocalVips::routes() {
  std::vector<Route> routes;
  for (const std::uint8_t family : {std::uint8_t{AF_INET}, std::uint8_t{AF_INET6}}) {
    if (const auto read = read_routes(family, routes); !read) return std::unexpected(read.error());
  }
  return routes;
}

/// Appends the routes of table local.
Result<void> LocalVips::read_routes(std::uint8_t family, std::vector<Route>& routes) {
  const std::size_t before = routes.size();
  for (int attempt = 1; attempt <= attempts; ++attempt) {
    routes.resize(before);
    const auto complete = try_read_routes(family, routes);
    if (!complete) return std::unexpected(complete.error());
    if (*complete) return {};
  }
  return config::fail(-EAGAIN, "reading the routes of table local: they change all the time");
}

/// False: they changed meanwhile, and some may be missing.
Result<bool> LocalVips::try_read_routes(std::uint8_t family, std::vector<Route>& routes) {
  nlmsghdr* request = mnl_nlmsg_put_header(buffer_.data());
  request->nlmsg_type = RTM_GETROUTE;
  request->nlmsg_flags = NLM_F_REQUEST | NLM_F_DUMP;
  request->nlmsg_seq = ++sequence_;
  auto* filter = static_cast<rtmsg*>(mnl_nlmsg_put_extra_header(request, sizeof(rtmsg)));
  filter->rtm_family = family;
  filter->rtm_table = RT_TABLE_LOCAL;
  if (mnl_socket_sendto(socket_.get(), request, request->nlmsg_len) < 0)
    return config::fail_errno(errno, "reading the routes of table local");

  bool complete = true;
  for (;;) {
    const auto size = receive();
    if (!size) return std::unexpected(size.error());
    int left = static_cast<int>(*size);
    for (auto* message = reinterpret_cast<const nlmsghdr*>(buffer_.data()); mnl_nlmsg_ok(message, left);
         message = mnl_nlmsg_next(message, &left)) {
      if (message->nlmsg_seq != sequence_) continue;  // of a dump that was given up
      if ((message->nlmsg_flags & NLM_F_DUMP_INTR) != 0) complete = false;
      if (message->nlmsg_type == NLMSG_DONE || message->nlmsg_type == NLMSG_ERROR) {
        // Both begin with an errno. Without the family, or before the table's first route, there is nothing to read.
        const int error = -*static_cast<const int*>(mnl_nlmsg_get_payload(message));
        if (error > 0 && error != ENOENT && error != EOPNOTSUPP && error != EAFNOSUPPORT)
          return config::fail_errno(error, "reading the routes of table local");
        return complete;
      }
      const auto* header = static_cast<const rtmsg*>(mnl_nlmsg_get_payload(message));
      if (message->nlmsg_type != RTM_NEWROUTE || header->rtm_family != family || !is_in_table_local(*header) ||
          (header->rtm_flags & RTM_F_CLONED) != 0)
        continue;
      const nlattr* destination = find_attribute(message, sizeof(rtmsg), RTA_DST);
      if (destination == nullptr) continue;  // a default route
      routes.push_back({.destination = read_address(destination, family == AF_INET),
                        .length = header->rtm_dst_len,
                        .type = header->rtm_type,
                        .protocol = header->rtm_protocol});
    }
  }
}

/// RTM_NEWROUTE or RTM_DELROUTE of ours for each VIP. Stops when rights are missing.
Result<std::vector<LocalVips::Refusal>> LocalVips::change(std::uint16_t type, std::span<const Address> vips) {
  const std::uint16_t flags = NLM_F_REQUEST | (type == RTM_NEWROUTE ? NLM_F_CREATE | NLM_F_EXCL : 0);
  std::vector<Refusal> refusals;
  for (std::size_t begin = 0; begin < vips.size(); begin += batch_) {
    const std::size_t count = std::min(batch_, vips.size() - begin);
    const std::uint32_t first = sequence_ + 1;
    std::size_t size = 0;
    for (std::size_t i = 0; i < count; ++i) {
      // An error is always answered; success only where it is asked for, and the last answer says that all are done.
      const std::uint16_t ack = i + 1 == count ? NLM_F_ACK : 0;
      size += put_request(buffer_.data() + size, type, flags | ack, ++sequence_, vips[begin + i]);
    }
    if (mnl_socket_sendto(socket_.get(), buffer_.data(), size) < 0) return config::fail_errno(errno, "rtnetlink");

    for (bool done = false; !done;) {
      const auto received = receive();
      if (!received) return std::unexpected(received.error());
      int left = static_cast<int>(*received);
      for (auto* message = reinterpret_cast<const nlmsghdr*>(buffer_.data()); mnl_nlmsg_ok(message, left);
           message = mnl_nlmsg_next(message, &left)) {
        const std::uint32_t index = message->nlmsg_seq - first;
        if (message->nlmsg_type != NLMSG_ERROR || index >= count) continue;  // of a request that was given up
        const auto* error = static_cast<const nlmsgerr*>(mnl_nlmsg_get_payload(message));
        if (error->error != 0)
          refusals.push_back({.index = begin + index, .error = -error->error, .reason = reason_of(message, error)});
        done = done || index + 1 == count;
      }
    }
    if (!refusals.empty() && refusals.back().error == EPERM) break;
  }
  return refusals;
}

/// One datagram, into the buffer.
Result<std::size_t> LocalVips::receive() {
  for (;;) {
    const ssize_t size = mnl_socket_recvfrom(socket_.get(), buffer_.data(), buffer_.size());
    if (size >= 0) return static_cast<std::size_t>(size);
    if (errno == EINTR) continue;
    if (errno != ENOBUFS) return config::fail_errno(errno, "rtnetlink");
    // Until the queue has been empty once, the kernel drops all further answers, and does not say so again.
    while (::recv(mnl_socket_get_fd(socket_.get()), buffer_.data(), buffer_.size(), MSG_DONTWAIT) >= 0 ||
           errno != EAGAIN) {
    }
    return config::fail_errno(ENOBUFS, "rtnetlink");
  }
}

}  // namespace userspace
