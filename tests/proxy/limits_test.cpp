// SPDX-License-Identifier: BSD-2-Clause
//
// Out of descriptors, out of ports, and very many connections: clients wait, nothing spins, and all is well afterwards.
#include <fmt/format.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/syscall.h>

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <map>
#include <stdexcept>

#include "tests/proxy/proxied.h"

namespace {

using namespace support;
using namespace std::chrono_literals;

constexpr std::size_t mebi = std::size_t{1024} * 1024;

// A sanitizer's memory is not the program's.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool is_sanitized = true;
#else
constexpr bool is_sanitized = false;
#endif

/// A process that sends back what it receives, on as many connections as there are.
class EchoServer {
 public:
  EchoServer() : child_(serve) { child_.channel().hear(); }

  static Backend backend() { return {"127.0.0.1", port}; }

 private:
  static constexpr std::uint16_t port = 7001;

  static void serve(const Channel& channel) {
    raise_descriptor_limit();
    const TcpListener listener("127.0.0.1", port, 65535);
    const Fd epoll(checked(::epoll_create1(EPOLL_CLOEXEC), "epoll"));
    const auto watch = [&](int fd) {
      epoll_event event{EPOLLIN, {.fd = fd}};
      checked(::epoll_ctl(epoll.get(), EPOLL_CTL_ADD, fd, &event), "epoll_ctl");
    };
    watch(listener.get());
    std::map<int, Fd> connections;
    std::vector<char> buffer(std::size_t{256} * 1024);
    channel.tell('r');
    for (;;) {
      epoll_event event{};
      if (::epoll_wait(epoll.get(), &event, 1, -1) != 1) continue;
      if (event.data.fd == listener.get()) {
        Fd connection = listener.accept();
        const int fd = connection.get();
        connections[fd] = std::move(connection);
        watch(fd);
        continue;
      }
      const ssize_t size = ::recv(event.data.fd, buffer.data(), buffer.size(), 0);
      if (size <= 0)
        connections.erase(event.data.fd);
      else
        send_all(connections[event.data.fd], {buffer.data(), static_cast<std::size_t>(size)});
    }
  }

