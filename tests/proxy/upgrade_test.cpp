// SPDX-License-Identifier: BSD-2-Clause
//
// A process that takes over what another one serves: no connection is refused or reset, whatever becomes of it.
#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <cerrno>
#include <filesystem>
#include <map>
#include <memory>

#include "fallback_proxy/hand_over.h"
#include "tests/proxy/control.h"
#include "tests/support/udp.h"

namespace {

using namespace support;

constexpr const char* other_vip = "127.0.1.2";

std::unique_ptr<FallbackProxy> successor_of(const FallbackProxy& proxy) {
  auto next =
      std::make_unique<FallbackProxy>(proxy.files(), std::function<void()>(), std::vector<std::string>{"--take-over"});
  next->wait_for_log("has handed over");
  return next;
}

/// Whether the process has this socket of ours open as well.
bool has_open(const FallbackProxy& proxy, int socket) {
  struct stat ours{};
  checked(::fstat(socket, &ours), "fstat");
  for (const auto& entry : std::filesystem::directory_iterator(fmt::format("/proc/{}/fd", proxy.pid()))) {
    std::error_code gone;
    if (std::filesystem::read_symlink(entry.path(), gone) == fmt::format("socket:[{}]", ours.st_ino)) return true;
  }
  return false;
}

/// What a test is handed when it takes over itself.
userspace::Inheritance inherit_from(ControlClient& from) {
  auto inheritance = userspace::take_over(from);
  if (!inheritance) throw std::runtime_error(inheritance.error().message);
  return std::move(*inheritance);
}

class Upgrade : public Proxied {};

TEST_F(Upgrade, FailsNoConnectionUnderLoad) {
  const NamedServer one("one");
  auto proxy = std::make_unique<FallbackProxy>(proxy_toml({{"web", vip, 80, {backend(one)}}}));
  Asker asker(vip, 80), another(vip, 80), third(vip, 80);
  constexpr int upgrades = 5;
  for (int i = 0; i < upgrades; ++i) {
    auto next = successor_of(*proxy);
    EXPECT_EQ(proxy->wait().exit_code, fine);
    proxy = std::move(next);
    asker.wait_for(700);
  }
  std::map<std::string, std::uint64_t> answers;
  for (Asker* each : {&asker, &another, &third})
    for (const auto& [answer, count] : each->stop()) answers[answer] += count;
  EXPECT_EQ(answers.size(), 1u) << testing::PrintToString(answers);
  EXPECT_GE(answers["one"], upgrades * 700u);
  EXPECT_EQ(proxy->terminate().exit_code, fine);
}

TEST_F(Upgrade, LongConnectionsGoOnUntilTheyEnd) {
  const NamedServer before("before", "127.0.0.1", NamedServer::Speaks::http), after("after");
  FallbackProxy old(proxy_toml({{"web", vip, 80, {backend(before)}}}));
  Fd client = dial(vip, 80);
  ASSERT_TRUE(eventually([&] { return before.accepted() == 1; }));

  old.files()->write(proxy_toml({{"web", vip, 80, {backend(after)}}}));
  const auto next = successor_of(old);
  old.wait_for_log("replaced; 1 connections to drain");
  EXPECT_EQ(ask(vip, 80), answered_by("after"));
  EXPECT_EQ(number(status(*old.files()), "pid"), static_cast<std::uint64_t>(next->pid()));

  const std::string request = "GET / HTTP/1.0\r\n\r\n";
  ASSERT_EQ(::send(client.get(), request.data(), request.size(), 0), static_cast<ssize_t>(request.size()));
  const Answer answer = read_answer(client.get());
  EXPECT_TRUE(answer.text.ends_with("before")) << answer;
  reset(std::move(client));
  const std::string has_ended = fmt::format("pid {}, which this process has replaced, has ended", old.pid());
  EXPECT_EQ(old.wait().exit_code, fine);
  next->wait_for_log(has_ended);
  EXPECT_EQ(ask(vip, 80), answered_by("after"));
}

// The old process cannot accept what is queued (it has as many connections as it may have) when it closes its copy of
// the socket, and the new one, which is this test, has not accepted yet.
TEST_F(Upgrade, ResetsNothingThatIsQueued) {
  const TcpListener server;
  FallbackProxy old(proxy_toml({{"web", vip, 80, {server.backend()}}}), [] {
    const rlimit few{256, 256};
    checked(::setrlimit(RLIMIT_NOFILE, &few), "RLIMIT_NOFILE");
  });
  const std::uint64_t limit = number(status(*old.files()), "connection_limit");
  ASSERT_LT(limit, 128u);
  std::vector<Fd> served, queued;
  for (std::uint64_t i = 0; i < limit; ++i) served.push_back(dial(vip, 80));
  ASSERT_TRUE(eventually([&] { return number(status(*old.files()), "connections") == limit; }));
  for (int i = 0; i < 100; ++i) queued.push_back(dial(vip, 80));

  ControlClient client = connect_to(*old.files());
  const userspace::Inheritance inheritance = inherit_from(client);
  ASSERT_EQ(inheritance.sockets.size(), 1u);
  const int listener = inheritance.sockets.begin()->second.get();
  const auto replaced = userspace::say_ready(client);
  ASSERT_TRUE(replaced && *replaced);
  ASSERT_TRUE(eventually([&] { return !has_open(old, listener); }));

  for (std::size_t i = 0; i < queued.size(); ++i)
    send_all(Fd(checked(::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC), "accept")), "queued");
  for (const Fd& each : queued) EXPECT_EQ(read_answer(each.get()), answered_by("queued"));
  for (Fd& each : served) reset(std::move(each));
  EXPECT_EQ(old.wait().exit_code, fine);
  EXPECT_TRUE(std::filesystem::exists(old.files()->control())) << "the socket is the successor's";
}

