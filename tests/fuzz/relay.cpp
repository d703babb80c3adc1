// SPDX-License-Identifier: BSD-2-Clause
//
// A client and a backend with a relay between them. What each of them does and when is the input: sends, reads, ends,
// resets, urgent bytes. Nobody may get a byte that was not sent, in another place than it was sent; where neither
// resets, each gets all of it and then its end. Then the connection is gone.
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <memory>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "config/fd.h"
#include "fallback_proxy/proxy_header.h"
#include "fallback_proxy/worker.h"
#include "tests/fuzz/input.h"
#include "tests/fuzz/require.h"

namespace {

using namespace std::chrono_literals;
using userspace::SocketAddress;

constexpr std::size_t most_steps = 64;
constexpr int patience = 8000;  // ms, below the time in which libFuzzer gives an input up

int checked(int result) {
  if (result < 0) throw std::system_error(errno, std::generic_category());
  return result;
}

SocketAddress name_of(int fd) {
  SocketAddress name;
  name.length = sizeof name.storage;
  checked(::getsockname(fd, &name.storage.any, &name.length));
  return name;
}

config::Fd listen_on_loopback() {
  config::Fd fd(checked(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)));
  const SocketAddress any_port(boost::asio::ip::address_v4::loopback(), 0);
  checked(::bind(fd.get(), any_port.get(), any_port.length));
  checked(::listen(fd.get(), 64));
  return fd;
}

config::Fd accept(int listening) {
  return config::Fd(checked(::accept4(listening, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK)));
}

/// The byte at this place of what an end sends.
unsigned char pattern(std::size_t place) { return static_cast<unsigned char>(place * 7 + (place >> 8) * 13); }

class End {
 public:
  /// `first`: what it is sent before the other end's bytes.
  End(config::Fd socket, std::string first) : socket_(std::move(socket)), first_(std::move(first)) {}

