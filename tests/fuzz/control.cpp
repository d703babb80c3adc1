// SPDX-License-Identifier: BSD-2-Clause
//
// Both sides of the control socket: what anybody who may connect sends to it, in any pieces, and what a process that is
// to hand its sockets over answers, with any descriptors. Every answer is a JSON object on a line, every request ends,
// nothing that is no such socket is taken for one, and no descriptor is lost.
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <boost/json.hpp>
#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <iterator>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <system_error>

#include "fallback_proxy/control_client.h"
#include "fallback_proxy/control_socket.h"
#include "fallback_proxy/hand_over.h"
#include "run/control_server.h"
#include "tests/fuzz/input.h"
#include "tests/fuzz/require.h"

namespace {

constexpr int enough = 10'000;  // rounds of the event loop, of which a session takes a few

int checked(int result) {
  if (result < 0) throw std::system_error(errno, std::generic_category());
  return result;
}

std::string new_directory() {
  std::string name = "/tmp/clusterip-fuzz-XXXXXX";
  if (::mkdtemp(name.data()) == nullptr) throw std::system_error(errno, std::generic_category());
  return name;
}

config::Fd bound(int type, std::uint16_t& port) {
  config::Fd fd(checked(::socket(AF_INET, type | SOCK_CLOEXEC, 0)));
  userspace::SocketAddress name(boost::asio::ip::address_v4::loopback(), 0);
  checked(::bind(fd.get(), name.get(), name.length));
  if (type == SOCK_STREAM) checked(::listen(fd.get(), 1));
  checked(::getsockname(fd.get(), &name.storage.any, &name.length));
  port = name.port();
  return fd;
}

/// Everything that stays from input to input.
class Stage {
 public:
  Stage() : tcp_(bound(SOCK_STREAM, tcp_port)), udp_(bound(SOCK_DGRAM, udp_port)) {}

  ~Stage() {
    server_.reset();
    ::unlink((path() + ".lock").c_str());
    ::rmdir(directory_.c_str());
  }

  void serve() {
    if (server_ && !handed_over_) return;
    server_.reset();
    io.restart();
    handed_over_ = false;
    ::unlink(path().c_str());
    auto listening = userspace::listen_control(path());
    require(listening.has_value());
    server_.emplace(io, std::move(*listening), path(),
                    run::ControlHandlers{.status = [] { return boost::json::object{{"services", 1}}; },
                                         .trace = [this](const auto& tell) { return trace(tell); },
                                         .begin_hand_over = [this] { return offer(); },
                                         .end_hand_over =
                                             [this](bool is_taken) {
                                               require(std::exchange(is_handing_over_, false));
                                               handed_over_ = is_taken;
                                             }});
  }

  bool handed_over() const { return handed_over_; }
  bool is_handing_over() const { return is_handing_over_; }
  std::string path() const { return directory_ + "/control.sock"; }
  std::array<int, 2> sockets() const { return {tcp_.get(), udp_.get()}; }

  boost::asio::io_context io;
  std::uint16_t tcp_port = 0;
  std::uint16_t udp_port = 0;
  unsigned char mood = 0;  // of the program behind the handlers

 private:
  config::Result<std::shared_ptr<void>> trace(const std::function<void(const boost::json::object&)>& tell) const {
    if (mood % 4 == 1) return config::fail(-EOPNOTSUPP, "no events");
    const int decisions = mood % 4 == 2 ? 10'000 : 3;
    for (int i = 0; i < decisions; ++i) tell({{"number", i}});
    return std::make_shared<int>(1);
  }

  config::Result<userspace::Offer> offer() {
    if (mood % 3 == 1) return config::fail(-EBUSY, "not now");
    require(!std::exchange(is_handing_over_, true));
    const auto loopback = boost::asio::ip::make_address("127.0.0.1");
    return userspace::Offer{.sockets = {{{loopback, tcp_port, config::Protocol::tcp}, tcp_.get()},
                                        {{loopback, udp_port, config::Protocol::udp}, udp_.get()}},
                            .vips = {loopback}};
  }