TEST_F(Upgrade, VipsStayLocalForTheConnectionsOfTheOldOne) {
  const NamedServer before("before", "127.0.0.1", NamedServer::Speaks::http), after("after");
  const Userspace with_routes{.local_vips = true};
  FallbackProxy old(proxy_toml({{"web", "10.96.0.1", 80, {backend(before)}}}, with_routes));
  Fd client = dial("10.96.0.1", 80);
  ASSERT_TRUE(eventually([&] { return before.accepted() == 1; }));

  old.files()->write(proxy_toml({{"other", "10.96.0.2", 80, {backend(after)}}}, with_routes));
  const auto next = successor_of(old);
  old.wait_for_log("replaced; 1 connections to drain");
  EXPECT_EQ(ask("10.96.0.2", 80), answered_by("after"));
  EXPECT_TRUE(eventually([] { return ask("10.96.0.1", 80) == refused_with(ECONNREFUSED); })) << "not served, but local";

  const std::string request = "GET / HTTP/1.0\r\n\r\n";
  ASSERT_EQ(::send(client.get(), request.data(), request.size(), 0), static_cast<ssize_t>(request.size()));
  EXPECT_TRUE(read_answer(client.get()).text.ends_with("before"));
  reset(std::move(client));
  EXPECT_EQ(old.wait().exit_code, fine);
  // Nobody answers a SYN that meets the route while it goes: such a connect() takes its 10 s.
  EXPECT_TRUE(eventually([] { return ask("10.96.0.1", 80) == refused_with(ENETUNREACH); }, std::chrono::seconds(30)))
      << "no VIP any more";
  EXPECT_EQ(ask("10.96.0.2", 80), answered_by("after"));
  EXPECT_EQ(next->terminate().exit_code, fine);
  EXPECT_EQ(ask("10.96.0.2", 80), refused_with(ENETUNREACH)) << "the end of a proxy leaves no route";
}

TEST_F(Upgrade, OldOneHasItsVipsBackWhenTheNewOneHasDied) {
  const NamedServer one("one");
  const Userspace with_routes{.local_vips = true};
  FallbackProxy old(proxy_toml({{"web", "10.96.0.1", 80, {backend(one)}}}, with_routes));
  {
    ControlClient client = connect_to(*old.files());
    EXPECT_EQ(inherit_from(client).vips, std::vector{boost::asio::ip::make_address("10.96.0.1")});
  }
  old.wait_for_log("goes on serving");
  old.reload(proxy_toml({{"other", "10.96.0.2", 80, {backend(one)}}}, with_routes));
  EXPECT_EQ(ask("10.96.0.2", 80), answered_by("one"));
  EXPECT_EQ(old.terminate().exit_code, fine);
  EXPECT_EQ(ask("10.96.0.1", 80), refused_with(ENETUNREACH));
  EXPECT_EQ(ask("10.96.0.2", 80), refused_with(ENETUNREACH));
}

TEST_F(Upgrade, HandsOverMoreSocketsThanOneMessageTakes) {
  const NamedServer one("one");
  std::vector<Service> services;
  for (int i = 0; i < 600; ++i)
    services.push_back(
        {fmt::format("more-{}", i), fmt::format("127.1.{}.{}", i / 250, i % 250 + 1), 80, {backend(one)}});
  FallbackProxy old(proxy_toml(services, {}, {.services = 1000}));
  services.resize(500);
  old.files()->write(proxy_toml(services, {}, {.services = 1000}));
  const auto next = successor_of(old);
  EXPECT_EQ(old.wait().exit_code, fine);
  for (const auto& service : services) ASSERT_EQ(ask(service.vip, 80), answered_by("one")) << service.vip;
  EXPECT_EQ(ask("127.1.2.100", 80), refused_with(ECONNREFUSED)) << "the new configuration has no such service";
  const object seen = status(*old.files());
  for (const auto& service : seen.at("services").as_array()) ASSERT_EQ(service.at("reason"), "");
}

