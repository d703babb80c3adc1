// SPDX-License-Identifier: BSD-2-Clause
//
// The control socket of fallback_proxy: its status, and the process that takes over what another one serves.
#include <fmt/format.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <algorithm>
#include <boost/json.hpp>
#include <cerrno>
#include <filesystem>
#include <memory>
#include <optional>
#include <vector>

#include "fallback_proxy/control_client.h"
#include "fallback_proxy/hand_over.h"
#include "tests/support/fallback_proxy.h"
#include "tests/support/fixture.h"

namespace {

using namespace support;
using boost::json::object;
using userspace::ControlClient;

constexpr const char* vip = "127.0.1.1";
constexpr const char* other_vip = "127.0.1.2";

constexpr int fine = 0, failed = 1, usage = 2, configuration = 3;

ControlClient connect_to(const FallbackProxy::Files& files) {
  auto client = ControlClient::connect(files.control());
  if (!client) throw std::runtime_error(client.error().message);
  if (!*client) throw std::runtime_error("nobody listens at " + files.control());
  return std::move(**client);
}

object ask_for(const FallbackProxy::Files& files, const object& request) {
  const auto answer = connect_to(files).ask(request);
  if (!answer) throw std::runtime_error(answer.error().message);
  return *answer;
}

object status(const FallbackProxy::Files& files) { return ask_for(files, {{"request", "status"}}); }

std::uint64_t number(const object& of, std::string_view key) { return of.at(key).to_number<std::uint64_t>(); }

/// The program with these arguments, until it ends.
Finished fallback_proxy(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), CLUSTERIP_FALLBACK_PROXY);
  return run(arguments);
}

std::unique_ptr<FallbackProxy> successor_of(const FallbackProxy& proxy) {
  auto next =
      std::make_unique<FallbackProxy>(proxy.files(), std::function<void()>(), std::vector<std::string>{"--take-over"});
  next->wait_for_log("has handed over");
  return next;
}

std::ptrdiff_t lines(const std::string& text) { return std::ranges::count(text, '\n'); }

bool contains(const std::string& text, const std::string& piece) { return text.find(piece) != std::string::npos; }

/// A backend that takes connections and never says anything.
struct SilentServer {
  SilentServer() : socket(tcp_socket()) {
    sockaddr_in local = socket_address("127.0.0.1", 0);
    socklen_t length = sizeof local;
    checked(::bind(socket.get(), reinterpret_cast<const sockaddr*>(&local), length), "bind");
    checked(::listen(socket.get(), 1024), "listen");
    checked(::getsockname(socket.get(), reinterpret_cast<sockaddr*>(&local), &length), "getsockname");
    port = ntohs(local.sin_port);
  }
  support::Backend backend() const { return {"127.0.0.1", port}; }

  Fd socket;
  std::uint16_t port = 0;
};

