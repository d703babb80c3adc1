// SPDX-License-Identifier: BSD-2-Clause
//
// UDP services: who answers, from where, for how long, and what happens when something leaves.
#include "tests/support/udp.h"

#include <fmt/format.h>
#include <sched.h>
#include <signal.h>
#include <sys/resource.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <deque>
#include <fstream>
#include <set>
#include <sstream>

#include "tests/proxy/control.h"

namespace {

using namespace support;

constexpr std::uint16_t port = 5353;

Service udp(std::vector<Backend> backends, const std::string& more = {}) {
  return {"names", vip, port, std::move(backends), "refuse", "protocol = \"udp\"\npolicy = \"round_robin\"\n" + more};
}

UdpAnswer ask(const UdpSocket& client) { return support::ask(client, vip, port); }

void ip(const std::string& arguments) {
  std::vector<std::string> command = {"ip"};
  std::istringstream words(arguments);
  for (std::string word; words >> word;) command.push_back(word);
  const Finished finished = run(command);
  if (finished.exit_code != 0) throw std::runtime_error("ip " + arguments + ": " + finished.err);
}

/// The kernel makes a new IPv6 address tentative for a moment, and its route a little later: until both are done, it
/// loses what is sent there.
bool arrives(const std::string& address) {
  try {
    const UdpSocket there(address);
    const UdpSocket here("::1");
    here.send_to(address, there.port(), "?");
    return is_readable(there.get(), 100);
  } catch (const std::system_error&) {
    return false;
  }
}

/// Asks by a connected socket: the kernel refuses. False when there is an answer, or none.
bool is_refused(const UdpSocket& client) {
  client.send("?");
  return is_readable(client.get(), 100) && client.error() == ECONNREFUSED;
}

/// A port at which nobody answers.
Backend nobody() { return UdpSocket().backend(); }

class Udp : public Proxied {};

// --- what passes ----------------------------------------------------------------------------------------------------

TEST_F(Udp, AnswersComeFromTheVip) {
  const UdpServer one("one");
  FallbackProxy proxy(proxy_toml({udp({one.backend()})}));
  const UdpSocket client;
  client.send_to(vip, port, "?");
  const Datagram answer = client.receive();
  EXPECT_EQ(answer.address, vip);
  EXPECT_EQ(answer.port, port);
  EXPECT_EQ(answer.bytes.substr(0, 4), "one ");
}

TEST_F(Udp, AnswersReachConnectedClients) {
  const UdpServer one("one");
  FallbackProxy proxy(proxy_toml({udp({one.backend()})}));
  const UdpSocket client;
  client.connect(vip, port);  // from now on the kernel drops what comes from elsewhere
  client.send("?");
  EXPECT_EQ(client.receive().bytes.substr(0, 4), "one ");
}

TEST_F(Udp, WorksOverIpv6) {
  ip("-6 addr add fd00::1/128 dev lo nodad");
  EXPECT_TRUE(eventually([] { return arrives("fd00::1"); }));
  const UdpServer six("six", "::1");
  FallbackProxy proxy(proxy_toml({{"names", "fd00::1", port, {six.backend()}, "refuse", "protocol = \"udp\"\n"}}));
  const UdpSocket unconnected("::1");
  EXPECT_EQ(support::ask(unconnected, "fd00::1", port).name, "six");
  const UdpSocket connected("::1");
  connected.connect("fd00::1", port);
  connected.send("?");
  EXPECT_EQ(connected.receive().bytes.substr(0, 4), "six ");
}

TEST_F(Udp, EmptyDatagramsPass) {
  const UdpSocket server;
  FallbackProxy proxy(proxy_toml({udp({server.backend()})}));
  const UdpSocket client;
  client.send_to(vip, port, "");
  const Datagram question = server.receive();
  EXPECT_EQ(question.bytes, "");
  server.answer(question, "");
  const Datagram answer = client.receive();
  EXPECT_EQ(answer.bytes, "");
  EXPECT_EQ(answer.port, port);
}

TEST_F(Udp, TheLargestDatagramsPassWhole) {
  const UdpSocket server;
  FallbackProxy proxy(proxy_toml({udp({server.backend()})}));
  const UdpSocket client;
  constexpr std::size_t largest = 65507;
  for (const std::uint64_t seed : {1U, 2U, 3U}) {
    client.send_to(vip, port, stream(seed, largest));
    const Datagram question = server.receive();
    EXPECT_TRUE(question.bytes == stream(seed, largest));
    server.answer(question, stream(seed + 10, largest));
    EXPECT_TRUE(client.receive().bytes == stream(seed + 10, largest));
  }
}

TEST_F(Udp, ABurstKeepsItsOrderAndItsBounds) {
  const UdpSocket server;
  FallbackProxy proxy(proxy_toml({udp({server.backend()})}));
  const UdpSocket client;
  const auto datagram = [](std::size_t i) { return fmt::format("{}{}", i, std::string(i % 7, '.')); };
  constexpr std::size_t count = 100;  // several batches
  for (std::size_t i = 0; i < count; ++i) client.send_to(vip, port, datagram(i));
  Datagram question;
  for (std::size_t i = 0; i < count; ++i) {
    question = server.receive();
    ASSERT_EQ(question.bytes, datagram(i));
  }
  for (std::size_t i = 0; i < count; ++i) server.answer(question, datagram(i));
  for (std::size_t i = 0; i < count; ++i) ASSERT_EQ(client.receive().bytes, datagram(i));
}

TEST_F(Udp, EachOfManyClientsGetsItsOwnAnswers) {
  const UdpSocket server;
  FallbackProxy proxy(proxy_toml({udp({server.backend()})}));
  std::deque<UdpSocket> clients;
  for (int i = 0; i < 300; ++i) clients.emplace_back();
  std::set<std::uint16_t> ports;
  for (std::size_t begin = 0; begin < clients.size(); begin += 50) {
    // Interleaved, and no more at once than any socket's buffer holds.
    for (std::size_t i = begin; i < begin + 50; ++i) clients[i].send_to(vip, port, std::to_string(i));
    for (std::size_t i = begin; i < begin + 50; ++i) {
      const Datagram question = server.receive();
      ports.insert(question.port);
      server.answer(question, question.bytes + "!");
    }
    for (std::size_t i = begin; i < begin + 50; ++i) ASSERT_EQ(clients[i].receive().bytes, std::to_string(i) + "!");
  }
  EXPECT_EQ(ports.size(), clients.size());
}

TEST_F(Udp, ABackendMaySayMoreThanItIsAsked) {
  const UdpSocket server;
  FallbackProxy proxy(proxy_toml({udp({server.backend()})}));
  const UdpSocket client;
  client.send_to(vip, port, "subscribe");
  const Datagram question = server.receive();
  for (const char* news : {"first", "second", "third"}) server.answer(question, news);
  for (const char* news : {"first", "second", "third"}) EXPECT_EQ(client.receive().bytes, news);
}

TEST_F(Udp, TcpAndUdpOfOnePortAreTwoServices) {
  const NamedServer tcp("tcp");
  const UdpServer datagrams("udp");
  FallbackProxy proxy(proxy_toml({udp({datagrams.backend()}), {"stream", vip, port, {backend(tcp)}}}));
  const UdpSocket client;
  EXPECT_EQ(ask(client).name, "udp");
  EXPECT_EQ(support::ask(vip, port), answered_by("tcp"));
}

TEST_F(Udp, DigAsksADnsServer) {
  const Backend server = nobody();
  Process dnsmasq(
      {"dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts",
       "--pid-file=", "--user=root", "--log-facility=-", "--bind-interfaces", "--listen-address=127.0.0.1",
       "--no-dhcp-interface=lo", fmt::format("--port={}", server.port), "--address=/name.test/10.1.2.3",
       "--txt-record=long.test," + std::string(250, 'x') + "," + std::string(250, 'y') + "," + std::string(250, 'z')});
  dnsmasq.wait_for_error("started");
  FallbackProxy proxy(proxy_toml({udp({server})}));
  // dig itself complains of an answer from elsewhere than where it has asked.
  const auto dig = [](const std::string& name, const std::string& type) {
    return run({"dig", std::string("@") + vip, "-p", std::to_string(port), "+notcp", "+ignore", "+tries=1", "+time=20",
                "+bufsize=4096", "+short", name, type});
  };
  const Finished address = dig("name.test", "A");
  EXPECT_EQ(address.exit_code, 0);
  EXPECT_EQ(address.out, "10.1.2.3\n");
  const Finished text = dig("long.test", "TXT");
  EXPECT_NE(text.out.find(std::string(250, 'z')), std::string::npos) << text.out;
}

// --- flows ----------------------------------------------------------------------------------------------------------

TEST_F(Udp, AClientKeepsItsBackend) {
  const UdpServer one("one");
  const UdpServer two("two");
  FallbackProxy proxy(proxy_toml({udp({one.backend(), two.backend()})}));
  std::set<std::string> names;
  for (int i = 0; i < 4; ++i) {
    const UdpSocket client;
    const UdpAnswer first = ask(client);
    for (int again = 0; again < 5; ++again) EXPECT_EQ(ask(client), first);
    names.insert(first.name);
  }
  EXPECT_EQ(names, (std::set<std::string>{"one", "two"}));
}

TEST_F(Udp, AffinityKeepsAClientsFlowsTogether) {
  const UdpServer one("one");
  const UdpServer two("two");
  FallbackProxy proxy(proxy_toml({udp({one.backend(), two.backend()}, "affinity = \"1h\"\n")}));
  std::set<std::string> names;
  for (const char* address : {"127.0.7.1", "127.0.7.2"}) {
    const UdpAnswer first = ask(UdpSocket(address));
    for (int again = 0; again < 5; ++again) EXPECT_EQ(ask(UdpSocket(address)).name, first.name);
    names.insert(first.name);
  }
  EXPECT_EQ(names, (std::set<std::string>{"one", "two"}));
}

TEST_F(Udp, AnIdleFlowEnds) {
  const UdpServer one("one");
  FallbackProxy proxy(proxy_toml({udp({one.backend()})}, {.udp_timeout = "200ms"}));
  const std::size_t before = proxy.open_files();
  const UdpSocket client;
  const UdpAnswer first = ask(client);
  EXPECT_TRUE(eventually([&] { return proxy.open_files() == before; }));
  EXPECT_NE(ask(client), first);
}

TEST_F(Udp, AFlowIsNotIdleWhileTheBackendSpeaks) {
  const UdpSocket server;
  FallbackProxy proxy(proxy_toml({udp({server.backend()})}, {.udp_timeout = "1s"}));
  const UdpSocket client;
  client.send_to(vip, port, "subscribe");
  const Datagram question = server.receive();
  const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(2500);
  while (std::chrono::steady_clock::now() < end) {
    server.answer(question, "news");
    ASSERT_EQ(client.receive().bytes, "news");
  }
}

TEST_F(Udp, AFlowIsNotIdleWhileTheClientSpeaks) {
  const UdpSocket server;
  FallbackProxy proxy(proxy_toml({udp({server.backend()})}, {.udp_timeout = "1s"}));
  const UdpSocket client;
  client.send_to(vip, port, "line");
  const std::uint16_t flow = server.receive().port;
  const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(2500);
  while (std::chrono::steady_clock::now() < end) {
    client.send_to(vip, port, "line");
    ASSERT_EQ(server.receive().port, flow);
  }
}

TEST_F(Udp, AnswersThatWaitedForAStoppedProxyArePassedOn) {
  const UdpSocket server;
  FallbackProxy proxy(proxy_toml({udp({server.backend()})}, {.udp_timeout = "500ms"}));
  std::vector<UdpSocket> clients(300);  // more than epoll tells of at once
  std::vector<Datagram> questions;
  for (const UdpSocket& client : clients) {
    client.send_to(vip, port, "question");
    questions.push_back(server.receive());
  }
  proxy.signal(SIGSTOP);
  for (const Datagram& question : questions) server.answer(question, "answer");
  std::this_thread::sleep_for(std::chrono::milliseconds(700));
  proxy.signal(SIGCONT);
  for (const UdpSocket& client : clients) {
    ASSERT_TRUE(is_readable(client.get(), 5000));
    EXPECT_EQ(client.receive().bytes, "answer");
  }
}

TEST_F(Udp, AtTheBoundTheFlowIdleForLongestEnds) {
  const UdpServer one("one");
  FallbackProxy proxy(proxy_toml({udp({one.backend()})}, {}, {.flows = 4}));
  std::array<UdpSocket, 5> clients;
  std::array<UdpAnswer, 4> first;
  for (std::size_t i = 0; i < first.size(); ++i) first[i] = ask(clients[i]);
  EXPECT_EQ(ask(clients[0]), first[0]);  // now 1 has been idle for longest
  EXPECT_EQ(ask(clients[4]).name, "one");
  EXPECT_EQ(ask(clients[0]), first[0]);
  EXPECT_EQ(ask(clients[2]), first[2]);
  EXPECT_EQ(ask(clients[3]), first[3]);
  EXPECT_NE(ask(clients[1]), first[1]);
}

TEST_F(Udp, AServiceThatHasAllFlowsGivesOthersSome) {
  const UdpServer one("one");
  const UdpServer two("two");
  Service other = udp({two.backend()});
  other.name = "other";
  other.vip = "127.0.1.2";
  // Each in a thread of its own.
  FallbackProxy proxy(proxy_toml({udp({one.backend()}), other}, {.threads = 2}, {.flows = 4}));
  std::deque<UdpSocket> clients(8);
  for (const UdpSocket& client : clients) EXPECT_EQ(ask(client).name, "one");
  EXPECT_EQ(ask_until_answered(UdpSocket(), other.vip, port).name, "two");
  EXPECT_EQ(ask(UdpSocket()).name, "one");
}

TEST_F(Udp, FlowsLeaveDescriptorsToConnections) {
  const UdpServer one("one");
  const NamedServer tcp("tcp");
  FallbackProxy proxy(proxy_toml({udp({one.backend()}), web({backend(tcp)})}), [] {
    const rlimit few{160, 160};
    ::setrlimit(RLIMIT_NOFILE, &few);
  });
  for (int i = 0; i < 300; ++i) ASSERT_EQ(ask(UdpSocket()).name, "one");
  std::vector<Fd> connections;
  for (int i = 0; i < 10; ++i) {
    connections.push_back(dial(vip, vip_port));
    ASSERT_EQ(receive(connections.back(), 3), "tcp");
  }
  EXPECT_LT(proxy.open_files(), 160U);
}

TEST_F(Udp, SurvivesWithoutDescriptors) {
  const UdpServer one("one");
  FallbackProxy proxy(proxy_toml({udp({one.backend()})}));
  const UdpSocket first;
  ask(first);
  proxy.leave_descriptors(0);
  UdpSocket second;
  EXPECT_EQ(ask(second).name, "one");  // by the one that is kept for such a moment
  const UdpSocket third;
  third.send_to(vip, port, "?");
  EXPECT_EQ(ask(first).name, "one");  // behind the third's
  EXPECT_FALSE(is_readable(third.get()));
  proxy.leave_descriptors({});
  EXPECT_EQ(ask_until_answered(third, vip, port).name, "one");
}

// --- backends that leave or refuse ----------------------------------------------------------------------------------

TEST_F(Udp, AFlowThatFindsNoRoomInEpollIsNoneAndTheEndComes) {
  const UdpServer one("one");
  FallbackProxy proxy(proxy_toml({udp({one.backend()})}), [] { forbid_watching_from(60); });
  // Before the flows: afterwards there is no room for its socket either. What has been answered was accepted.
  ControlClient control = connect_to(*proxy.files());
  ASSERT_TRUE(control.ask({{"request", "status"}}));
  std::deque<UdpSocket> clients;
  for (int i = 0; i < 60; ++i) clients.emplace_back().send_to(vip, port, "?");
  std::size_t refused = 0;
  std::size_t live = 0;
  const auto is_settled = [&] {
    const auto told = control.ask({{"request", "status"}});
    if (!told) return false;
    const object& names = told->at("services").at(0).as_object();
    refused = number(names, "refused");
    live = number(names.at("backends").at(0).as_object(), "live");
    return refused + live == 60 && number(*told, "connections") == live;
  };
  EXPECT_TRUE(eventually(is_settled)) << refused << " refused, " << live << " live";
  EXPECT_GT(live, 0U);
  EXPECT_GT(refused, 0U) << "the test has no effect";
  const auto answered = [&] {
    return std::ranges::count_if(clients, [](const UdpSocket& client) { return is_readable(client.get(), 0); });
  };
  EXPECT_TRUE(eventually([&] { return static_cast<std::size_t>(answered()) == live; })) << answered() << ", " << live;
  EXPECT_EQ(proxy.terminate().exit_code, 0);
}

TEST_F(Udp, FlowsOfABackendThatIsRemovedPickAnew) {
  const UdpServer one("one");
  const UdpServer two("two");
  for (const char* on_remove : {"drain", "reset"}) {
    const std::string more = fmt::format("on_remove = \"{}\"\n", on_remove);
    FallbackProxy proxy(proxy_toml({udp({one.backend()}, more)}));
    const UdpSocket client;
    EXPECT_EQ(ask(client).name, "one");
    proxy.reload(proxy_toml({udp({two.backend()}, more)}));
    EXPECT_EQ(ask(client).name, "two") << on_remove;
  }
}

TEST_F(Udp, FlowsOfABackendThatDrainsPickAnew) {
  const UdpServer one("one");
  const UdpServer two("two");
  FallbackProxy proxy(proxy_toml({udp({one.backend()})}));
  const UdpSocket client;
  EXPECT_EQ(ask(client).name, "one");
  Backend draining = one.backend();
  draining.state = "drain";
  proxy.reload(proxy_toml({udp({draining, two.backend()})}));
  EXPECT_EQ(ask(client).name, "two");
}

TEST_F(Udp, FlowsOfABackendThatIsRemovedMayBeKept) {
  const UdpServer one("one");
  const UdpServer two("two");
  const std::string keep = "on_remove = \"keep\"\n";
  FallbackProxy proxy(proxy_toml({udp({one.backend()}, keep)}));
  const UdpSocket client;
  const UdpAnswer first = ask(client);
  EXPECT_EQ(first.name, "one");
  proxy.reload(proxy_toml({udp({two.backend()}, keep)}));
  EXPECT_EQ(ask(UdpSocket()).name, "two");
  EXPECT_EQ(ask(client), first);
}

TEST_F(Udp, AReloadLeavesOtherFlowsAlone) {
  const UdpServer one("one");
  const UdpServer two("two");
  FallbackProxy proxy(proxy_toml({udp({one.backend()})}));
  const UdpSocket client;
  const UdpAnswer first = ask(client);
  proxy.reload(proxy_toml({udp({one.backend(), two.backend()})}));
  EXPECT_EQ(ask(client), first);
}

TEST_F(Udp, AFlowWhoseBackendRefusesPicksAnother) {
  UdpServer one("one");
  UdpServer two("two");
  FallbackProxy proxy(proxy_toml({udp({one.backend(), two.backend()})}));
  const std::size_t before = proxy.open_files();
  const UdpSocket client;
  const UdpAnswer first = ask(client);
  (first.name == "one" ? one : two).stop();
  client.send_to(vip, port, "?");  // this one is lost
  EXPECT_TRUE(eventually([&] { return proxy.open_files() == before; }));
  EXPECT_EQ(ask(client).name, first.name == "one" ? "two" : "one");
}

TEST_F(Udp, ABackendThatRefusesOnceIsLeftAloneForAWhile) {
  const UdpServer one("one");
  FallbackProxy proxy(proxy_toml({udp({nobody(), one.backend()})}));
  std::size_t lost = 0;
  for (int i = 0; i < 50; ++i) {
    const UdpSocket client;
    client.send_to(vip, port, "?");
    if (!is_readable(client.get(), 1000)) ++lost;
  }
  // The first, and those that try whether it is back: after 1 s, 2 s, 4 s, ...
  EXPECT_GE(lost, 1U);
  EXPECT_LE(lost, 5U);
}

TEST_F(Udp, ABackendThatIsBackIsUsedAgain) {
  auto one = std::make_unique<UdpSocket>();
  const Backend address = one->backend();
  const std::string address_text = fmt::format("backend 127.0.0.1:{}", address.port);
  FallbackProxy proxy(proxy_toml({udp({address})}));
  const std::size_t before = proxy.open_files();
  const UdpSocket client;
  client.send_to(vip, port, "?");
  EXPECT_EQ(one->receive().bytes, "?");
  one.reset();
  client.send_to(vip, port, "refused");
  EXPECT_TRUE(eventually([&] { return proxy.open_files() == before; }));
  const UdpSocket again("127.0.0.1", address.port);
  proxy.wait_for_log(address_text + " does not answer: Connection refused; tried again in 1 s\n");
  // It is the only one, so it is tried although it is marked.
  client.send_to(vip, port, "!");
  const Datagram question = again.receive();
  EXPECT_EQ(question.bytes, "!");
  again.answer(question, "back");
  proxy.wait_for_log(address_text + " does not refuse any more\n");
}

/// The local ports of this network namespace, while it lives.
class FewLocalPorts {
 public:
  explicit FewLocalPorts(const std::string& range) : before_(read_text(path)) { std::ofstream(path) << range; }
  ~FewLocalPorts() { std::ofstream(path) << before_; }
  FewLocalPorts(const FewLocalPorts&) = delete;
  FewLocalPorts& operator=(const FewLocalPorts&) = delete;

