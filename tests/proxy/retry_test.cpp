// SPDX-License-Identifier: BSD-2-Clause
//
// Backends that do not take a connection: another does, and who is dead is left alone.
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <netinet/ip.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <cerrno>
#include <optional>

#include "tests/proxy/proxied.h"

namespace {

using namespace support;

/// Counts the connects that somebody tries to a port, whether anybody listens there or not.
class Attempts {
 public:
  explicit Attempts(std::uint16_t port)
      : port_(port), fd_(checked(::socket(AF_PACKET, SOCK_DGRAM | SOCK_CLOEXEC, htons(ETH_P_IP)), "packet socket")) {
    const int room = 64 * 1024 * 1024;
    checked(::setsockopt(fd_.get(), SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room), "SO_RCVBUFFORCE");
  }

  std::size_t count() {
    struct {
      iphdr ip;
      tcphdr tcp;
    } packet{};
    sockaddr_ll from{};
    socklen_t length = sizeof from;
    while (::recvfrom(fd_.get(), &packet, sizeof packet, MSG_DONTWAIT, reinterpret_cast<sockaddr*>(&from), &length) >=
           static_cast<ssize_t>(sizeof packet)) {
      // Each packet is seen twice on lo: as it leaves and as it comes.
      if (from.sll_pkttype == PACKET_OUTGOING || packet.ip.protocol != IPPROTO_TCP) continue;
      count_ += packet.tcp.syn == 1 && packet.tcp.ack == 0 && ntohs(packet.tcp.dest) == port_;
      length = sizeof from;
    }
    return count_;
  }

 private:
  std::uint16_t port_;
  Fd fd_;
  std::size_t count_ = 0;
};

/// A port at which nobody listens. Below those that the kernel gives away.
Backend closed(std::uint16_t port, std::uint32_t weight = 1) { return {"127.0.0.1", port, weight}; }

/// Takes one connection into its queue and leaves all others without an answer.
class BlackHole {
 public:
  BlackHole() : listener_("127.0.0.1", 0, 0), first_(dial("127.0.0.1", listener_.port())) {}
  Backend backend() const { return listener_.backend(); }
  std::uint16_t port() const { return listener_.port(); }

 private:
  TcpListener listener_;
  Fd first_;
};

class Retry : public Proxied {};

TEST_F(Retry, AnotherBackendTakesWhatOneRefuses) {
  const NamedServer alive("alive");
  FallbackProxy proxy(proxy_toml({web({closed(7001), backend(alive)})}));
  for (int i = 0; i < 50; ++i) EXPECT_EQ(ask(vip, vip_port), answered_by("alive"));
}

TEST_F(Retry, AnotherBackendTakesWhatOneDoesNotAnswer) {
  const BlackHole silent;
  const NamedServer alive("alive");
  Userspace settings;
  settings.connect_timeout = "200ms";
  FallbackProxy proxy(proxy_toml({web({silent.backend(), backend(alive)})}, settings));
  for (int i = 0; i < 50; ++i) EXPECT_EQ(ask(vip, vip_port), answered_by("alive"));
}

TEST_F(Retry, KeepsTheFirstBytesForTheBackendThatTakesThem) {
  const BlackHole silent;
  const TcpListener alive;
  Userspace settings;
  settings.connect_timeout = "200ms";
  // In this order for the first connection, or in another: the bytes arrive.
  FallbackProxy proxy(
      proxy_toml({web({closed(7001), silent.backend(), alive.backend()}, "policy = \"round_robin\"\n")}, settings));
  for (int i = 0; i < 6; ++i) {
    const Fd client = dial(vip, vip_port);
    send_all(client, "the first bytes");
    send_end(client);
    EXPECT_EQ(receive_all(alive.accept()), "the first bytes");
  }
}

TEST_F(Retry, ResetsTheClientWhenNoBackendTakesIt) {
  Attempts at_one(7001), at_two(7002), at_three(7003);
  FallbackProxy proxy(proxy_toml({web({closed(7001), closed(7002), closed(7003)})}));
  EXPECT_EQ(end_of(dial(vip, vip_port)), ECONNRESET);
  EXPECT_EQ(at_one.count(), 1U);
  EXPECT_EQ(at_two.count(), 1U);
  EXPECT_EQ(at_three.count(), 1U);
}

TEST_F(Retry, ResetsTheClientAfterTheConnectTimeout) {
  const BlackHole silent;
  Userspace settings;
  settings.connect_timeout = "300ms";
  FallbackProxy proxy(proxy_toml({web({silent.backend()})}, settings));
  const auto start = std::chrono::steady_clock::now();
  EXPECT_EQ(end_of(dial(vip, vip_port)), ECONNRESET);
  EXPECT_GE(std::chrono::steady_clock::now() - start, std::chrono::milliseconds(300));
}

TEST_F(Retry, ForgetsAClientThatLeavesMeanwhile) {
  const BlackHole silent;
  Userspace settings;
  settings.connect_timeout = "300ms";
  FallbackProxy proxy(proxy_toml({web({silent.backend()})}, settings));
  const std::size_t files = proxy.open_files();
  for (int i = 0; i < 20; ++i) reset(dial(vip, vip_port));
  EXPECT_TRUE(eventually([&] { return proxy.open_files() > files; }));
  EXPECT_TRUE(eventually([&] { return proxy.open_files() == files; }));
}

TEST_F(Retry, TriesTheOnlyBackendAlthoughItWasDead) {
  FallbackProxy proxy(proxy_toml({web({closed(7001)})}));
  EXPECT_EQ(end_of(dial(vip, vip_port)), ECONNRESET);
  const TcpListener back("127.0.0.1", 7001);
  const Connected now = connect_through(back);
  send_all(now.backend, "back");
  EXPECT_EQ(receive(now.client, 4), "back");
}

/// How often a dead backend may have been tried: at once, then after 1 s, 2 s, 4 s and so on.
std::size_t allowed_attempts(std::chrono::steady_clock::time_point since) {
  std::size_t allowed = 1;
  std::chrono::seconds pause(1);
  for (auto next = since + pause; next < std::chrono::steady_clock::now(); next += pause) {
    ++allowed;
    pause *= 2;
  }
  return allowed;
}

TEST_F(Retry, NotEveryoneTriesADeadBackend) {
  const NamedServer alive("alive");
  Attempts attempts(7001);
  FallbackProxy proxy(proxy_toml({web({closed(7001, 9), backend(alive)})}));
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < 500; ++i) ASSERT_EQ(ask(vip, vip_port), answered_by("alive"));
  EXPECT_GE(attempts.count(), 1U);
  EXPECT_LE(attempts.count(), allowed_attempts(start));
}

