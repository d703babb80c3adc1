// SPDX-License-Identifier: BSD-2-Clause
//
// Changes of what serves: all of them, or none.
#include <fmt/format.h>
#include <linux/membarrier.h>
#include <sys/syscall.h>

#include <algorithm>
#include <iterator>
#include <set>

#include "tests/support/fixture.h"

namespace {

using namespace support;

using Answers = std::map<std::string, std::uint64_t>;

/// The VIP of "more-<i>".
std::string vip_of(int i) { return fmt::format("10.98.{}.{}", i / 250, i % 250 + 1); }

class Reload : public Integration {};

TEST_F(Reload, AddsChangesAndRemovesServices) {
  const NamedServer one("one"), two("two");
  Handle handle = serve(toml({{"kept", "10.96.0.1", 80, {backend(one)}},
                              {"changed", "10.96.0.2", 80, {backend(one)}},
                              {"removed", "10.96.0.3", 80, {backend(one)}}}));
  ASSERT_TRUE(ok(handle.load(toml({{"kept", "10.96.0.1", 80, {backend(one)}},
                                   {"changed", "10.96.0.2", 80, {backend(two)}},
                                   {"added", "10.96.0.4", 80, {backend(two)}}}))));
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("one"));
  EXPECT_EQ(ask("10.96.0.2", 80), answered_by("two"));
  EXPECT_EQ(ask("10.96.0.3", 80), refused_with(ENETUNREACH)) << "no VIP any more";
  EXPECT_EQ(ask("10.96.0.4", 80), answered_by("two"));
  const auto seen = handle.visit();
  ASSERT_EQ(seen.size(), 3u);
  EXPECT_EQ(seen[0].name, "added");
  EXPECT_EQ(seen[1].name, "changed");
  EXPECT_EQ(seen[2].name, "kept");
}

TEST_F(Reload, RefusesRemovedPortWhileTheVipHasAnother) {
  const NamedServer one("one");
  Handle handle = serve(toml({{"web", "10.96.0.1", 80, {backend(one)}}, {"tls", "10.96.0.1", 443, {backend(one)}}}));
  ASSERT_TRUE(ok(handle.load(toml({{"web", "10.96.0.1", 80, {backend(one)}}}))));
  EXPECT_EQ(ask("10.96.0.1", 443), refused_by_program(ECONNREFUSED));
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("one"));
}

TEST_F(Reload, ServiceThatComesBackServesAgain) {
  const NamedServer one("one"), two("two");
  const std::string with = toml({{"web", "10.96.0.1", 80, {backend(one)}}, {"other", "10.96.0.2", 80, {backend(two)}}});
  const std::string without = toml({{"other", "10.96.0.2", 80, {backend(two)}}});
  Handle handle = serve(with);
  for (int round = 0; round < 20; ++round) {
    ASSERT_TRUE(ok(handle.load(without)));
    ASSERT_EQ(ask("10.96.0.1", 80), refused_with(ENETUNREACH));
    ASSERT_TRUE(ok(handle.load(with)));
    ASSERT_EQ(ask("10.96.0.1", 80), answered_by("one"));
    ASSERT_EQ(ask("10.96.0.2", 80), answered_by("two"));
  }
}

TEST_F(Reload, RenamedServiceServesUnderItsNewName) {
  const NamedServer one("one");
  Handle handle = serve(toml({{"before", "10.96.0.1", 80, {backend(one)}}}));
  ASSERT_TRUE(ok(handle.load(toml({{"after", "10.96.0.1", 80, {backend(one)}}}))));
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("one"));
  ASSERT_EQ(handle.visit().size(), 1u);
  EXPECT_EQ(handle.visit()[0].name, "after");
}

TEST_F(Reload, ServicesThatExchangeTheirVipsServeUnderThem) {
  const NamedServer one("one"), two("two");
  Handle handle =
      serve(toml({{"first", "10.96.0.1", 80, {backend(one)}}, {"second", "10.96.0.2", 80, {backend(two)}}}));
  ASSERT_TRUE(
      ok(handle.load(toml({{"first", "10.96.0.2", 80, {backend(one)}}, {"second", "10.96.0.1", 80, {backend(two)}}}))));
  EXPECT_EQ(ask("10.96.0.2", 80), answered_by("one"));
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("two"));
}