TEST_F(Upgrade, MistakeInTheFileLeavesTheOldOneServing) {
  const NamedServer one("one");
  FallbackProxy old(proxy_toml({{"web", vip, 80, {backend(one)}}}));
  old.files()->write(proxy_toml({{"web", vip, 0, {backend(one)}}}));
  const Finished next = fallback_proxy({"--config", old.files()->config(), "--take-over"});
  EXPECT_EQ(next.exit_code, configuration) << next.err;
  EXPECT_EQ(ask(vip, 80), answered_by("one"));
  EXPECT_EQ(number(status(*old.files()), "pid"), static_cast<std::uint64_t>(old.pid()));
}

TEST_F(Upgrade, ProcessThatDiesBeforeItIsReadyLeavesTheOldOneServing) {
  const NamedServer one("one");
  FallbackProxy old(proxy_toml({{"web", vip, 80, {backend(one)}}}));
  {
    ControlClient client = connect_to(*old.files());
    EXPECT_EQ(inherit_from(client).sockets.size(), 1u);
  }
  old.wait_for_log("goes on serving");
  EXPECT_EQ(ask(vip, 80), answered_by("one"));
  const auto next = successor_of(old);
  EXPECT_EQ(old.wait().exit_code, fine);
  EXPECT_EQ(ask(vip, 80), answered_by("one"));
}

TEST_F(Upgrade, OneProcessAtATimeTakesOver) {
  const NamedServer one("one");
  FallbackProxy old(proxy_toml({{"web", vip, 80, {backend(one)}}}));
  ControlClient client = connect_to(*old.files());
  EXPECT_EQ(inherit_from(client).sockets.size(), 1u);
  const Finished next = fallback_proxy({"--config", old.files()->config(), "--take-over"});
  EXPECT_EQ(next.exit_code, failed);
  EXPECT_TRUE(contains(next.err, fmt::format("pid {}: another process is taking over from it", old.pid()))) << next.err;
  EXPECT_EQ(ask(vip, 80), answered_by("one"));
}

TEST_F(Upgrade, SignalsWaitUntilTheHandOverHasEnded) {
  const NamedServer one("one"), two("two");
  FallbackProxy old(proxy_toml({{"web", vip, 80, {backend(one)}}}));
  {
    ControlClient client = connect_to(*old.files());
    EXPECT_EQ(inherit_from(client).sockets.size(), 1u);
    old.files()->write(proxy_toml({{"other", other_vip, 80, {backend(two)}}}));
    old.signal(SIGHUP);
    old.signal(SIGTERM);
    EXPECT_EQ(status(*old.files()).at("services").as_array().size(), 1u);
    EXPECT_EQ(ask(vip, 80), answered_by("one"));
  }
  const std::string log = old.wait().err;
  const auto position = [&](const char* text) { return log.find(text); };
  EXPECT_LT(position("this one goes on serving"), position("accepting nothing more")) << log;
  EXPECT_FALSE(std::filesystem::exists(old.files()->control()));
}

TEST_F(Upgrade, UnknownVersionOfTheProtocolLeavesTheOldOneServing) {
  const NamedServer one("one");
  FallbackProxy old(proxy_toml({{"web", vip, 80, {backend(one)}}}));
  const auto answer = connect_to(*old.files()).ask({{"request", "take_over"}, {"protocol", 99}});
  ASSERT_FALSE(answer);
  EXPECT_EQ(answer.error().message,
            fmt::format("pid {}: it speaks version 1 of the hand-over, not version 99", old.pid()));
  EXPECT_EQ(ask(vip, 80), answered_by("one"));
}

/// A process that would hand over, in the test's own hands.
class Predecessor {
 public:
  explicit Predecessor(const FallbackProxy::Files& files)
      : control_(checked(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), "socket")) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    files.control().copy(address.sun_path, sizeof address.sun_path - 1);
    checked(::bind(control_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), "bind");
    checked(::listen(control_.get(), 1), "listen");
  }

  /// What a process says that is offered this; `control`: instead of the right one.
  std::string refusal_of(const FallbackProxy::Files& files, const userspace::Offer& offer, int control = -1) const {
    return refusal_of_answers(files, userspace::messages(offer, control < 0 ? control_.get() : control, "0"));
  }

  std::string refusal_of_answers(const FallbackProxy::Files& files,
                                 const std::vector<userspace::Message>& answers) const {
    Process next({CLUSTERIP_FALLBACK_PROXY, "--config", files.config(), "--take-over"});
    const Fd connection(checked(::accept4(control_.get(), nullptr, nullptr, SOCK_CLOEXEC), "accept"));
    for (const auto& message : answers) {
      // It may have ended before it has heard all.
      if (userspace::send_with_descriptors(connection.get(), message.line, message.descriptors) < 0) break;
    }
    const Finished ended = next.wait();
    EXPECT_EQ(ended.exit_code, failed);
    EXPECT_EQ(lines(ended.err), 1) << ended.err;
    return ended.err;
  }

  int control() const { return control_.get(); }

 private:
  Fd control_;
};

