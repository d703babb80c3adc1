// SPDX-License-Identifier: BSD-2-Clause
//
// What a host's health checks say of backends: panic, and how long a state lasts.
#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "tests/support/fixture.h"

namespace {

using namespace support;

class HealthState : public Integration {
 protected:
  static std::map<std::string, int> ask_often(int times) {
    std::map<std::string, int> answers;
    for (int i = 0; i < times; ++i) {
      const Answer answer = ask("10.96.0.1", 80);
      ++answers[answer.error != 0 ? ::strerrorname_np(answer.error) : answer.text];
    }
    return answers;
  }

  static std::string web(const std::vector<Backend>& backends, const std::string& keys) {
    return toml({{"web", "10.96.0.1", 80, backends, "refuse", keys}});
  }

  static std::vector<std::uint32_t> states(Handle& handle) {
    std::vector<std::uint32_t> states;
    auto services = handle.visit();
    std::ranges::sort(services.at(0).backends, {}, &SeenBackend::address);
    for (const SeenBackend& backend : services.at(0).backends) states.push_back(backend.state);
    return states;
  }
};

constexpr std::uint32_t active = CLUSTERIP_ACTIVE;
constexpr std::uint32_t drain = CLUSTERIP_DRAIN;
constexpr std::uint32_t down = CLUSTERIP_DOWN;
using States = std::vector<std::uint32_t>;

TEST_F(HealthState, PanicTriesBackendsThatAreDownWhenNobodyIsActive) {
  for (const char* policy : {"random", "round_robin", "least_conn", "maglev"}) {
    SCOPED_TRACE(policy);
    const NamedServer one("one"), two("two", "127.0.0.2"), three("three", "127.0.0.3");
    const std::string keys = std::string("client = \"socket\"\npanic = true\npolicy = \"") + policy + "\"";
    const std::string text = web({backend(one), backend(two), backend(three, 1, "drain")}, keys);
    {
      Handle handle = serve(text, pinned());
      ASSERT_TRUE(ok(handle.set_backend_state("web", one.address(), one.port(), CLUSTERIP_DOWN)));
      EXPECT_EQ(ask_often(30)["two"], 30) << "one is active: no panic";
      ASSERT_TRUE(ok(handle.set_backend_state("web", two.address(), two.port(), CLUSTERIP_DOWN)));
      const auto answers = ask_often(100);
      EXPECT_EQ(answers.size(), 2u);
      EXPECT_TRUE(answers.contains("one") && answers.contains("two")) << "not the one that drains";
      EXPECT_EQ(states(handle), (States{down, down, drain})) << "they are what they are";
      clusterip_resolution seen;
      ASSERT_TRUE(ok(handle.resolve("10.96.0.1", 80, seen)));
      EXPECT_EQ(seen.verdict, CLUSTERIP_VERDICT_REWRITTEN);
      EXPECT_EQ(seen.backends, 2u);
    }
    Handle adopter(plugin(), pinned());
    EXPECT_EQ(states(adopter), (States{down, down, drain}));
    ASSERT_TRUE(ok(adopter.set_backend_state("web", three.address(), three.port(), CLUSTERIP_DOWN)));
    EXPECT_EQ(ask_often(200).size(), 3u) << "an adopted service has panic, too";
    ASSERT_TRUE(ok(adopter.set_backend_state("web", one.address(), one.port(), CLUSTERIP_ACTIVE)));
    EXPECT_EQ(ask_often(30)["one"], 30) << "the panic is over";
    EXPECT_EQ(states(adopter), (States{active, down, down}));
    EXPECT_TRUE(ok(adopter.detach()));
  }
}

TEST_F(HealthState, WithoutPanicNoBackendApplies) {
  const NamedServer one("one");
  Handle handle = serve(web({backend(one)}, ""));
  ASSERT_TRUE(ok(handle.set_backend_state("web", one.address(), one.port(), CLUSTERIP_DOWN)));
  EXPECT_EQ(ask("10.96.0.1", 80), refused_by_program(ECONNREFUSED));
}

TEST_F(HealthState, PanicKeepsAffinityAndFlows) {
  const NamedServer one("one"), two("two", "127.0.0.2");
  const NamedUdpServer udp_one("udp one"), udp_two("udp two", "127.0.0.2");
  Handle handle = serve(toml(
      {{"dns", "10.96.0.2", 53, {backend(udp_one), backend(udp_two)}, "refuse", "protocol = \"udp\"\npanic = true"},
       {"web", "10.96.0.1", 80, {backend(one), backend(two)}, "refuse", "affinity = \"1h\"\npanic = true"}}));
  const std::string had = ask("10.96.0.1", 80).text;
  const Fd fd = udp_socket();
  const std::string answer = exchange(fd.get(), "10.96.0.2", 53);
  for (const NamedServer* server : {&one, &two})
    ASSERT_TRUE(ok(handle.set_backend_state("web", server->address(), server->port(), CLUSTERIP_DOWN)));
  for (const NamedUdpServer* server : {&udp_one, &udp_two})
    ASSERT_TRUE(ok(handle.set_backend_state("dns", server->address(), server->port(), CLUSTERIP_DOWN)));
  EXPECT_EQ(ask_often(50).size(), 1u) << "an affinity to a backend that is tried holds";
  const std::string after = exchange(fd.get(), "10.96.0.2", 53);
  const std::uint64_t chosen = handle.visit().at(0).connects;
  for (int i = 0; i < 20; ++i) ASSERT_EQ(exchange(fd.get(), "10.96.0.2", 53), after);
  EXPECT_EQ(handle.visit().at(0).connects, chosen) << "the flow is kept";
}

TEST_F(HealthState, DownOutlastsALoadOfAServiceWithHealth) {
  const NamedServer one("one"), two("two", "127.0.0.2"), three("three", "127.0.0.3");
  const std::string health = "health = { interval = \"1h\" }";
  Handle handle = serve(web({backend(one), backend(two)}, health));
  ASSERT_TRUE(ok(handle.set_backend_state("web", one.address(), one.port(), CLUSTERIP_DOWN)));
  ASSERT_TRUE(ok(handle.load(web({backend(three), backend(one, 9), backend(two)}, health))));
  EXPECT_EQ(states(handle), (States{down, active, active}));
  EXPECT_FALSE(ask_often(100).contains("one"));

  std::vector<Service> more = more_services(200, backend(two));
  more.push_back({"a-web", "10.96.0.1", 80, {backend(one), backend(two)}, "refuse", health});
  ASSERT_TRUE(ok(handle.load(toml(more))));
  EXPECT_EQ(states(handle), (States{down, active})) << "also in new maps, and under another name";

  ASSERT_TRUE(ok(handle.load(web({backend(two)}, health))));
  ASSERT_TRUE(ok(handle.load(web({backend(one), backend(two)}, health))));
  EXPECT_EQ(states(handle), (States{active, active})) << "one that left and came back is a new one";

  ASSERT_TRUE(ok(handle.set_backend_state("web", one.address(), one.port(), CLUSTERIP_DOWN)));
  ASSERT_TRUE(ok(handle.set_backends("web", {backend(one, 1, "down"), backend(two, 1, "down")})));
  EXPECT_EQ(ask("10.96.0.1", 80), refused_by_program(ECONNREFUSED));
  ASSERT_TRUE(ok(handle.set_backends("web", {backend(one), backend(two)})));
  EXPECT_EQ(states(handle), (States{active, active})) << "said otherwise";
}

TEST_F(HealthState, DownEndsWithALoadOfAServiceWithoutHealth) {
  const NamedServer one("one"), two("two", "127.0.0.2");
  Handle handle = serve(web({backend(one), backend(two)}, "health = {}"));
  ASSERT_TRUE(ok(handle.set_backend_state("web", one.address(), one.port(), CLUSTERIP_DOWN)));
  ASSERT_TRUE(ok(handle.load(web({backend(one), backend(two)}, ""))));
  EXPECT_EQ(states(handle), (States{active, active}));
}

TEST_F(HealthState, DrainOfTheFileWinsOverDown) {
  const NamedServer one("one"), two("two", "127.0.0.2");
  Handle handle = serve(web({backend(one), backend(two)}, "health = {}"));
  ASSERT_TRUE(ok(handle.set_backend_state("web", one.address(), one.port(), CLUSTERIP_DOWN)));
  ASSERT_TRUE(ok(handle.load(web({backend(one, 1, "drain"), backend(two)}, "health = {}"))));
  EXPECT_EQ(states(handle), (States{drain, active}));
}

TEST_F(HealthState, DownOutlastsTheProcess) {
  const NamedServer one("one"), two("two", "127.0.0.2");
  const std::string text = web({backend(one), backend(two)}, "health = {}");
  {
    Handle handle = serve(text, pinned());
    ASSERT_TRUE(ok(handle.set_backend_state("web", one.address(), one.port(), CLUSTERIP_DOWN)));
  }
  Handle adopter(plugin(), pinned());
  ASSERT_TRUE(ok(adopter.load(text)));
  ASSERT_TRUE(ok(adopter.attach()));
  EXPECT_EQ(states(adopter), (States{down, active}));
  EXPECT_EQ(ask_often(50)["two"], 50);
  EXPECT_TRUE(ok(adopter.detach()));
}

TEST_F(HealthState, EngineModeUserspaceIsNotForThePlugin) {
  const NamedServer one("one");
  const std::string text = "[engine]\nmode = \"userspace\"\n" + web({backend(one)}, "");
  Handle handle(plugin(), unpinned());
  const Outcome outcome = handle.load(text);
  EXPECT_TRUE(fails_with(-EOPNOTSUPP, outcome));
  EXPECT_NE(outcome.message.find("engine.mode is \"userspace\""), std::string::npos) << outcome;

  Paths partial = unpinned();
  partial.flags = CLUSTERIP_ALLOW_PARTIAL;
  Handle some(plugin(), partial);
  ASSERT_TRUE(ok(some.load(text)));
  const auto seen = some.visit();
  ASSERT_EQ(seen.size(), 1u);
  EXPECT_EQ(seen[0].engine, CLUSTERIP_ENGINE_USERSPACE);
  EXPECT_EQ(seen[0].reason, "engine.mode is \"userspace\"");
  ASSERT_TRUE(ok(some.load(web({backend(one)}, ""))));
  EXPECT_EQ(some.visit().at(0).engine, CLUSTERIP_ENGINE_BPF);
}

}  // namespace