Fd connected_to(const std::string& address, std::uint16_t port) {
  Fd client = tcp_socket();
  if (const int error = connect_errno(client.get(), address, port); error != 0)
    throw std::system_error(error, std::generic_category(), "connecting to " + address);
  return client;
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
userspace::Inheritance take_over(ControlClient& from) {
  auto inheritance = userspace::take_over(from);
  if (!inheritance) throw std::runtime_error(inheritance.error().message);
  return std::move(*inheritance);
}

class Upgrade : public Integration {};
class Control : public Integration {};

// --- taking over -----------------------------------------------------------------------------------------------------

TEST_F(Upgrade, FailsNoConnectionUnderLoad) {
  const NamedServer one("one");
  auto proxy = std::make_unique<FallbackProxy>(proxy_toml({{"web", vip, 80, {backend(one)}}}));
  Asker asker(vip, 80), another(vip, 80), third(vip, 80);
  constexpr int upgrades = 5;
  for (int i = 0; i < upgrades; ++i) {
    auto next = successor_of(*proxy);
    EXPECT_EQ(proxy->wait().exit_code, fine);
    proxy = std::move(next);
    asker.wait_for(300);
  }
  std::map<std::string, std::uint64_t> answers;
  for (Asker* each : {&asker, &another, &third})
    for (const auto& [answer, count] : each->stop()) answers[answer] += count;
  EXPECT_EQ(answers.size(), 1u) << testing::PrintToString(answers);
  EXPECT_GE(answers["one"], upgrades * 300u);
  EXPECT_EQ(proxy->terminate().exit_code, fine);
}

TEST_F(Upgrade, LongConnectionsGoOnUntilTheyEnd) {
  const NamedServer before("before", "127.0.0.1", NamedServer::Speaks::http), after("after");
  FallbackProxy old(proxy_toml({{"web", vip, 80, {backend(before)}}}));
  const Fd client = connected_to(vip, 80);
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
  const Finished ended = old.wait();
  EXPECT_EQ(ended.exit_code, fine);
  next->wait_for_log(fmt::format("pid {}, which this process has replaced, has ended", old.pid()));
  EXPECT_EQ(ask(vip, 80), answered_by("after"));
}

// The old process cannot accept what is queued (it has as many connections as it may have) when it closes its copy of
// the socket, and the new one, which is this test, has not accepted yet.
TEST_F(Upgrade, ResetsNothingThatIsQueued) {
  const SilentServer server;
  FallbackProxy old(proxy_toml({{"web", vip, 80, {server.backend()}}}), [] {
    const rlimit few{256, 256};
    checked(::setrlimit(RLIMIT_NOFILE, &few), "RLIMIT_NOFILE");
  });
  const std::uint64_t limit = number(status(*old.files()), "connection_limit");
  ASSERT_LT(limit, 128u);
  std::vector<Fd> served, queued;
  for (std::uint64_t i = 0; i < limit; ++i) served.push_back(connected_to(vip, 80));
  ASSERT_TRUE(eventually([&] { return number(status(*old.files()), "connections") == limit; }));
  for (int i = 0; i < 100; ++i) queued.push_back(connected_to(vip, 80));

  ControlClient client = connect_to(*old.files());
  const userspace::Inheritance inheritance = take_over(client);
  ASSERT_EQ(inheritance.sockets.size(), 1u);
  const int listener = inheritance.sockets.begin()->second.get();
  const auto replaced = userspace::say_ready(client);
  ASSERT_TRUE(replaced && *replaced);
  ASSERT_TRUE(eventually([&] { return !has_open(old, listener); }));

  for (const Fd& each : queued) {
    Fd accepted(checked(::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC), "accept"));
    ASSERT_EQ(::send(accepted.get(), "queued", 6, 0), 6);
    accepted.reset();
    (void)each;
  }
  for (const Fd& each : queued) EXPECT_EQ(read_answer(each.get()), answered_by("queued"));
  served.clear();
  EXPECT_EQ(old.wait().exit_code, fine);
  EXPECT_TRUE(std::filesystem::exists(old.files()->control())) << "the socket is the successor's";
}

TEST_F(Upgrade, VipsStayLocalForTheConnectionsOfTheOldOne) {
  const NamedServer before("before", "127.0.0.1", NamedServer::Speaks::http), after("after");
  const Userspace with_routes{.local_vips = true};
  FallbackProxy old(proxy_toml({{"web", "10.96.0.1", 80, {backend(before)}}}, with_routes));
  const Fd client = connected_to("10.96.0.1", 80);
  ASSERT_TRUE(eventually([&] { return before.accepted() == 1; }));

  old.files()->write(proxy_toml({{"other", "10.96.0.2", 80, {backend(after)}}}, with_routes));
  const auto next = successor_of(old);
  old.wait_for_log("replaced; 1 connections to drain");
  EXPECT_EQ(ask("10.96.0.2", 80), answered_by("after"));
  EXPECT_TRUE(eventually([] { return ask("10.96.0.1", 80) == refused_with(ECONNREFUSED); })) << "not served, but local";

  const std::string request = "GET / HTTP/1.0\r\n\r\n";
  ASSERT_EQ(::send(client.get(), request.data(), request.size(), 0), static_cast<ssize_t>(request.size()));
  EXPECT_TRUE(read_answer(client.get()).text.ends_with("before"));
  EXPECT_EQ(old.wait().exit_code, fine);
  EXPECT_TRUE(eventually([] { return ask("10.96.0.1", 80) == refused_with(ENETUNREACH); })) << "no VIP any more";
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
    EXPECT_EQ(take_over(client).vips, std::vector{boost::asio::ip::make_address("10.96.0.1")});
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
  std::vector<support::Service> services;
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
  for (const auto& service : status(*old.files()).at("services").as_array())
    ASSERT_EQ(service.at("reason").as_string(), "");
}

