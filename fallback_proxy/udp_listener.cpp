// SPDX-License-Identifier: BSD-2-Clause
#include "fallback_proxy/udp_listener.h"

#include <netinet/in.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>
#include <vector>

#include "balance/hash.h"

namespace userspace {
namespace {

// So many reads, and then others have their turn.
constexpr int rounds = 4;

// What clients may send while the thread does something else. The kernel takes the memory only for what is queued.
constexpr int receive_buffer = 1024 * 1024;

// The kernel makes it the first device of each network namespace.
constexpr unsigned loopback = 1;

// Of descriptors, of memory, or (EAGAIN) of local ports: no other backend would change that.
bool is_shortage(int error) {
  return error == EMFILE || error == ENFILE || error == ENOBUFS || error == ENOMEM || error == EAGAIN;
}

void add(std::atomic<std::uint64_t>& counter, std::uint64_t count) {
  if (count > 0) counter.fetch_add(count, std::memory_order_relaxed);
}

}  // namespace

config::Result<config::Fd> open_udp_socket(const config::Service& service, bool is_by_route) {
  const SocketAddress vip(service.vip, service.port);
  config::Fd socket(::socket(vip.family(), SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, IPPROTO_UDP));
  if (!socket) return config::fail_errno(errno, "socket");
  const int on = 1;
  if (vip.family() == AF_INET6) ::setsockopt(socket.get(), IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof on);
  if (is_by_route) allow_vip_by_route(socket.get(), vip);
  // Beyond net.core.rmem_max, where CAP_NET_ADMIN allows it.
  if (::setsockopt(socket.get(), SOL_SOCKET, SO_RCVBUFFORCE, &receive_buffer, sizeof receive_buffer) != 0)
    ::setsockopt(socket.get(), SOL_SOCKET, SO_RCVBUF, &receive_buffer, sizeof receive_buffer);
  // Without SO_REUSEADDR: for UDP it would let a second socket take the first one's datagrams.
  if (::bind(socket.get(), vip.get(), vip.length) == 0) return socket;
  return binding_failed(errno, vip);
}

std::size_t UdpListener::Hash::operator()(const UdpClient& client) const {
  std::uint64_t hash = salt;
  const auto* bytes = reinterpret_cast<const char*>(&client.storage);
  for (std::size_t i = 0; i < client.length; i += sizeof hash) {
    std::uint64_t word = 0;
    std::memcpy(&word, bytes + i, std::min(sizeof word, client.length - i));
    hash = balance::hash_pair(hash, word);
  }
  return hash;
}

UdpListener::UdpListener(Worker& worker, const Workers& workers, config::Fd socket,
                         std::shared_ptr<const Service> service, bool is_by_route, AllowedPointer allowed)
    : worker_(worker),
      workers_(workers),
      socket_(worker.io()),
      service_(std::move(service)),
      allowed_(std::move(allowed)),
      knows_devices_(is_by_route && service_->settings().vip.is_v6()),
      flows_(0, Hash{std::uint64_t{std::random_device{}()} << 32 | std::random_device{}()}) {
  // Said of an inherited socket as well.
  const int on = 1;
  if (knows_devices_) ::setsockopt(socket.get(), IPPROTO_IPV6, IPV6_RECVPKTINFO, &on, sizeof on);
  socket_.assign(socket.get());
  socket.release();
}

void UdpListener::wait() {
  socket_.async_wait(socket_.wait_read, [self = shared_from_this()](const boost::system::error_code&) {
    if (self->socket_.is_open()) self->receive();
  });
}

// --- from the clients -----------------------------------------------------------------------------------------------

void UdpListener::receive() {
  if (is_handed_over_) return;
  Datagrams& datagrams = worker_.datagrams();
  for (int round = 0; round < rounds && socket_.is_open(); ++round) {
    const std::size_t count = datagrams.receive(socket_.native_handle());
    for (std::size_t begin = 0; begin < count;) {
      // What one client has sent in a row travels on together.
      std::size_t end = begin + 1;
      while (end < count && datagrams.source(end) == datagrams.source(begin) &&
             datagrams.device(end) == datagrams.device(begin))
        ++end;
      if (is_forged(begin))
        add(service_->state().denied, end - begin);
      else
        pass_on(begin, end);
      begin = end;
    }
    if (count < Datagrams::most) break;
  }
  if (socket_.is_open()) wait();
}

/// It names an address of this host as its source, and has come from the network. Over IPv4 the kernel drops that. To a
/// VIP that is the address of a device, even this host's own datagrams seem to come in by that device.
bool UdpListener::is_forged(std::size_t index) const {
  if (!knows_devices_) return false;
  const unsigned device = worker_.datagrams().device(index);
  if (device == 0 || device == loopback) return false;
  const config::Service& settings = service_->settings();
  return allowed_->is_own(worker_.datagrams().source(index).socket_address()) &&
         !allowed_->is_own(SocketAddress(settings.vip, settings.port));
}

void UdpListener::pass_on(std::size_t begin, std::size_t end) {
  const UdpClient client = worker_.datagrams().source(begin);
  // Twice: a backend that has refused what came before is found out now, and another one is there.
  for (int i = 0; i < 2 && begin < end; ++i) {
    Flow* flow = find(client);
    if (flow == nullptr) flow = begin_flow(client, end - begin);
    if (flow == nullptr) return;
    begin = flow->send(begin, end);
  }
  add(service_->state().dropped, end - begin);
}

Flow* UdpListener::find(const UdpClient& client) const {
  const auto found = flows_.find(client);
  return found != flows_.end() ? found->second : nullptr;
}

/// For `count` datagrams. Null, and they are counted, when that cannot be.
Flow* UdpListener::begin_flow(const UdpClient& from, std::size_t count) {
  ServiceState& state = service_->state();
  const SocketAddress client = from.socket_address();
  // Whoever sends in our own name would have us answer ourselves, for ever.
  const config::Service& settings = service_->settings();
  const bool is_own = client.port() == settings.port && client.address() == settings.vip;
  if (is_own || !allowed_->contains(client)) {
    add(state.denied, count);
    return nullptr;
  }
  if (is_draining_) {
    add(state.refused, count);
    return nullptr;
  }
  if (!worker_.take_flow()) {
    add(state.dropped, count);
    ask_for_place();
    return nullptr;
  }
  Flow* flow = reach_backend(from, client);
  if (flow == nullptr) {
    add(state.refused, count);
    worker_.flow_ended();
  }
  return flow;
}

Flow* UdpListener::reach_backend(const UdpClient& from, const SocketAddress& client) {
  std::vector<BackendPointer> tried;
  while (BackendPointer backend = service_->choose(client, tried, worker_.random())) {
    config::Fd fd = connect_to(*backend);
    if (fd) {
      // Without room in epoll (fs.epoll.max_user_watches) nothing would ever come of it: there is no flow.
      Flow::Socket socket(worker_.io());
      boost::system::error_code no_room;
      socket.assign(fd.get(), no_room);
      if (no_room) return nullptr;
      fd.release();
      service_->remember(client, backend, worker_.settings().flows);
      const auto flow = std::make_shared<Flow>(worker_, shared_from_this(), from, backend, std::move(socket));
      flows_.emplace(from, flow.get());
      flow->start();
      return flow.get();
    }
    const int error = errno;
    if (is_shortage(error)) break;
    service_->failed(*backend, error, Clock::now());
    tried.push_back(std::move(backend));
  }
  return nullptr;
}

/// Leaves errno when there is none. A port that nobody has can be the one that the kernel has just given to this
/// socket: it would talk to itself.
config::Fd UdpListener::connect_to(const Backend& backend) {
  const int type = SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC;
  config::Fd socket(::socket(backend.address.family(), type, IPPROTO_UDP));
  if (!socket && (errno == EMFILE || errno == ENFILE) && worker_.release_reserve())
    socket = config::Fd(::socket(backend.address.family(), type, IPPROTO_UDP));
  if (!socket) return {};
  int error = ::connect(socket.get(), backend.address.get(), backend.address.length) == 0 ? 0 : errno;
  if (error == 0 && is_connected_to_itself(socket.get(), backend.address)) error = ECONNREFUSED;
  if (error == 0) return socket;
  socket.reset();
  errno = error;
  return {};
}

/// The thread that has the most flows gives one up.
void UdpListener::ask_for_place() {
  const auto most = std::ranges::max_element(workers_, {}, [](const auto& worker) { return worker->flows(); });
  if (most->get() != &worker_) worker_.ask_for_place(**most);
}

void UdpListener::count_received(const Datagrams::Sent& sent) {
  add(service_->state().received, sent.bytes);
  add(service_->state().dropped, sent.dropped);
}

// --- to the clients -------------------------------------------------------------------------------------------------

void UdpListener::reply(std::size_t count, const UdpClient& client) {
  const Datagrams::Sent sent = worker_.datagrams().send(socket_.native_handle(), 0, count, &client);
  add(service_->state().sent, sent.bytes);
  add(service_->state().dropped, sent.dropped + (count - sent.next));
}

// --- changes --------------------------------------------------------------------------------------------------------

void UdpListener::change(std::shared_ptr<const Service> service) {
  const auto before = std::exchange(service_, std::move(service));
  if (before->settings().on_remove == config::OnRemove::keep) return;
  end_flows([&](const Flow& flow) { return !service_->is_active(flow.backend()); });
}

void UdpListener::end_flows(const std::function<bool(const Flow&)>& which) {
  std::vector<Flow*> ending;  // they leave flows_ as they end
  for (const auto& [client, flow] : flows_) {
    if (which(*flow)) ending.push_back(flow);
  }
  for (Flow* flow : ending) flow->end();
}

void UdpListener::forget(const UdpClient& client) {
  flows_.erase(client);
  if (is_draining_ && flows_.empty()) close();
}

void UdpListener::drain(bool is_handed_over) {
  is_draining_ = true;
  is_handed_over_ = is_handed_over;
  worker_.drain_flows();
  if (flows_.empty()) close();
}

void UdpListener::stop() {
  end_flows([](const Flow&) { return true; });
  close();
}

void UdpListener::close() {
  boost::system::error_code ignored;
  socket_.close(ignored);
}

}  // namespace userspace