  Child child_;
};

void expect_echo(const Fd& client, const std::string& text) {
  send_all(client, text);
  EXPECT_EQ(receive(client, text.size()), text);
}

class Limits : public Proxied {};

TEST_F(Limits, NineThousandIdleConnectionsDoNotHinderABusyOne) {
  raise_descriptor_limit();
  EchoServer server;
  FallbackProxy proxy(proxy_toml({web({EchoServer::backend()})}));
  expect_echo(dial(vip, vip_port), "x");
  const std::size_t before = proxy.resident_bytes();
  constexpr std::size_t count = 9000;
  std::vector<Fd> idle;
  for (std::size_t i = 0; i < count; ++i) {
    idle.push_back(dial(vip, vip_port));
    expect_echo(idle.back(), "x");
  }
  const std::size_t taken = proxy.resident_bytes() - before;
  if (!is_sanitized) {
    EXPECT_LT(taken / count, 3 * 1024U);
  }

  const Fd busy = dial(vip, vip_port);
  for (int i = 0; i < 1000; ++i) expect_echo(busy, std::string(1024, 'b'));
  auto sending = meanwhile([&] { send_stream(busy, 1, 64 * mebi, Chunks::mixed); });
  receive_stream(busy, 1, 64 * mebi);
  sending.get();
  EXPECT_LT(load(proxy, 500ms), no_spin);
  for (const Fd& client : idle) expect_echo(client, "y");
}

TEST_F(Limits, AThousandClientsAreServedInTurnWith256Descriptors) {
  raise_descriptor_limit();
  EchoServer server;
  FallbackProxy proxy(proxy_toml({web({EchoServer::backend()})}), [] {
    const rlimit few{256, 256};
    checked(::setrlimit(RLIMIT_NOFILE, &few), "RLIMIT_NOFILE");
  });
  const std::size_t files = proxy.open_files();
  std::vector<Fd> waiting;
  for (int i = 0; i < 1000; ++i) {
    waiting.push_back(dial(vip, vip_port));
    send_all(waiting.back(), "x");
  }
  // Some have their turn and keep it: the others wait, in the kernel and without a spin.
  ASSERT_TRUE(eventually([&] { return is_readable(waiting.front().get()); }));
  EXPECT_LT(load(proxy, 1s), no_spin);
  EXPECT_LE(proxy.open_files(), 256U);
  std::size_t rounds = 0;
  for (; !waiting.empty(); ++rounds) {
    ASSERT_TRUE(eventually([&] {
      const std::size_t had = waiting.size();
      std::erase_if(waiting, [](const Fd& client) {
        if (!is_readable(client.get())) return false;
        EXPECT_EQ(receive(client, 1), "x");
        return true;
      });
      return waiting.size() < had;
    })) << waiting.size()
        << " are not served";
  }
  EXPECT_GE(rounds, 4U);
  for (int i = 0; i < 200; ++i) expect_echo(dial(vip, vip_port), "after");
  EXPECT_TRUE(eventually([&] { return proxy.open_files() <= files; }));
}

TEST_F(Limits, TheSoftLimitIsRaisedToTheHardOne) {
  const TcpListener backend;
  FallbackProxy proxy(proxy_toml({web({backend.backend()})}), [] {
    const rlimit low{64, 4096};
    checked(::setrlimit(RLIMIT_NOFILE, &low), "RLIMIT_NOFILE");
  });
  std::vector<Connected> held;
  for (int i = 0; i < 100; ++i) held.push_back(connect_through(backend));
  EXPECT_GT(proxy.open_files(), 200U);
}

/// Of the table that the threads share; when it grows, they all wait for the kernel.
std::size_t room_for_descriptors(const FallbackProxy& proxy) {
  std::ifstream status(fmt::format("/proc/{}/status", proxy.pid()));
  for (std::string key; status >> key;) {
    if (std::size_t room = 0; key == "FDSize:" && status >> room) return room;
  }
  throw std::runtime_error("no FDSize");
}

TEST_F(Limits, DescriptorsHaveRoomFromTheStart) {
  const TcpListener backend;
  const std::string text = proxy_toml({web({backend.backend()})});
  rlimit limit{};
  checked(::getrlimit(RLIMIT_NOFILE, &limit), "RLIMIT_NOFILE");
  EXPECT_GE(room_for_descriptors(FallbackProxy(text)), std::min<rlim_t>(limit.rlim_max, 65'536));
  const FallbackProxy few(text, [] {
    const rlimit low{4096, 4096};
    checked(::setrlimit(RLIMIT_NOFILE, &low), "RLIMIT_NOFILE");
  });
  EXPECT_EQ(room_for_descriptors(few), 4096U) << "all that there may be";
}

TEST_F(Limits, TooFewDescriptorsToBeginWithAreNamed) {
  const FallbackProxy::Files files;
  files.write(proxy_toml({}));
  Process proxy({CLUSTERIP_FALLBACK_PROXY, "--config", files.config()}, nullptr, [] {
    const rlimit few{12, 12};
    checked(::setrlimit(RLIMIT_NOFILE, &few), "RLIMIT_NOFILE");
  });
  const Finished finished = proxy.wait();
  EXPECT_EQ(finished.exit_code, 1);
  EXPECT_NE(finished.err.find(": allow more file descriptors (LimitNOFILE=, ulimit -n)\n"), std::string::npos)
      << finished.err;
}

TEST_F(Limits, ClientsWaitWhileTheProcessHasNoDescriptors) {
  const NamedServer one("one");
  FallbackProxy proxy(proxy_toml({web({backend(one)})}));
  const std::size_t files = proxy.open_files();
  EXPECT_EQ(ask(vip, vip_port), answered_by("one"));
  ASSERT_TRUE(eventually([&] { return proxy.open_files() == files; }));
  proxy.leave_descriptors(0);
  std::vector<Fd> waiting;
  for (int i = 0; i < 20; ++i) waiting.push_back(dial(vip, vip_port));
  EXPECT_LT(load(proxy, 1s), no_spin);
  for (const Fd& client : waiting) EXPECT_FALSE(is_readable(client.get()));
  proxy.leave_descriptors({});
  for (const Fd& client : waiting) EXPECT_EQ(receive_all(client), "one");
}

TEST_F(Limits, TheReserveIsForTheBackendOfAConnectionThatWasAccepted) {
  const NamedServer one("one");
  FallbackProxy proxy(proxy_toml({web({backend(one)})}));
  const std::size_t files = proxy.open_files();
  EXPECT_EQ(ask(vip, vip_port), answered_by("one"));
  ASSERT_TRUE(eventually([&] { return proxy.open_files() == files; }));
  proxy.leave_descriptors(1);
  // One descriptor for the client and none for the backend, were it not for the reserve.
  for (int i = 0; i < 20; ++i) EXPECT_EQ(ask(vip, vip_port), answered_by("one")) << i;
  proxy.leave_descriptors({});
  for (int i = 0; i < 20; ++i) EXPECT_EQ(ask(vip, vip_port), answered_by("one")) << i;
}

TEST_F(Limits, AnAcceptThatFailsIsNotTriedWithoutPause) {
  const NamedServer one("one");
  for (const int error : {EMFILE, ENFILE, ENOBUFS, ENOMEM}) {
    FallbackProxy proxy(proxy_toml({web({backend(one)})}), [error] { forbid({{SYS_accept4, {}, error}}); });
    const Fd client = dial(vip, vip_port);
    EXPECT_LT(load(proxy, 500ms), no_spin) << error;
    EXPECT_FALSE(is_readable(client.get()));
    EXPECT_EQ(proxy.terminate().exit_code, 0) << error;
  }
}

TEST_F(Limits, AConnectThatFailsResetsItsClientAndNoMore) {
  const NamedServer one("one");
  for (const int error : {ENOBUFS, EADDRNOTAVAIL, ENETUNREACH, EPERM}) {
    FallbackProxy proxy(proxy_toml({web({backend(one)})}), [error] { forbid({{SYS_connect, {}, error}}); });
    for (int i = 0; i < 20; ++i) EXPECT_EQ(end_of(dial(vip, vip_port)), ECONNRESET) << error;
    EXPECT_LT(load(proxy, 300ms), no_spin) << error;
    EXPECT_EQ(proxy.terminate().exit_code, 0) << error;
  }
}

TEST_F(Limits, ABackendWithoutFreeLocalPortsCountsAsFailed) {
  constexpr const char* ports = "/proc/sys/net/ipv4/ip_local_port_range";
  const TcpListener full("127.0.0.1", 7001);
  const TcpListener other("127.0.0.2", 7001);
  FallbackProxy proxy(proxy_toml({web({full.backend()})}));
  std::ofstream(ports) << "60000 60009";
  std::vector<Connected> held;
  std::uint16_t client_port = 20000;
  const auto dial_vip = [&] { return dial(vip, vip_port, "127.0.0.1", client_port++); };
  for (int i = 0; i < 10; ++i) {
    Fd client = dial_vip();
    held.push_back({std::move(client), full.accept()});
  }
  EXPECT_EQ(end_of(dial_vip()), ECONNRESET);
  EXPECT_LT(load(proxy, 300ms), no_spin);
  // Towards another backend there are as many again.
  proxy.reload(proxy_toml({web({full.backend(9), other.backend()})}));
  for (int i = 0; i < 10; ++i) {
    Fd client = dial_vip();
    held.push_back({std::move(client), other.accept()});
  }
  EXPECT_EQ(end_of(dial_vip()), ECONNRESET);
  // Ports that become free are used.
  held.clear();
  EXPECT_TRUE(eventually([&] {
    const Fd client = dial_vip();
    return is_readable(full.get(), 1) || is_readable(other.get(), 1);
  }));
}

}  // namespace