// --- failing to take over --------------------------------------------------------------------------------------------

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
    EXPECT_EQ(take_over(client).sockets.size(), 1u);
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
  EXPECT_EQ(take_over(client).sockets.size(), 1u);
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
    EXPECT_EQ(take_over(client).sockets.size(), 1u);
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

TEST_F(Upgrade, RefusesAPredecessorOfAnotherVersion) {
  const NamedServer one("one");
  const auto files = std::make_shared<FallbackProxy::Files>();
  files->write(proxy_toml({{"web", vip, 80, {backend(one)}}}));
  const Fd listener(checked(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), "socket"));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  files->control().copy(address.sun_path, sizeof address.sun_path - 1);
  checked(::bind(listener.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), "bind");
  checked(::listen(listener.get(), 1), "listen");

  Process next({CLUSTERIP_FALLBACK_PROXY, "--config", files->config(), "--take-over"});
  const Fd connection(checked(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC), "accept"));
  const std::string answer = "{\"protocol\":2}\n";
  checked(::send(connection.get(), answer.data(), answer.size(), MSG_NOSIGNAL), "send");
  const Finished ended = next.wait();
  EXPECT_EQ(ended.exit_code, failed);
  EXPECT_TRUE(contains(ended.err, "speaks version 2 of the hand-over, this version speaks 1")) << ended.err;
  EXPECT_EQ(ask(vip, 80), refused_with(ECONNREFUSED)) << "it must not have begun to serve";
}

// --- who serves already ----------------------------------------------------------------------------------------------

TEST_F(Control, SecondProcessIsRefusedInOneLine) {
  const NamedServer one("one");
  FallbackProxy proxy(proxy_toml({{"web", vip, 80, {backend(one)}}}));
  const Finished second = fallback_proxy({"--config", proxy.files()->config()});
  EXPECT_EQ(second.exit_code, failed);
  EXPECT_EQ(lines(second.err), 1) << second.err;
  EXPECT_TRUE(contains(second.err, fmt::format("pid {} serves already", proxy.pid()))) << second.err;
  EXPECT_TRUE(contains(second.err, "--take-over")) << second.err;
  EXPECT_EQ(ask(vip, 80), answered_by("one"));
}

TEST_F(Control, KilledProcessIsInNobodysWay) {
  const NamedServer one("one");
  FallbackProxy first(proxy_toml({{"web", vip, 80, {backend(one)}}}));
  first.kill();
  ASSERT_TRUE(std::filesystem::exists(first.files()->control()));
  FallbackProxy second(first.files());
  EXPECT_EQ(number(status(*first.files()), "pid"), static_cast<std::uint64_t>(second.pid()));
  second.kill();
  FallbackProxy third(first.files(), {}, {"--take-over"});
  EXPECT_EQ(number(status(*first.files()), "pid"), static_cast<std::uint64_t>(third.pid()));
  EXPECT_EQ(ask(vip, 80), answered_by("one"));
  EXPECT_EQ(third.terminate().exit_code, fine);
  EXPECT_FALSE(std::filesystem::exists(first.files()->control()));
}

TEST_F(Control, FileThatIsNoSocketStays) {
  const NamedServer one("one");
  const auto files = std::make_shared<FallbackProxy::Files>();
  files->write(proxy_toml({{"web", vip, 80, {backend(one)}}}));
  FallbackProxy proxy(files, {}, {"--control", files->config()});
  EXPECT_EQ(ask(vip, 80), answered_by("one"));
  const Finished ended = proxy.terminate();
  EXPECT_TRUE(contains(ended.err, "no status and no upgrade")) << ended.err;
  EXPECT_TRUE(std::filesystem::exists(files->config()));
}

TEST_F(Control, ProxyServesWithoutADirectoryForTheSocket) {
  const NamedServer one("one");
  const auto files = std::make_shared<FallbackProxy::Files>();
  files->write(proxy_toml({{"web", vip, 80, {backend(one)}}}));
  FallbackProxy proxy(files, {}, {"--control", files->control() + "/not/there"});
  EXPECT_EQ(ask(vip, 80), answered_by("one"));
  const Finished ended = proxy.terminate();
  EXPECT_EQ(ended.exit_code, fine);
  EXPECT_TRUE(contains(ended.err, "no status and no upgrade")) << ended.err;
}