TEST_F(Retry, NobodyForgetsADeadBackendInAReload) {
  const NamedServer alive("alive");
  Attempts attempts(7001);
  FallbackProxy proxy(proxy_toml({web({closed(7001, 9), backend(alive)})}));
  const auto start = std::chrono::steady_clock::now();
  for (std::uint32_t reload = 0; reload < 20; ++reload) {
    for (int i = 0; i < 20; ++i) ASSERT_EQ(ask(vip, vip_port), answered_by("alive"));
    proxy.reload(proxy_toml({web({closed(7001, 9 + reload % 2), backend(alive)})}));
  }
  EXPECT_GE(attempts.count(), 1U);
  EXPECT_LE(attempts.count(), allowed_attempts(start));
}

TEST_F(Retry, UsesABackendAgainThatHasComeBack) {
  const NamedServer alive("alive");
  FallbackProxy proxy(proxy_toml({web({closed(7001, 9), backend(alive)})}));
  for (int i = 0; i < 20; ++i) EXPECT_EQ(ask(vip, vip_port), answered_by("alive"));
  const TcpListener back("127.0.0.1", 7001);
  std::vector<Fd> clients;  // kept: at the other one they wait in the queue
  EXPECT_TRUE(eventually([&] {
    clients.push_back(dial(vip, vip_port));
    return is_readable(back.get(), 1);
  }));
}

TEST_F(Retry, ABackendThatDiesAndComesBackIsLoggedOnce) {
  const NamedServer alive("alive");
  FallbackProxy proxy(proxy_toml({web({closed(7001, 60000), backend(alive)})}));
  for (int i = 0; i < 20; ++i) EXPECT_EQ(ask(vip, vip_port), answered_by("alive"));
  proxy.wait_for_log(
      "warning: service web: backend 127.0.0.1:7001 does not answer: Connection refused; tried again in 1 s\n");
  const TcpListener back("127.0.0.1", 7001);
  ASSERT_TRUE(eventually([&] {
    reset(dial(vip, vip_port));
    return is_readable(back.get(), 1);
  }));
  proxy.wait_for_log("info: service web: backend 127.0.0.1:7001 answers again\n");
  for (int i = 0; i < 20; ++i) reset(dial(vip, vip_port));
  const std::string log = proxy.terminate().err;
  EXPECT_EQ(log.find("backend", log.find("backend 127.0.0.1:7001 answers again") + 1), std::string::npos) << log;
  EXPECT_EQ(log.find("does not answer"), log.rfind("does not answer")) << log;
}

/// What a process does that answers with a name until it is killed.
std::function<void(const Channel&)> server(const std::string& name, std::uint16_t port) {
  return [name, port](const Channel& channel) {
    const TcpListener listener("127.0.0.1", port);
    channel.tell('r');
    for (;;) send_all(listener.accept(), name);
  };
}

TEST_F(Retry, NoNewConnectionNoticesThatABackendIsKilledAndRestarted) {
  const NamedServer alive("alive");
  std::optional<Child> mortal(std::in_place, server("mortal", 7001));
  mortal->channel().hear();
  FallbackProxy proxy(proxy_toml({web({closed(7001), backend(alive)})}));
  Asker before(vip, vip_port);
  before.wait_for(100);
  mortal->kill();
  mortal->wait();
  // From here on nobody may see an error. Of what had reached it before, two connections may: the kernel closes what a
  // killed process had one by one, so that the client of the first can be back before the listener is closed.
  Asker after(vip, vip_port);
  after.wait_for(500);
  mortal.emplace(server("mortal", 7001));
  mortal->channel().hear();
  EXPECT_TRUE(eventually([] { return ask(vip, vip_port) == answered_by("mortal"); }));
  after.wait_for(500);

  auto seen = after.stop();
  EXPECT_GT(seen.count("alive"), 0U);
  seen.erase("alive");
  seen.erase("mortal");
  EXPECT_TRUE(seen.empty()) << testing::PrintToString(seen);
  auto earlier = before.stop();
  EXPECT_GT(earlier.count("mortal"), 0U);
  earlier.erase("alive");
  earlier.erase("mortal");
  std::uint64_t errors = 0;
  for (const auto& [answer, times] : earlier) errors += times;
  EXPECT_LE(errors, 2U) << testing::PrintToString(earlier);
}

}  // namespace