  void send(std::size_t size) {
    if (has_said_all_ || !socket_) return;
    std::vector<unsigned char> bytes(size);
    for (std::size_t i = 0; i < size; ++i) bytes[i] = pattern(sent_ + i);
    const ssize_t taken = ::send(socket_.get(), bytes.data(), size, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (taken > 0) sent_ += static_cast<std::size_t>(taken);
  }

  /// Urgent data is a byte beside the stream; which one it is that readers miss, others decide.
  bool send_urgent() {
    return !has_said_all_ && socket_ && ::send(socket_.get(), "!", 1, MSG_NOSIGNAL | MSG_DONTWAIT | MSG_OOB) == 1;
  }

  /// Reads what is there, of so many bytes. False once nothing more can come.
  bool read(std::size_t size, bool is_exact) {
    if (has_read_all_ || !socket_) return false;
    std::vector<unsigned char> bytes(size);
    const ssize_t got = ::recv(socket_.get(), bytes.data(), size, MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return true;
    if (got < 0) was_reset_ = true;
    if (got <= 0) {
      has_read_all_ = true;
      return false;
    }
    for (std::size_t i = 0; is_exact && i < static_cast<std::size_t>(got); ++i) {
      const std::size_t place = received_ + i;
      require(bytes[i] ==
              (place < first_.size() ? static_cast<unsigned char>(first_[place]) : pattern(place - first_.size())));
    }
    received_ += static_cast<std::size_t>(got);
    return true;
  }

  void say_all() {
    if (socket_) ::shutdown(socket_.get(), SHUT_WR);
    has_said_all_ = true;
  }

  void reset() {
    if (!socket_) return;
    const linger now{.l_onoff = 1, .l_linger = 0};
    ::setsockopt(socket_.get(), SOL_SOCKET, SO_LINGER, &now, sizeof now);
    socket_.reset();
  }

  void take_little_at_once() {
    const int size = 8 * 1024;
    ::setsockopt(socket_.get(), SOL_SOCKET, SO_RCVBUF, &size, sizeof size);
    ::setsockopt(socket_.get(), SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
  }

  int fd() const { return socket_.get(); }
  bool is_open() const { return static_cast<bool>(socket_); }
  bool has_read_all() const { return has_read_all_ || !socket_; }
  bool was_reset() const { return was_reset_; }
  std::size_t sent() const { return sent_; }
  /// Of the other end's bytes.
  std::size_t received() const { return received_ - std::min(received_, first_.size()); }

 private:
  config::Fd socket_;
  std::string first_;
  std::size_t sent_ = 0;
  std::size_t received_ = 0;
  bool has_said_all_ = false;
  bool has_read_all_ = false;
  bool was_reset_ = false;
};

/// One thread of the proxy for all inputs.
struct Stage {
  config::Fd front = listen_on_loopback();
  config::Fd back = listen_on_loopback();
  std::shared_ptr<userspace::ServiceState> state = std::make_shared<userspace::ServiceState>();
  userspace::Admission admission{1024, 16};
  userspace::Worker worker{{.connect_timeout = 2s, .idle_timeout = 0s, .udp_timeout = 60s, .pipes = 4, .flows = 16},
                           admission};

  /// Connects as `client`, and has the relay do the rest.
  std::shared_ptr<const userspace::Service> service(config::ProxyProtocol protocol) const {
    const SocketAddress vip = name_of(front.get());
    const SocketAddress backend = name_of(back.get());
    config::Service settings;
    settings.name = "web";
    settings.vip = vip.address();
    settings.port = vip.port();
    settings.proxy_protocol = protocol;
    settings.backends.push_back({.address = backend.address(), .port = backend.port(), .position = {}});
    return std::make_shared<userspace::Service>(
        settings,
        std::vector<userspace::BackendPointer>{std::make_shared<userspace::Backend>(backend.address(), backend.port())},
        state);
  }
};

void wait_until_gone(const userspace::Worker& worker) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds(patience);
  while (worker.live() != 0) {
    require(std::chrono::steady_clock::now() < until);
    std::this_thread::sleep_for(200us);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  static Stage stage;
  fuzz::Input input(data, size);
  const auto protocol = static_cast<config::ProxyProtocol>(input.below(3));
  const unsigned char how = input.byte();

  config::Fd dialled(checked(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)));
  const SocketAddress vip = name_of(stage.front.get());
  checked(::connect(dialled.get(), vip.get(), vip.length));
  const SocketAddress client_name = name_of(dialled.get());
  require(stage.admission.take());
  stage.worker.take({.socket = accept(stage.front.get()), .client = client_name, .service = stage.service(protocol)});
  config::Fd answered = accept(stage.back.get());

  std::array<End, 2> ends = {End(std::move(dialled), {}),
                             End(std::move(answered), protocol == config::ProxyProtocol::none
                                                          ? std::string()
                                                          : userspace::proxy_header(protocol, client_name, vip))};
  for (std::size_t i = 0; i < ends.size(); ++i) {
    if ((how & (1U << i)) != 0) ends[i].take_little_at_once();
  }

  bool is_exact = true;
  bool is_reset = false;
  for (std::size_t step = 0; step < most_steps && !input.is_over(); ++step) {
    const unsigned char what = input.byte();
    End& end = ends[(what >> 7) & 1U];
    switch (what % 8) {
      case 0:
        end.send(input.byte() + std::size_t{1});
        break;
      case 1:
        end.send((input.byte() + std::size_t{1}) * 512);
        break;
      case 2:
        end.read(input.byte() + std::size_t{1}, is_exact);
        break;
      case 3:
        end.read((input.byte() + std::size_t{1}) * 512, is_exact);
        break;
      case 4:
        end.say_all();
        break;
      case 5:
        if (end.send_urgent()) is_exact = false;
        break;
      case 6:
        // Rarely: nothing follows a reset.
        if (input.byte() % 8 == 0) {
          end.reset();
          is_reset = true;
        }
        break;
      default: {
        pollfd readable{.fd = end.fd(), .events = POLLIN, .revents = 0};
        if (end.is_open()) ::poll(&readable, 1, 1);
      }
    }
  }

  if (!is_reset) {
    for (End& end : ends) end.say_all();
    const auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds(patience);
    while (!ends[0].has_read_all() || !ends[1].has_read_all()) {
      require(std::chrono::steady_clock::now() < until);
      std::array<pollfd, 2> readable{};
      for (std::size_t i = 0; i < ends.size(); ++i)
        readable[i] = {.fd = ends[i].has_read_all() ? -1 : ends[i].fd(), .events = POLLIN, .revents = 0};
      ::poll(readable.data(), readable.size(), 100);
      for (End& end : ends) end.read(std::size_t{64} * 1024, is_exact);
    }
    require(!ends[0].was_reset() && !ends[1].was_reset());
    if (is_exact) require(ends[0].received() == ends[1].sent() && ends[1].received() == ends[0].sent());
  }
  for (End& end : ends) end.reset();
  wait_until_gone(stage.worker);
  return 0;
}