TEST_F(Control, SocketIsForTheUserAlone) {
  const NamedServer one("one");
  const auto files = std::make_shared<FallbackProxy::Files>();
  files->write(proxy_toml({{"web", vip, 80, {backend(one)}}}));
  const std::string directory = files->control() + ".d";
  FallbackProxy proxy(files, [] { ::umask(0); }, {"--control", directory + "/control.sock"});
  struct stat made{};
  ASSERT_EQ(::stat((directory + "/control.sock").c_str(), &made), 0);
  EXPECT_EQ(made.st_mode, S_IFSOCK | 0600u);
  ASSERT_EQ(::stat(directory.c_str(), &made), 0);
  EXPECT_EQ(made.st_mode, S_IFDIR | 0755u);
}

// --- requests --------------------------------------------------------------------------------------------------------

TEST_F(Control, GarbageIsAnsweredWithAnError) {
  const NamedServer one("one");
  FallbackProxy proxy(proxy_toml({{"web", vip, 80, {backend(one)}}}));
  ControlClient client = connect_to(*proxy.files());
  for (const object& request :
       {object{}, object{{"request", "no such"}}, object{{"request", 7}}, object{{"request", "ready"}}}) {
    const auto answer = client.ask(request);
    ASSERT_FALSE(answer) << serialize(request);
    EXPECT_EQ(answer.error().code, -EREMOTEIO) << answer.error().message;
  }
  const auto answer = client.ask({{"request", std::string(5000, 'x')}});
  ASSERT_FALSE(answer);
  EXPECT_TRUE(contains(answer.error().message, "at most 4096 bytes")) << answer.error().message;
  const auto after = client.receive();
  ASSERT_FALSE(after);
  EXPECT_EQ(after.error().code, -EPIPE) << "the connection has ended";

  ControlClient raw = connect_to(*proxy.files());
  const Fd socket(raw.release().release());
  for (const char* text : {"[[[[\n", "{\"request\"\n", "\n", "\xff\xfe\n", "[1]\n"}) {
    ASSERT_GT(::send(socket.get(), text, std::strlen(text), MSG_NOSIGNAL), 0);
    char answered[256];
    ASSERT_GT(::recv(socket.get(), answered, sizeof answered, 0), 0) << text;
    EXPECT_TRUE(std::string_view(answered).starts_with("{\"error\":")) << text;
  }
  EXPECT_EQ(ask(vip, 80), answered_by("one"));
}

TEST_F(Control, SlowClientsHoldNobodyUp) {
  const NamedServer one("one");
  FallbackProxy proxy(proxy_toml({{"web", vip, 80, {backend(one)}}}));
  std::vector<Fd> slow;
  for (int i = 0; i < 10; ++i) {
    slow.emplace_back(connect_to(*proxy.files()).release().release());
    ASSERT_EQ(::send(slow.back().get(), "{\"requ", 6, 0), 6);
  }
  EXPECT_EQ(number(status(*proxy.files()), "pid"), static_cast<std::uint64_t>(proxy.pid()));
  // More than it serves at a time: those above it are turned away, and the others are still there afterwards.
  for (int i = 0; i < 40; ++i) slow.emplace_back(connect_to(*proxy.files()).release().release());
  EXPECT_EQ(ask(vip, 80), answered_by("one"));
  slow.clear();
  EXPECT_TRUE(eventually([&] {
    auto client = ControlClient::connect(proxy.files()->control());
    return client && *client && (*client)->ask({{"request", "status"}});
  }));
}

// --- status ----------------------------------------------------------------------------------------------------------

