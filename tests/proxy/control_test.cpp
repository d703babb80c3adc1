// SPDX-License-Identifier: BSD-2-Clause
//
// The control socket: whose it is, what it answers, and the status.
#include "tests/proxy/control.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <memory>
#include <vector>

#include "fallback_proxy/control_socket.h"

namespace {

using namespace support;

class Control : public Proxied {};

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

TEST_F(Control, LockOfSomebodyElseIsNotWaitedFor) {
  const NamedServer one("one");
  const auto files = std::make_shared<FallbackProxy::Files>();
  files->write(proxy_toml({{"web", vip, 80, {backend(one)}}}));
  const std::string path = files->control() + ".lock";
  const Fd lock(checked(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600), "lock"));
  checked(::flock(lock.get(), LOCK_EX), "flock");
  FallbackProxy proxy(files);
  EXPECT_EQ(ask(vip, 80), answered_by("one"));
  EXPECT_TRUE(contains(proxy.terminate().err, "another process holds " + path));
}

TEST_F(Control, WhoComesWhenThereAreTooManyIsToldSo) {
  const NamedServer one("one");
  FallbackProxy proxy(proxy_toml({{"web", vip, 80, {backend(one)}}}));
  std::vector<ControlClient> clients;
  for (int i = 0; i < 16; ++i) {
    clients.push_back(connect_to(*proxy.files()));
    ASSERT_TRUE(clients.back().ask({{"request", "status"}})) << i;
  }
  const auto answer = connect_to(*proxy.files()).ask({{"request", "status"}});
  ASSERT_FALSE(answer);
  EXPECT_TRUE(contains(answer.error().message, "16 others ask it already")) << answer.error().message;
}

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
  EXPECT_EQ(number(web, "dropped"), 0u);
  EXPECT_EQ(number(web, "received"), 0u);
  EXPECT_EQ(number(web, "sent"), 2 * std::string("one").size());
  const auto& backends = web.at("backends").as_array();
  ASSERT_EQ(backends.size(), 2u);
  EXPECT_EQ(backends[0], (object{{"address", "127.0.0.1"},
                                 {"port", one.port()},
                                 {"weight", 3},
                                 {"state", "active"},
                                 {"reason", ""},
                                 {"marked", false},
                                 {"ejected_ms", 0},
                                 {"connects", 2},
                                 {"failures", 0},
                                 {"live", 0},
                                 {"reversed", nullptr}}));
  EXPECT_EQ(backends[1].at("state"), "drain");

  const auto expect_not_served = [&](std::size_t i, const std::string& why) {
    EXPECT_EQ(services[i].at("serving"), false);
    EXPECT_TRUE(contains(std::string(services[i].at("reason").as_string()), why)) << services[i].at("reason");
  };
  expect_not_served(1, "no active backend");
  expect_not_served(2, "binding 192.0.2.1:80: Cannot assign requested address");
  expect_not_served(3, "asks for the engine bpf");
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

  const Finished full =
      run({"sh", "-c", "exec \"$0\" --status --control \"$1\" > /dev/full", CLUSTERIP_FALLBACK_PROXY, control});
  EXPECT_EQ(full.exit_code, failed);
  EXPECT_EQ(full.err, "fallback_proxy: standard output: No space left on device\n");

  proxy.terminate();
  const Finished nobody = fallback_proxy({"--status", "--control", control});
  EXPECT_EQ(nobody.exit_code, failed);
  EXPECT_EQ(nobody.out, "");
  EXPECT_EQ(lines(nobody.err), 1) << nobody.err;
  EXPECT_EQ(fallback_proxy({"--status", "--control", "relative"}).exit_code, usage);
}

TEST_F(Control, WrongUsageIsToldInOneLine) {
  const std::vector<std::pair<std::vector<std::string>, const char*>> wrong = {
      {{}, "--config is missing"},
      {{"--config", "a", "surplus"}, "unexpected argument 'surplus'"},
      {{"--cleanup", "--status"}, "one of --cleanup, --status and --take-over at a time"},
      {{"--no-such-option"}, "--no-such-option"}};
  for (const auto& [words, why] : wrong) {
    const Finished finished = fallback_proxy(words);
    EXPECT_EQ(finished.exit_code, usage);
    EXPECT_TRUE(finished.out.empty() && finished.err.starts_with("fallback_proxy: ")) << finished.out << finished.err;
    EXPECT_TRUE(contains(finished.err, why) && finished.err.find('\n') == finished.err.size() - 1) << finished.err;
  }
  const Finished version = fallback_proxy({"--version"});
  EXPECT_EQ(version.exit_code, fine);
  EXPECT_TRUE(version.out.starts_with("fallback_proxy ")) << version.out;
}

TEST_F(Control, NamesAllThatTheProgramDoesAndAnEmptyPath) {
  const Finished help = fallback_proxy({"--help"});
  EXPECT_EQ(help.exit_code, fine);
  for (const char* form : {"fallback_proxy --config", "fallback_proxy --status", "fallback_proxy --cleanup"})
    EXPECT_TRUE(contains(help.out, form)) << help.out;
  const Finished empty = fallback_proxy({"--config", ""});
  EXPECT_EQ(empty.exit_code, usage);
  EXPECT_EQ(empty.err, "fallback_proxy: --config is empty: expected the path of a file\n");
}