  std::string directory_ = new_directory();
  config::Fd tcp_;
  config::Fd udp_;
  std::optional<run::ControlServer> server_;
  bool is_handing_over_ = false;
  bool handed_over_ = false;
};

void require_lines_of_json(std::string_view text) {
  while (!text.empty()) {
    const auto end = text.find('\n');
    require(end != std::string_view::npos);
    boost::system::error_code error;
    const auto value = boost::json::parse(text.substr(0, end), error);
    require(!error && value.is_object());
    text.remove_prefix(end + 1);
  }
}

/// Requests, in pieces.
void ask(Stage& stage, fuzz::Input& input) {
  stage.serve();
  stage.mood = input.byte();
  config::Fd client(checked(::socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)));
  const auto address = userspace::control_address(stage.path());
  checked(::connect(client.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address));
  std::string answers;
  const auto go_on = [&] {
    stage.io.poll();
    std::array<char, 65536> bytes;
    for (;;) {
      const ssize_t size = ::recv(client.get(), bytes.data(), bytes.size(), 0);
      if (size <= 0) return size == 0 || errno != EAGAIN;  // whether it has ended
      answers.append(bytes.data(), static_cast<std::size_t>(size));
    }
  };
  bool is_over = false;
  while (!is_over && !input.is_over()) {
    const auto piece = input.text(input.byte() + std::size_t{1});
    is_over = ::send(client.get(), piece.data(), piece.size(), MSG_NOSIGNAL) < 0 && errno != EAGAIN;
    is_over = go_on() || is_over;
  }
  ::shutdown(client.get(), SHUT_WR);
  for (int round = 0; !go_on() && !stage.handed_over(); ++round) require(round < enough);
  stage.io.poll();
  require(!stage.is_handing_over());
  require_lines_of_json(answers);
}

/// Whether the sockets of an inheritance are what their names say.
void require_sound(const userspace::Inheritance& inheritance) {
  require(static_cast<bool>(inheritance.control));
  for (const auto& [name, socket] : inheritance.sockets) {
    const auto& [vip, port, protocol] = name;
    userspace::SocketAddress really;
    really.length = sizeof really.storage;
    require(::getsockname(socket.get(), &really.storage.any, &really.length) == 0);
    require(really.address() == vip && really.port() == port);
  }
}

/// What another process answers to "take_over": any lines, with any sockets.
void answer(Stage& stage, fuzz::Input& input) {
  const std::string path = stage.path() + ".old";
  auto listening = userspace::listen_control(path);
  require(listening.has_value());
  {
    auto client = userspace::ControlClient::connect(path);
    require(client.has_value() && client->has_value());
    const config::Fd old(checked(::accept4(listening->get(), nullptr, nullptr, SOCK_CLOEXEC)));
    while (!input.is_over()) {
      // A line may name sockets; the ports are what an input cannot know.
      const unsigned char with = input.byte();
      std::string piece(input.text(input.byte() + std::size_t{1}));
      for (const auto& [mark, port] : {std::pair{'\x01', stage.tcp_port}, {'\x02', stage.udp_port}}) {
        if (const auto at = piece.find(mark); at != std::string::npos) piece.replace(at, 1, std::to_string(port));
      }
      std::vector<int> descriptors;
      if ((with & 1) != 0) descriptors.push_back(listening->get());
      if ((with & 2) != 0) descriptors.push_back(stage.sockets()[0]);
      if ((with & 4) != 0) descriptors.push_back(stage.sockets()[1]);
      if ((with & 8) != 0) descriptors.push_back(STDERR_FILENO);
      if (userspace::send_with_descriptors(old.get(), piece, descriptors) < 0) break;
    }
    ::shutdown(old.get(), SHUT_WR);
    if (const auto inheritance = userspace::take_over(**client)) {
      require_sound(*inheritance);
      if (const auto ready = userspace::say_ready(**client); !ready) require(!ready.error().message.empty());
    } else {
      require(inheritance.error().code < 0 && !inheritance.error().message.empty());
    }
  }
  ::unlink(path.c_str());
  ::unlink((path + ".lock").c_str());
}

std::ptrdiff_t descriptors() {
  return std::distance(std::filesystem::directory_iterator("/proc/self/fd"), std::filesystem::directory_iterator());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  static Stage stage;
  fuzz::Input input(data, size);
  stage.serve();
  const std::ptrdiff_t before = descriptors();
  if (input.flag())
    answer(stage, input);
  else
    ask(stage, input);
  stage.serve();
  stage.io.poll();
  require(descriptors() == before);
  return 0;
}