TEST_F(Control, StatusTellsWhatIsServedAndWhatIsNotAndWhy) {
  const NamedServer one("one"), drained("drained");
  FallbackProxy proxy(proxy_toml({{"web", vip, 80, {backend(one, 3), backend(drained, 1, "drain")}},
                                  {"empty", vip, 81, {backend(drained, 1, "drain")}},
                                  {"elsewhere", "192.0.2.1", 80, {backend(one)}},
                                  {"fast", vip, 82, {backend(one)}, "refuse", "engine = \"bpf\"\n"},
                                  {"dead", vip, 83, {{"127.0.0.1", 1}}}}));
  ASSERT_EQ(ask(vip, 80), answered_by("one"));
  ASSERT_EQ(ask(vip, 80), answered_by("one"));
  ASSERT_EQ(ask(vip, 83), refused_with(ECONNRESET));
  ASSERT_TRUE(eventually([&] { return number(status(*proxy.files()), "connections") == 0; }));

  const object seen = status(*proxy.files());
  EXPECT_EQ(number(seen, "pid"), static_cast<std::uint64_t>(proxy.pid()));
  EXPECT_EQ(number(seen, "threads"), 2u);
  EXPECT_GT(number(seen, "connection_limit"), 0u);
  EXPECT_FALSE(seen.at("version").as_string().empty());
  EXPECT_EQ(seen.at("since").as_string().size(), std::string("2026-01-01T00:00:00Z").size());

  const auto& services = seen.at("services").as_array();
  ASSERT_EQ(services.size(), 5u);
  const object& web = services[0].as_object();
  EXPECT_EQ(web.at("name"), "web");
  EXPECT_EQ(web.at("vip"), vip);
  EXPECT_EQ(number(web, "port"), 80u);
  EXPECT_EQ(web.at("protocol"), "tcp");
  EXPECT_EQ(web.at("policy"), "random");
  EXPECT_EQ(web.at("serving"), true);
  EXPECT_EQ(web.at("reason"), "");
  EXPECT_EQ(number(web, "refused"), 0u);
  EXPECT_EQ(number(web, "denied"), 0u);
  EXPECT_EQ(number(web, "received"), 0u);
  EXPECT_EQ(number(web, "sent"), 2 * std::string("one").size());
  const auto& backends = web.at("backends").as_array();
  ASSERT_EQ(backends.size(), 2u);
  EXPECT_EQ(backends[0], (object{{"address", "127.0.0.1"},
                                 {"port", one.port()},
                                 {"weight", 3},
                                 {"state", "active"},
                                 {"marked", false},
                                 {"live", 0},
                                 {"connects", 2},
                                 {"failures", 0}}));
  EXPECT_EQ(backends[1].at("state"), "drain");

  const auto expect_not_served = [&](std::size_t i, const std::string& why) {
    EXPECT_EQ(services[i].at("serving"), false);
    EXPECT_TRUE(contains(std::string(services[i].at("reason").as_string()), why)) << services[i].at("reason");
  };
  expect_not_served(1, "no active backend");
  expect_not_served(2, "binding 192.0.2.1:80: Cannot assign requested address");
  expect_not_served(3, "wants the engine bpf");
  const object& dead = services[4].at("backends").as_array()[0].as_object();
  EXPECT_EQ(number(services[4].as_object(), "refused"), 1u);
  EXPECT_EQ(number(dead, "failures"), 1u);
  EXPECT_EQ(dead.at("marked"), true);
}

TEST_F(Control, StatusIsShownAsATableOrAsJson) {
  const NamedServer one("one");
  FallbackProxy proxy(proxy_toml({{"web", vip, 80, {backend(one)}}, {"elsewhere", "192.0.2.1", 80, {backend(one)}}}));
  const std::string control = proxy.files()->control();
  const Finished table = fallback_proxy({"--status", "--control", control});
  EXPECT_EQ(table.exit_code, fine) << table.err;
  EXPECT_TRUE(contains(table.out, fmt::format("pid {},", proxy.pid()))) << table.out;
  EXPECT_TRUE(contains(table.out, "web        127.0.1.1:80/tcp  random  yes")) << table.out;
  EXPECT_TRUE(contains(table.out, "binding 192.0.2.1:80: Cannot assign requested address")) << table.out;
  EXPECT_TRUE(contains(table.out, fmt::format("127.0.0.1:{}", one.port()))) << table.out;

  const Finished json = fallback_proxy({"--status", "--config", proxy.files()->config(), "--json"});
  EXPECT_EQ(json.exit_code, fine) << json.err;
  EXPECT_EQ(boost::json::parse(json.out).at("services").as_array().size(), 2u);

  proxy.terminate();
  const Finished nobody = fallback_proxy({"--status", "--control", control});
  EXPECT_EQ(nobody.exit_code, failed);
  EXPECT_EQ(nobody.out, "");
  EXPECT_EQ(lines(nobody.err), 1) << nobody.err;
  EXPECT_EQ(fallback_proxy({"--status", "--control", "relative"}).exit_code, usage);
}

}  // namespace