TEST_F(Reload, ConfigurationWithoutServicesServesNothing) {
  const NamedServer one("one");
  Handle handle = serve(toml({{"web", "10.96.0.1", 80, {backend(one)}}}));
  ASSERT_TRUE(ok(handle.load(toml({}))));
  EXPECT_EQ(ask("10.96.0.1", 80), refused_with(ENETUNREACH));
  EXPECT_TRUE(handle.visit().empty());
}

TEST_F(Reload, CountersGoOnAcrossReload) {
  const NamedServer one("one"), two("two");
  Handle handle = serve(toml({{"web", "10.96.0.1", 80, {backend(one)}}}));
  for (int i = 0; i < 5; ++i) ASSERT_EQ(ask("10.96.0.1", 80), answered_by("one"));
  ASSERT_TRUE(
      ok(handle.load(toml({{"new", "10.96.0.2", 80, {backend(two)}}, {"web", "10.96.0.1", 80, {backend(one)}}}))));
  ASSERT_EQ(ask("10.96.0.1", 80), answered_by("one"));
  const auto seen = handle.visit();
  ASSERT_EQ(seen.size(), 2u);
  EXPECT_EQ(seen[0].connects, 0u);
  EXPECT_EQ(seen[1].connects, 6u);
  EXPECT_EQ(seen[1].backends.at(0).connects, 6u);
}

struct Bad {
  const char* name;
  std::string text;
  std::uint32_t line;  // of the mistake; 0: any
};

void PrintTo(const Bad& bad, std::ostream* out) { *out << bad.name; }

std::string garbage() {
  std::string text;
  std::uint32_t state = 42;
  for (int i = 0; i < 4096; ++i) text.push_back(static_cast<char>((state = state * 1664525 + 1013904223) >> 24));
  return text;
}

std::string repeated(const std::string& piece, int times) {
  std::string text;
  while (times-- > 0) text += piece;
  return text;
}

std::string service_text(const std::string& lines) { return "[[service]]\nname = \"bad\"\n" + lines; }

const std::string good_lines = "vip = \"10.96.0.9\"\nport = 80\nbackends = [ \"127.0.0.1:80\" ]\n";