/// A process of another version, in the test's own hands: what a command says that has been answered this.
Finished answered(const std::vector<std::string>& command, int listener, std::string_view answer) {
  Process asking(command);
  const Fd connection(checked(::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC), "accept4"));
  checked(static_cast<int>(::send(connection.get(), answer.data(), answer.size(), MSG_NOSIGNAL)), "send");
  return asking.wait();
}

TEST_F(Control, AnswersOfAnotherVersionAreNotUnderstood) {
  const FallbackProxy::Files files;
  const std::string control = files.control();
  const Fd listener(checked(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), "socket"));
  const auto address = userspace::control_address(control);
  checked(::bind(listener.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), "bind");
  checked(::listen(listener.get(), 16), "listen");

  const auto clusterip = [&](std::vector<std::string> words) {
    words.insert(words.begin(), CLUSTERIP_COMMAND);
    words.insert(words.end(), {"--control", control, "--plugin", CLUSTERIP_PLUGIN_PATH});
    return words;
  };
  const std::vector<std::string> proxy_status = {CLUSTERIP_FALLBACK_PROXY, "--status", "--control", control},
                                 daemon_status = clusterip({"status"}),
                                 resolve = clusterip({"resolve", "10.96.0.1:80"}),
                                 trace_service = clusterip({"trace", "--service", "web"}), trace = clusterip({"trace"});
  // Nothing, a list that is none, and services that are none.
  for (const char* answer : {"{}\n", "{\"services\":1}\n", "{\"services\":[1]}\n"}) {
    for (const auto& command : {proxy_status, daemon_status, resolve, trace_service}) {
      const Finished finished = answered(command, listener.get(), answer);
      EXPECT_EQ(finished.exit_code, failed) << fmt::format("{}", fmt::join(command, " "));
      EXPECT_EQ(finished.out, "");
      EXPECT_EQ(lines(finished.err), 1) << finished.err;
      EXPECT_TRUE(contains(finished.err,
                           fmt::format("pid {} has answered what this version does not understand: ", ::getpid())))
          << fmt::format("{}: ", fmt::join(command, " ")) << finished.err;
    }
  }
  // After the line that says that the service traces.
  for (const char* decision : {"{}\n{}\n", "{}\n{\"time\":\"now\"}\n", "{}\n{\"time\":0,\"service\":[]}\n"}) {
    const Finished finished = answered(trace, listener.get(), decision);
    EXPECT_EQ(finished.exit_code, failed);
    EXPECT_TRUE(contains(finished.err, "has answered what this version does not understand: ")) << finished.err;
  }
}

TEST_F(Control, SocketThatSomebodyElseHasPlantedIsNotBelieved) {
  constexpr uid_t nobody = 65534;
  const NamedServer one("one");
  const auto files = std::make_shared<FallbackProxy::Files>();
  files->write(proxy_toml({{"web", vip, 80, {backend(one)}}}));
  const std::string control = files->control();
  checked(::chown(std::filesystem::path(control).parent_path().c_str(), nobody, nobody), "chown");
  const Child planted([&control](const Channel& test) {
    checked(::setgid(nobody), "setgid");
    checked(::setuid(nobody), "setuid");
    const Fd socket(checked(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), "socket"));
    const auto address = userspace::control_address(control);
    checked(::bind(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), "bind");
    checked(::listen(socket.get(), 16), "listen");
    test.tell('l');
    for (;;) {
      const Fd client(checked(::accept4(socket.get(), nullptr, nullptr, SOCK_CLOEXEC), "accept4"));
      char asked = 0;
      if (::recv(client.get(), &asked, 1, 0) == 0) continue;
      checked(static_cast<int>(::send(client.get(), "{}\n", 3, MSG_NOSIGNAL)), "send");
      test.tell('a');
    }
  });
  ASSERT_EQ(planted.channel().hear(), 'l');

  const std::string why = fmt::format("{} is user {}'s, who is neither root nor this one", control, nobody);
  for (const std::vector<std::string>& command : std::vector<std::vector<std::string>>{
           {CLUSTERIP_FALLBACK_PROXY, "--status", "--control", control},
           {CLUSTERIP_FALLBACK_PROXY, "--config", files->config(), "--take-over"},
           {CLUSTERIP_COMMAND, "status", "--control", control, "--plugin", CLUSTERIP_PLUGIN_PATH}}) {
    const Finished finished = run(command);
    EXPECT_NE(finished.exit_code, fine) << fmt::format("{}", fmt::join(command, " "));
    EXPECT_EQ(finished.out, "");
    EXPECT_EQ(lines(finished.err), 1) << finished.err;
    EXPECT_TRUE(contains(finished.err, why)) << finished.err;
  }
  FallbackProxy proxy(files);
  EXPECT_EQ(ask(vip, 80), answered_by("one"));
  const Finished ended = proxy.terminate();
  EXPECT_TRUE(contains(ended.err, "no status and no upgrade: " + why)) << ended.err;
  EXPECT_TRUE(std::filesystem::exists(control)) << "it is not ours to remove";
  pollfd heard{.fd = planted.channel().get(), .events = POLLIN, .revents = 0};
  EXPECT_EQ(::poll(&heard, 1, 0), 0) << "somebody has asked it something";
}

}  // namespace