TEST_F(Upgrade, RefusesDescriptorsThatAreNotWhatTheirLineSays) {
  const NamedServer one("one");
  const auto files = std::make_shared<FallbackProxy::Files>();
  files->write(proxy_toml({{"web", vip, 80, {backend(one)}}}));
  const Predecessor old(*files);
  const auto name = [](const std::string& address, std::uint16_t port, config::Protocol protocol) {
    return userspace::SocketName{boost::asio::ip::make_address(address), port, protocol};
  };
  using enum config::Protocol;
  const TcpListener listener;
  const UdpSocket datagrams;
  const Fd client = dial("127.0.0.1", listener.port());
  const Fd file(checked(::open("/dev/null", O_RDONLY | O_CLOEXEC), "/dev/null"));
  const std::pair<userspace::SocketName, int> wrong[] = {
      {name("127.0.0.2", listener.port(), tcp), listener.get()},
      {name("127.0.0.1", 80, tcp), listener.get()},
      {name("127.0.0.1", listener.port(), udp), listener.get()},
      {name("127.0.0.1", datagrams.port(), tcp), datagrams.get()},
      {name("127.0.0.1", own_port(client), tcp), client.get()},
      {name("127.0.0.1", 80, tcp), file.get()},
  };
  for (const auto& each : wrong) {
    const std::string refusal = old.refusal_of(*files, {.sockets = {each}, .vips = {}});
    EXPECT_TRUE(contains(refusal, "has handed over what is not the socket of {\"vip\":\"127.0.0.")) << refusal;
  }
  const std::string refusal = old.refusal_of(*files, {.sockets = {}, .vips = {}}, listener.get());
  EXPECT_TRUE(contains(refusal, "has handed over what is not its control socket")) << refusal;
  for (const char* address : {"0.0.0.0", "::", "224.0.0.1", "255.255.255.255"}) {
    const std::string why = old.refusal_of(*files, {.sockets = {}, .vips = {boost::asio::ip::make_address(address)}});
    EXPECT_TRUE(contains(why, fmt::format("has handed over what is not a VIP: {}", address))) << why;
  }
}

TEST_F(Upgrade, RefusesAPredecessorOfAnotherVersion) {
  const NamedServer one("one");
  const auto files = std::make_shared<FallbackProxy::Files>();
  files->write(proxy_toml({{"web", vip, 80, {backend(one)}}}));
  const Predecessor old(*files);
  EXPECT_TRUE(contains(old.refusal_of_answers(*files, {{"{\"protocol\":2}\n", {}}}),
                       "speaks version 2 of the hand-over, this version speaks 1"));

  // A key that is not there, and values of another kind.
  const char* begin = "{\"protocol\":1,\"version\":\"0\",\"vips\":[]}\n";
  const std::vector<userspace::Message> strange[] = {
      {{"{}\n", {}}},
      {{"{\"protocol\":\"1\"}\n", {}}},
      {{"{\"protocol\":1}\n", {}}},
      {{"{\"protocol\":1,\"version\":1}\n", {}}},
      {{"{\"protocol\":1,\"version\":\"0\",\"vips\":1}\n", {}}},
      {{"{\"protocol\":1,\"version\":\"0\",\"vips\":[1]}\n", {}}},
      {{"{\"protocol\":1,\"version\":\"0\",\"vips\":[\"web\"]}\n", {}}},
      {{begin, {old.control()}}, {"{\"sockets\":{}}\n", {}}},
      {{begin, {old.control()}}, {"{\"sockets\":[1]}\n", {old.control()}}},
      {{begin, {old.control()}}, {"{\"sockets\":[{\"vip\":1}]}\n", {old.control()}}},
  };
  for (const auto& answers : strange) {
    const std::string refusal = old.refusal_of_answers(*files, answers);
    EXPECT_TRUE(contains(refusal, "has answered what this version does not understand: "))
        << answers.back().line << refusal;
  }
  EXPECT_EQ(ask(vip, 80), refused_with(ECONNREFUSED)) << "it must not have begun to serve";
}

}  // namespace