const Bad bad_inputs[] = {
    {"Truncated", service_text("vip = \"10.96.0.9\"\nport = 80\nbackends = [ \"127.0.0"), 5},
    {"Empty", "", 1},
    {"BinaryGarbage", garbage(), 0},
    {"NulBytes", std::string(64, '\0'), 1},
    {"AbsurdNesting", "x = " + std::string(100'000, '[') + std::string(100'000, ']'), 1},
    {"AbsurdTables", "x = " + repeated("{a=", 50'000), 1},
    {"DuplicateVip", service_text(good_lines) + "[[service]]\nname = \"other\"\n" + good_lines, 0},
    {"DuplicateName", service_text(good_lines) + service_text("vip = \"10.96.0.8\"\nport = 80\nbackends = []\n"), 7},
    {"WrongFamily", service_text("vip = \"10.96.0.9\"\nport = 80\nbackends = [ \"[::1]:80\" ]\n"), 5},
    {"UnknownKey", service_text(good_lines + "colour = \"blue\"\n"), 6},
    {"UnknownTable", "[colours]\nblue = 1\n", 1},
    {"TooManyServices",
     "[limits]\nservices = 1\n" + service_text(good_lines) +
         "[[service]]\nname = \"other\"\nvip = \"10.96.0.8\"\nport = 80\nbackends = []\n",
     0},
    {"TooManyBackends",
     "[limits]\nbackends = 1\n" +
         service_text("vip = \"10.96.0.9\"\nport = 80\nbackends = [ \"127.0.0.1:80\", \"127.0.0.1:81\" ]\n"),
     0},
    {"ZeroWeight",
     service_text(
         "vip = \"10.96.0.9\"\nport = 80\nbackends = [ { address = \"127.0.0.1\", port = 80, weight = 0 } ]\n"),
     5},
    {"ZeroPort", service_text("vip = \"10.96.0.9\"\nport = 0\nbackends = []\n"), 4},
    {"MulticastVip", service_text("vip = \"224.0.0.1\"\nport = 80\nbackends = []\n"), 3},
    {"BackendIsAVip", service_text("vip = \"10.96.0.9\"\nport = 80\nbackends = [ \"10.96.0.9:80\" ]\n"), 5},
    {"OverlongName", "[[service]]\nname = \"" + std::string(160, 'n') + "\"\n" + good_lines, 2},
    {"WrongType", service_text("vip = \"10.96.0.9\"\nport = \"eighty\"\nbackends = []\n"), 4},
    {"OverlongLine", "x = \"" + std::string(1'000'000, 'y'), 1},
};

class BadInput : public Reload, public testing::WithParamInterface<Bad> {};

TEST_P(BadInput, IsRefusedWithItsPositionAndChangesNothing) {
  const NamedServer one("one");
  Handle handle = serve(toml({{"web", "10.96.0.1", 80, {backend(one)}}}));
  const Outcome outcome = handle.load(GetParam().text);
  EXPECT_TRUE(fails_with(-EBADMSG, outcome));
  EXPECT_GE(outcome.line, 1u) << outcome;
  EXPECT_GE(outcome.column, 1u) << outcome;
  if (GetParam().line != 0) {
    EXPECT_EQ(outcome.line, GetParam().line) << outcome;
  }
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("one"));
  EXPECT_EQ(ask("10.96.0.9", 80), refused_with(ENETUNREACH));
  EXPECT_EQ(ask("10.96.0.1", 81), refused_by_program(ECONNREFUSED));
  ASSERT_EQ(handle.visit().size(), 1u);
  EXPECT_TRUE(ok(handle.load(toml({{"web", "10.96.0.2", 80, {backend(one)}}})))) << "a good one is taken afterwards";
  EXPECT_EQ(ask("10.96.0.2", 80), answered_by("one"));
}

INSTANTIATE_TEST_SUITE_P(Each, BadInput, testing::ValuesIn(bad_inputs),
                         [](const auto& parameter) { return std::string(parameter.param.name); });

TEST_F(Reload, EveryTruncationOfAFileIsRefusedOrGood) {
  const NamedServer one("one");
  const std::string text = toml({{"web", "10.96.0.1", 80, {backend(one)}}});
  Handle handle = serve(text);
  for (std::size_t length = 0; length < text.size(); ++length) {
    int mistakes = 0;
    const int code = plugin().check_text(
        text.data(), length, "truncated", [](const clusterip_error*, void* user) { ++*static_cast<int*>(user); },
        &mistakes);
    ASSERT_EQ(code, mistakes == 0 ? 0 : -EBADMSG) << text.substr(0, length);
    if (code == 0) continue;
    ASSERT_EQ(handle.load(text.substr(0, length)).code, -EBADMSG) << text.substr(0, length);
  }
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("one"));
}

TEST_F(Reload, MissingFileChangesNothing) {
  const NamedServer one("one");
  Handle handle = serve(toml({{"web", "10.96.0.1", 80, {backend(one)}}}));
  const Outcome outcome = handle.load_file("/nonexistent/clusterip.toml");
  EXPECT_TRUE(fails_with(-ENOENT, outcome));
  EXPECT_NE(outcome.message.find("/nonexistent/clusterip.toml"), std::string::npos) << outcome;
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("one"));
}

TEST_F(Reload, FileServesAsItsText) {
  const NamedServer one("one");
  const TemporaryDirectory directory;
  Handle handle(plugin(), unpinned());
  ASSERT_TRUE(ok(handle.load_file(directory.write("good.toml", toml({{"web", "10.96.0.1", 80, {backend(one)}}})))));
  ASSERT_TRUE(ok(handle.attach()));
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("one"));
}