 private:
  static constexpr const char* path = "/proc/sys/net/ipv4/ip_local_port_range";
  const std::string before_;
};

TEST_F(Udp, NobodyEverHearsItself) {
  // Sooner or later a flow's socket would be given the port of the backend that nobody has.
  const FewLocalPorts few("40000 40003");
  const UdpSocket live("127.0.0.1", 7001);
  Service sign = udp({{"127.0.0.1", 7001}});
  sign.name = "sign";
  sign.vip = "127.0.1.2";
  FallbackProxy proxy(proxy_toml({udp({{"127.0.0.1", 40001}}), sign}, {.threads = 1}));
  const UdpSocket client("127.0.0.1", 7002);
  for (int i = 0; i < 100; ++i) {
    client.send_to(vip, port, "?");
    client.send_to(sign.vip, port, "handled?");
    const Datagram question = live.receive();
    live.answer(question, "handled");
    ASSERT_EQ(client.receive().bytes, "handled");
  }
}

// --- services without backends, and without a place -----------------------------------------------------------------

TEST_F(Udp, AServiceWithoutActiveBackendRefuses) {
  const UdpServer one("one");
  Backend draining = one.backend();
  draining.state = "drain";
  FallbackProxy proxy(proxy_toml({udp({draining})}));
  const UdpSocket client;
  client.connect(vip, port);
  client.send("?");
  EXPECT_EQ(client.error(), ECONNREFUSED);

  proxy.reload(proxy_toml({udp({one.backend()})}));
  client.send("?");
  EXPECT_EQ(client.receive().bytes.substr(0, 4), "one ");

  proxy.reload(proxy_toml({udp({draining}, "on_remove = \"keep\"\n")}));
  EXPECT_TRUE(eventually([&] { return is_refused(client); }));
}

TEST_F(Udp, AServiceThatIsRemovedRefuses) {
  const UdpServer one("one");
  const UdpServer two("two");
  Service other = udp({two.backend()});
  other.name = "other";
  other.vip = "127.0.1.2";
  FallbackProxy proxy(proxy_toml({udp({one.backend()}), other}));
  const UdpSocket stays;
  const UdpAnswer first = support::ask(stays, other.vip, port);
  const UdpSocket client;
  client.connect(vip, port);
  client.send("?");
  EXPECT_EQ(client.receive().bytes.substr(0, 4), "one ");
  proxy.reload(proxy_toml({other}));
  EXPECT_TRUE(eventually([&] { return is_refused(client); }));
  EXPECT_EQ(support::ask(stays, other.vip, port), first);
}

TEST_F(Udp, APlaceThatIsTakenIsThatServicesProblemAlone) {
  const UdpServer one("one");
  const UdpSocket everywhere("0.0.0.0", 5300);
  Service taken = udp({one.backend()});
  taken.name = "taken";
  taken.port = 5300;
  FallbackProxy proxy(proxy_toml({taken, udp({one.backend()})}));
  EXPECT_EQ(ask(UdpSocket()).name, "one");
  const Finished finished = proxy.terminate();
  EXPECT_NE(finished.err.find("service taken: binding 127.0.1.1:5300: Address already in use"), std::string::npos)
      << finished.err;
}

// --- other hosts ----------------------------------------------------------------------------------------------------

/// Another network namespace, at the far end of a virtual cable: 10.99.0.2 there, 10.99.0.1 here.
class Neighbour {
 public:
  Neighbour()
      : child_([](const Channel& channel) {
          checked(::unshare(CLONE_NEWNET), "unshare");
          channel.tell('u');
          channel.hear();
          ip("addr add 10.99.0.2/24 dev cable1");
          ip("link set cable1 up");
          const UdpSocket client("10.99.0.2");
          channel.tell('r');
          for (;;) {
            client.send_to("10.99.0.1", port, std::string(1, channel.hear()));
            channel.tell('s');
          }
        }) {
    child_.channel().hear();
    ip("link add cable0 type veth peer name cable1 netns " + std::to_string(child_.pid()));
    ip("addr add 10.99.0.1/24 dev cable0");
    ip("link set cable0 up");
    child_.channel().tell('g');
    child_.channel().hear();
  }
  ~Neighbour() { run({"ip", "link", "del", "cable0"}); }