TEST_F(Reload, GrowsFrom2To5000ServicesWithoutAFailedConnect) {
  const NamedServer one("one"), two("two");
  Handle handle = serve(toml(more_services(2, backend(one)), {2, 2}));
  Asker asker(vip_of(0), 80);
  asker.wait_for(100);
  std::vector<Service> services = more_services(5'000, backend(two));
  services[0].backends = {backend(one)};
  ASSERT_TRUE(ok(handle.load(toml(services, {8'000, 8'000}))));
  asker.wait_for(100);
  ASSERT_TRUE(ok(handle.load(toml(services, {5'000, 5'000}))));
  asker.wait_for(100);
  for (int i = 1; i < 5'000; ++i) ASSERT_EQ(ask(vip_of(i), 80), answered_by("two")) << vip_of(i);
  ASSERT_TRUE(ok(handle.load(toml(more_services(2, backend(one)), {2, 2}))));
  asker.wait_for(100);
  const Answers answers = asker.stop();
  EXPECT_EQ(answers.size(), 1u) << testing::PrintToString(answers);
  EXPECT_TRUE(answers.contains("one"));
  EXPECT_EQ(ask(vip_of(1), 80), answered_by("one"));
  EXPECT_EQ(ask(vip_of(2), 80), refused_with(ENETUNREACH));
  EXPECT_EQ(handle.visit().size(), 2u);
}

TEST_F(Reload, FullTableIsReplacedByAnotherFullTable) {
  const NamedServer one("one"), two("two");
  std::vector<Service> services = more_services(128, backend(one));
  const std::string before = toml(services, {128, 128});
  for (Service& service : services) service = {service.name + "-too", service.vip, 443, {backend(two)}};
  const std::string after = toml(services, {128, 128});
  Handle handle = serve(before);
  for (int round = 0; round < 5; ++round) {
    ASSERT_TRUE(ok(handle.load(after)));
    for (int i = 0; i < 128; ++i) {
      ASSERT_EQ(ask(vip_of(i), 443), answered_by("two"));
      ASSERT_EQ(ask(vip_of(i), 80), refused_by_program(ECONNREFUSED));
    }
    ASSERT_TRUE(ok(handle.load(before)));
    for (int i = 0; i < 128; ++i) {
      ASSERT_EQ(ask(vip_of(i), 80), answered_by("one"));
      ASSERT_EQ(ask(vip_of(i), 443), refused_by_program(ECONNREFUSED));
    }
  }
}

TEST_F(Reload, CountersSurviveGrowth) {
  const NamedServer one("one");
  std::vector<Service> services = {{"web", "10.96.0.1", 80, {backend(one)}}};
  Handle handle = serve(toml(services));
  for (int i = 0; i < 3; ++i) ASSERT_EQ(ask("10.96.0.1", 80), answered_by("one"));
  std::ranges::copy(more_services(1'000, backend(one)), std::back_inserter(services));
  ASSERT_TRUE(ok(handle.load(toml(services, {2'000, 2'000}))));
  ASSERT_EQ(ask("10.96.0.1", 80), answered_by("one"));
  const SeenService web = handle.visit().back();
  EXPECT_EQ(web.name, "web");
  EXPECT_EQ(web.connects, 4u) << "counted since the fast path was first loaded";
  EXPECT_EQ(web.backends.at(0).connects, 4u) << "counted since the backend was added";
}

TEST_F(Reload, NewServiceCountsFromZero) {
  const NamedServer server("server");
  Handle handle = serve(toml({}, {8, 8}));
  for (int i = 1; i < 80; ++i) {  // records are used again after a while
    const std::string vip = "10.96.1." + std::to_string(i);
    ASSERT_TRUE(ok(handle.load(toml({{"web", vip, 80, {backend(server)}}}, {8, 8}))));
    ASSERT_EQ(handle.visit().at(0).connects, 0u) << i;
    ASSERT_EQ(ask(vip, 80), answered_by("server"));
  }
}

TEST_F(Reload, ChangesThatFailTakeNoRoom) {
  const NamedServer one("one"), two("two");
  EXPECT_EQ(in_child([&] {
              const Service web{"web", "10.96.0.1", 80, {backend(one)}};
              Handle handle = serve(toml({web}, {8, 64}));
              forbid({{SYS_bpf, BPF_MAP_UPDATE_BATCH, ENOMEM}, {SYS_bpf, BPF_MAP_UPDATE_ELEM, ENOMEM}});
              std::vector<Backend> many;
              for (int i = 1; i <= 20; ++i) many.push_back({"127.0.5." + std::to_string(i), two.port()});
              const std::string more = toml({web, {"new", "10.96.0.2", 80, many}}, {8, 64});
              for (int i = 0; i < 150; ++i) require(handle.load(more).code == -ENOMEM, "a key was inserted");
              require_ok(handle.set_backends("web", {backend(two)}));
              require(ask("10.96.0.1", 80) == answered_by("two"), "not served");
            }),
            "");
}

TEST_F(Reload, RoomIsUsedAgainOnlyAfterAGracePeriod) {
  const NamedServer one("one"), two("two");
  EXPECT_EQ(in_child([&] {
              Handle handle = serve(toml({{"web", "10.96.0.1", 80, {backend(one)}}}, {8, 8}));
              forbid({{SYS_membarrier, MEMBARRIER_CMD_GLOBAL, EPERM}});
              Outcome outcome;
              for (int i = 0; i < 20000 && outcome.code == 0; ++i)
                outcome = handle.set_backends("web", {backend(i % 2 == 0 ? two : one)});
              require(outcome.code == -EPERM, "what was replaced is used again, and nobody has waited");
              require(outcome.message.contains("membarrier"), outcome.message);
              require(ask("10.96.0.1", 80).error == 0, "not served");
            }),
            "");
}

TEST_F(Reload, BackendThatLeavesGetsNoNewConnectWhileItsOldOneLivesOn) {
  const NamedServer leaving("leaving", "127.0.0.1", NamedServer::Speaks::http), staying("staying");
  Handle handle = serve(toml({{"web", "10.96.0.1", 80, {backend(leaving)}}}));
  const Fd live = tcp_socket();
  ASSERT_EQ(connect_errno(live.get(), "10.96.0.1", 80), 0);
  ASSERT_TRUE(ok(handle.load(toml({{"web", "10.96.0.1", 80, {backend(staying)}}}))));
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("staying"));
  const std::string request = "GET / HTTP/1.0\r\n\r\n";
  ASSERT_EQ(::send(live.get(), request.data(), request.size(), MSG_NOSIGNAL), static_cast<ssize_t>(request.size()));
  const Answer answer = read_answer(live.get());
  EXPECT_TRUE(answer.text.ends_with("leaving")) << answer;
}

class SetBackends : public Integration {};

TEST_F(SetBackends, ReplacesTheBackendsOfOneService) {
  const NamedServer one("one"), two("two");
  Handle handle = serve(toml({{"web", "10.96.0.1", 80, {backend(one)}}, {"other", "10.96.0.2", 80, {backend(one)}}}));
  ASSERT_TRUE(ok(handle.set_backends("web", {backend(two)})));
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("two"));
  EXPECT_EQ(ask("10.96.0.2", 80), answered_by("one"));
}

TEST_F(SetBackends, IsReplacedByTheNextLoad) {
  const NamedServer one("one"), two("two");
  const std::string text = toml({{"web", "10.96.0.1", 80, {backend(one)}}});
  Handle handle = serve(text);
  ASSERT_TRUE(ok(handle.set_backends("web", {backend(two)})));
  ASSERT_TRUE(ok(handle.load(text)));
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("one"));
}

TEST_F(SetBackends, BeforeAttachPreparesWhatWillServe) {
  const NamedServer one("one"), two("two");
  Handle handle(plugin(), unpinned());
  ASSERT_TRUE(ok(handle.load(toml({{"web", "10.96.0.1", 80, {backend(one)}}}))));
  ASSERT_TRUE(ok(handle.set_backends("web", {backend(two)})));
  ASSERT_TRUE(ok(handle.attach()));
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("two"));
}

TEST_F(SetBackends, NoneMeansNoBackend) {
  const NamedServer one("one");
  Handle handle = serve(toml({{"web", "10.96.0.1", 80, {backend(one)}}}));
  ASSERT_TRUE(ok(handle.set_backends("web", {})));
  EXPECT_EQ(ask("10.96.0.1", 80), refused_by_program(ECONNREFUSED));
  ASSERT_TRUE(ok(handle.set_backends("web", {backend(one)})));
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("one"));
}

TEST_F(SetBackends, DrainedBackendGetsNothing) {
  const NamedServer one("one", "127.0.0.1"), two("two", "127.0.0.2");
  Handle handle = serve(toml({{"web", "10.96.0.1", 80, {backend(one), backend(two)}}}));
  ASSERT_TRUE(ok(handle.set_backends("web", {backend(one), backend(two, 1, "drain")})));
  for (int i = 0; i < 100; ++i) ASSERT_EQ(ask("10.96.0.1", 80), answered_by("one"));
  EXPECT_EQ(handle.visit().at(0).backends.size(), 2u);
}

TEST_F(SetBackends, WeightZeroCountsAsOne) {
  const NamedServer one("one");
  Handle handle = serve(toml({{"web", "10.96.0.1", 80, {}}}));
  ASSERT_TRUE(ok(handle.set_backends("web", {backend(one, 0)})));
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("one"));
  EXPECT_EQ(handle.visit().at(0).backends.at(0).weight, 1u);
}