  /// Sends one letter to the service, and blocks until that is done.
  void send(char letter) const {
    child_.channel().tell(letter);
    child_.channel().hear();
  }

 private:
  Child child_;
};

TEST_F(Udp, ClientsOfOtherHostsAreDeniedUnlessAllowed) {
  const Neighbour neighbour;
  const UdpSocket server;
  Service exposed = udp({server.backend()});
  exposed.vip = "10.99.0.1";
  FallbackProxy proxy(proxy_toml({exposed}));
  const UdpSocket local("10.99.0.1");
  // The cable has carried the neighbour's when its next letter has come: they are read in the order in which they came.
  neighbour.send('a');
  neighbour.send('b');
  local.send_to("10.99.0.1", port, "local");
  EXPECT_EQ(server.receive().bytes, "local");

  proxy.reload(proxy_toml({exposed}, {.allow_from = {"10.99.0.0/24"}}));
  std::string letter;
  EXPECT_TRUE(eventually([&] {
    neighbour.send('c');
    if (!is_readable(server.get(), 100)) return false;
    letter = server.receive().bytes;
    return true;
  }));
  EXPECT_EQ(letter, "c");
}

// Over IPv4, the kernel drops what comes from the network in the name of this host.
TEST_F(Udp, NobodyElseIsBelievedToBeThisHostOverIpv6) {
  Child neighbour([](const Channel& channel) {
    checked(::unshare(CLONE_NEWNET), "unshare");
    channel.tell('u');
    channel.hear();
    for (const char* arguments :
         {"link set lo up", "addr add fd00:98::1/128 dev lo", "addr add fd00:99::2/64 dev cable1 nodad",
          "link set cable1 up", "route add fd00:96::10 via fd00:99::1"})
      ip(arguments);
    if (!eventually([] { return arrives("fd00:99::2"); })) throw std::runtime_error("no fd00:99::2");
    const UdpSocket forger("fd00:98::1"), honest("fd00:99::2");
    channel.tell('r');
    for (;;) {
      channel.hear();
      forger.send_to("fd00:96::10", port, "forged");
      honest.send_to("fd00:96::10", port, "honest");
      channel.tell('s');
    }
  });
  neighbour.channel().hear();
  ip("link add cable0 type veth peer name cable1 netns " + std::to_string(neighbour.pid()));
  ip("addr add fd00:99::1/64 dev cable0 nodad");
  ip("addr add fd00:98::1/128 dev cable0 nodad");
  ip("link set cable0 up");
  neighbour.channel().tell('g');
  neighbour.channel().hear();
  ASSERT_TRUE(eventually([] { return arrives("fd00:99::1") && arrives("fd00:98::1"); }));

  const UdpSocket server("::1");
  Service exposed = udp({server.backend()});
  exposed.vip = "fd00:96::10";
  FallbackProxy proxy(proxy_toml({exposed}, {.local_vips = true, .allow_from = {"fd00:99::/64"}}));
  const auto denied = [&] { return number(status(*proxy.files()).at("services").at(0).as_object(), "denied"); };
  std::set<std::string> heard;
  EXPECT_TRUE(eventually([&] {
    neighbour.channel().tell('g');
    neighbour.channel().hear();
    while (is_readable(server.get(), 100)) heard.insert(server.receive().bytes);
    return !heard.empty() && denied() > 0;
  }));
  EXPECT_EQ(heard, std::set<std::string>{"honest"});
  // From itself, it is.
  UdpSocket("fd00:98::1").send_to("fd00:96::10", port, "own");
  EXPECT_EQ(server.receive().bytes, "own");
  run({"ip", "link", "del", "cable0"});
}

// --- the end --------------------------------------------------------------------------------------------------------

TEST_F(Udp, WhatIsAskedIsAnsweredBeforeTheEnd) {
  const UdpSocket server;
  FallbackProxy proxy(proxy_toml({udp({server.backend()})}));
  const UdpSocket client;
  client.send_to(vip, port, "?");
  const Datagram question = server.receive();
  proxy.signal(SIGTERM);
  proxy.wait_for_log("accepting nothing more");
  server.answer(question, "answer");
  EXPECT_EQ(client.receive().bytes, "answer");
  // By itself, long before drain_timeout and udp_timeout: the flow is idle.
  const auto began = std::chrono::steady_clock::now();
  EXPECT_EQ(proxy.wait().exit_code, 0);
  EXPECT_LT(std::chrono::steady_clock::now() - began, std::chrono::seconds(20));
}

TEST_F(Udp, AnUpgradeLosesNeitherQuestionsNorAnswers) {
  const UdpSocket server;
  FallbackProxy before(proxy_toml({udp({server.backend()})}, {.threads = 1}));
  const UdpSocket early;
  early.send_to(vip, port, "early");
  const Datagram question = server.receive();
  FallbackProxy after(before.files(), {}, {"--take-over"});
  after.wait_for_log("has handed over");
  // Several, each of which would wake the old process, too.
  for (int i = 0; i < 5; ++i) {
    const UdpSocket late;
    late.send_to(vip, port, "late");
    const Datagram next = server.receive();
    EXPECT_EQ(next.bytes, "late");
    server.answer(next, "by the new one");
    EXPECT_EQ(late.receive().bytes, "by the new one");
    server.answer(question, "by the old one");
    EXPECT_EQ(early.receive().bytes, "by the old one");
  }
  EXPECT_EQ(before.wait().exit_code, 0);
  early.send_to(vip, port, "early");
  EXPECT_NE(server.receive().port, question.port);
}

TEST_F(Udp, NoFlowBeginsDuringTheEnd) {
  const UdpSocket server;
  const NamedServer tcp("tcp");
  const Service sign{"sign", "127.0.1.2", 80, {backend(tcp)}};
  FallbackProxy proxy(proxy_toml({udp({server.backend()}), sign}, {.threads = 1}));
  const UdpSocket client;
  client.send_to(vip, port, "?");
  const Datagram question = server.receive();
  proxy.signal(SIGTERM);
  // They stop in the order of their VIPs.
  EXPECT_TRUE(eventually([&] { return dial_errno(sign.vip, sign.port) == ECONNREFUSED; }));
  const UdpSocket late;
  late.send_to(vip, port, "too late");
  client.send_to(vip, port, "go on");
  const Datagram next = server.receive();
  EXPECT_EQ(next.bytes, "go on");
  EXPECT_EQ(next.port, question.port);
  EXPECT_EQ(proxy.wait().exit_code, 0);
}

TEST_F(Udp, WithoutFlowsTheEndComesAtOnce) {
  const UdpServer one("one");
  FallbackProxy proxy(proxy_toml({udp({one.backend()})}));
  const Finished finished = proxy.terminate();
  EXPECT_EQ(finished.exit_code, 0);
  EXPECT_NE(finished.err.find("0 connections to drain"), std::string::npos);
}

TEST_F(Udp, ABusyFlowEndsAfterDrainTimeout) {
  const UdpServer one("one");
  FallbackProxy proxy(proxy_toml({udp({one.backend()})}, {.drain_timeout = "500ms"}));
  const UdpSocket client;
  client.connect(vip, port);
  client.send("?");
  EXPECT_EQ(client.receive().bytes.substr(0, 4), "one ");
  proxy.signal(SIGTERM);
  EXPECT_TRUE(eventually([&] { return is_refused(client); }));
  EXPECT_EQ(proxy.wait().exit_code, 0);
}

TEST_F(Udp, ASecondSignalEndsFlowsAtOnce) {
  const UdpSocket server;
  FallbackProxy proxy(proxy_toml({udp({server.backend()})}));
  const UdpSocket client;
  client.send_to(vip, port, "?");
  server.receive();
  proxy.signal(SIGTERM);
  proxy.wait_for_log("accepting nothing more");
  proxy.signal(SIGTERM);
  const Finished finished = proxy.wait();
  EXPECT_EQ(finished.exit_code, 0);
}

}  // namespace