TEST_F(SetBackends, UnknownServiceIsNotFound) {
  const NamedServer one("one");
  Handle handle = serve(toml({{"web", "10.96.0.1", 80, {backend(one)}}}));
  const Outcome outcome = handle.set_backends("wbe", {backend(one)});
  EXPECT_TRUE(fails_with(-ENOENT, outcome));
  EXPECT_NE(outcome.message.find("wbe"), std::string::npos) << outcome;
}

TEST_F(SetBackends, BadElementsChangeNothing) {
  const NamedServer one("one"), two("two");
  Handle handle = serve(toml({{"web", "10.96.0.1", 80, {backend(one)}}, {"other", "10.96.0.2", 80, {backend(two)}}}));
  const Backend bad[] = {{"", 80},         {"127.0.0", 80},           {"localhost", 80}, {"127.0.0.1:80", 80},
                         {"::1", 80},      {"224.0.0.1", 80},         {"0.0.0.0", 80},   {"255.255.255.255", 80},
                         {"127.0.0.1", 0}, {"127.0.0.1", 80, 65'536}, {"10.96.0.2", 80}};
  for (const Backend& element : bad) {
    EXPECT_TRUE(fails_with(-EBADMSG, handle.set_backends("web", {backend(two), element})))
        << element.address << ":" << element.port << " weight " << element.weight;
    EXPECT_EQ(ask("10.96.0.1", 80), answered_by("one"));
  }
  EXPECT_TRUE(fails_with(-EBADMSG, handle.set_backends("web", {backend(two), backend(two)}))) << "one backend twice";
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("one"));
}

TEST_F(SetBackends, Serves1000Backends) {
  const NamedServer server("any", "0.0.0.0", NamedServer::Speaks::local_address);
  Handle handle = serve(toml({{"web", "10.96.0.1", 80, {}}}, {4, 2'000}));
  std::vector<Backend> backends;
  std::set<std::string> addresses;
  for (int i = 0; i < 1'000; ++i) {
    backends.push_back({fmt::format("127.1.{}.{}", i / 250, i % 250 + 1), server.port()});
    addresses.insert(backends.back().address);
  }
  ASSERT_TRUE(ok(handle.set_backends("web", backends)));
  std::set<std::string> answered;
  for (int i = 0; i < 10'000; ++i) {
    const Answer answer = ask("10.96.0.1", 80);
    ASSERT_TRUE(addresses.contains(answer.text)) << answer;
    answered.insert(answer.text);
  }
  EXPECT_GT(answered.size(), 990u) << "a backend stays without a connect with a probability of 0.00005";
  EXPECT_EQ(handle.visit().at(0).backends.size(), 1'000u);
}

TEST_F(SetBackends, MoreThanTheLimitChangesNothing) {
  const NamedServer one("one");
  Handle handle = serve(toml({{"web", "10.96.0.1", 80, {backend(one)}}}, {4, 8}));
  std::vector<Backend> backends;
  for (int i = 0; i < 9; ++i) backends.push_back({fmt::format("127.1.0.{}", i + 1), 1});
  const Outcome outcome = handle.set_backends("web", backends);
  EXPECT_LT(outcome.code, 0);
  EXPECT_FALSE(outcome.message.empty());
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("one"));
}

TEST_F(SetBackends, BeforeAnyLoadIsNotFound) {
  Handle handle(plugin(), unpinned());
  EXPECT_TRUE(fails_with(-ENOENT, handle.set_backends("web", {})));
}

TEST_F(SetBackends, StormMeetsNoFailedConnect) {
  const NamedServer one("one", "127.0.0.1"), two("two", "127.0.0.2"), stranger("stranger", "127.0.0.3");
  Handle handle =
      serve(toml({{"web", "10.96.0.1", 80, {backend(one)}}, {"other", "10.96.0.2", 80, {backend(stranger)}}}, {8, 8}));
  Asker asker("10.96.0.1", 80);
  for (int i = 0; i < 5'000; ++i) {
    ASSERT_TRUE(ok(handle.set_backends(
        "web", i % 2 == 0 ? std::vector{backend(two)} : std::vector{backend(one), backend(two, 3)})));
    ASSERT_TRUE(ok(handle.set_backends("other", {backend(stranger)})));
  }
  asker.wait_for(100);
  const Answers answers = asker.stop();
  EXPECT_EQ(answers.size(), 2u) << testing::PrintToString(answers);
  EXPECT_TRUE(answers.contains("one") && answers.contains("two")) << testing::PrintToString(answers);
}

}  // namespace
