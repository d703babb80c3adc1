// SPDX-License-Identifier: BSD-2-Clause
//
// Which backend a client gets: policies, affinity, marks, and what a host's health checks say.
#include <sys/socket.h>

#include <map>
#include <string>
#include <vector>

#include "tests/support/fixture.h"
#include "tests/support/tcp.h"

namespace {

using namespace support;

class PolicyTest : public Integration {
 protected:
  /// Who answered so many connects, how often.
  static std::map<std::string, int> ask_often(const char* vip, int times) {
    std::map<std::string, int> answers;
    for (int i = 0; i < times; ++i) ++answers[ask(vip, 80).text];
    return answers;
  }
};

TEST_F(PolicyTest, RoundRobinTakesTurnsByWeight) {
  const NamedServer one("one"), two("two", "127.0.0.2");
  Handle handle =
      serve(toml({{"web", "10.96.0.1", 80, {backend(one, 1), backend(two, 3)}, "refuse", "policy = \"round_robin\""}}));
  for (int i = 0; i < 5; ++i) {
    const auto answers = ask_often("10.96.0.1", 4);
    EXPECT_EQ(answers.at("one"), 1);
    EXPECT_EQ(answers.at("two"), 3);
  }
  EXPECT_EQ(handle.visit().at(0).policy, "round_robin");
}

TEST_F(PolicyTest, LeastConnGivesTheIdleBackendWhatIsNext) {
  const NamedServer one("one"), two("two", "127.0.0.2");
  const auto service = [&](std::vector<Backend> backends) {
    return toml({{"web", "10.96.0.1", 80, std::move(backends), "refuse", "policy = \"least_conn\""}});
  };
  Handle handle = serve(service({backend(one)}));
  std::vector<Fd> idle;
  for (int i = 0; i < 100; ++i) {
    idle.push_back(tcp_socket());
    ASSERT_EQ(connect_errno(idle.back().get(), "10.96.0.1", 80), 0);
  }
  ASSERT_TRUE(ok(handle.load(service({backend(one), backend(two)}))));
  std::vector<Fd> next;
  for (int i = 0; i < 100; ++i) {
    next.push_back(tcp_socket());
    ASSERT_EQ(connect_errno(next.back().get(), "10.96.0.1", 80), 0);
    ASSERT_EQ(read_answer(next.back().get()), answered_by("two")) << i;
  }
  EXPECT_EQ(handle.visit().at(0).live, 200u);
  idle.clear();
  next.clear();
  EXPECT_EQ(handle.visit().at(0).live, 0u);
}

TEST_F(PolicyTest, LeastConnCountsClientsUntilTheyAreKilled) {
  constexpr int connections = 100;
  const TcpListener one("127.0.0.1"), two("127.0.0.2");  // hold what comes
  const auto service = [&](std::vector<Backend> backends) {
    return toml({{"web", "10.96.0.1", 80, std::move(backends), "refuse", "policy = \"least_conn\""}});
  };
  const auto connect_many = [](const Channel& channel) {
    std::vector<Fd> open;
    for (int i = 0; i < connections; ++i) {
      open.push_back(tcp_socket());
      require(connect_errno(open.back().get(), "10.96.0.1", 80) == 0, "not connected");
    }
    channel.tell('c');
    channel.hear();
  };
  Handle handle = serve(service({one.backend()}));
  using Live = std::map<std::string, std::uint64_t>;
  const auto live = [&] {
    Live counts;
    const auto services = handle.visit();
    for (const SeenBackend& backend : services.at(0).backends) counts[backend.address] = backend.live;
    return counts;
  };
  Child first(connect_many);
  first.channel().hear();
  ASSERT_TRUE(ok(handle.load(service({one.backend(), two.backend()}))));
  EXPECT_EQ(live(), (Live{{"127.0.0.1", 100}, {"127.0.0.2", 0}}));
  Child second(connect_many);
  second.channel().hear();
  EXPECT_EQ(live(), (Live{{"127.0.0.1", 100}, {"127.0.0.2", 100}}));
  first.kill();
  EXPECT_EQ(first.wait(), "ended by Killed");
  EXPECT_EQ(live(), (Live{{"127.0.0.1", 0}, {"127.0.0.2", 100}}));
  Child third(connect_many);
  third.channel().hear();
  EXPECT_EQ(live(), (Live{{"127.0.0.1", 100}, {"127.0.0.2", 100}})) << "what was given back is the next to be chosen";
  second.kill();
  third.kill();
  EXPECT_EQ(second.wait() + third.wait(), "ended by Killedended by Killed");
  EXPECT_EQ(live(), (Live{{"127.0.0.1", 0}, {"127.0.0.2", 0}}));
}

TEST_F(PolicyTest, LeastConnFollowsWeightsWhenAllAreIdle) {
  const NamedServer one("one"), two("two", "127.0.0.2");
  const Handle handle =
      serve(toml({{"web", "10.96.0.1", 80, {backend(one, 1), backend(two, 3)}, "refuse", "policy = \"least_conn\""}}));
  EXPECT_NEAR(ask_often("10.96.0.1", 2000)["one"], 500, 100) << "five standard deviations";
}

TEST_F(PolicyTest, MaglevGivesOneClientOneBackend) {
  const NamedServer one("one"), two("two", "127.0.0.2"), three("three", "127.0.0.3");
  const std::vector<Backend> backends = {backend(one), backend(two), backend(three)};
  const Handle handle =
      serve(toml({{"cgroup", "10.96.0.1", 80, backends, "refuse", "policy = \"maglev\""},
                  {"netns", "10.96.0.2", 80, backends, "refuse", "policy = \"maglev\"\nclient = \"netns\""},
                  {"socket", "10.96.0.3", 80, backends, "refuse", "policy = \"maglev\"\nclient = \"socket\""}}));
  EXPECT_EQ(ask_often("10.96.0.1", 50).size(), 1u);
  EXPECT_EQ(ask_often("10.96.0.2", 50).size(), 1u);
  EXPECT_EQ(ask_often("10.96.0.3", 200).size(), 3u) << "each socket is a client";
}

TEST_F(PolicyTest, AffinityHoldsUntilTheBackendDrainsOrLeaves) {
  const NamedServer one("one"), two("two", "127.0.0.2");
  const auto service = [](std::vector<Backend> backends) {
    return toml({{"web", "10.96.0.1", 80, std::move(backends), "refuse", "affinity = \"1h\""}});
  };
  Handle handle = serve(service({backend(one), backend(two)}));
  const std::string first = ask("10.96.0.1", 80).text;
  EXPECT_EQ(ask_often("10.96.0.1", 50)[first], 50);

  const bool was_one = first == "one";
  const NamedServer& kept = was_one ? two : one;
  const NamedServer& left = was_one ? one : two;
  ASSERT_TRUE(ok(handle.load(service({backend(left, 1, "drain"), backend(kept)}))));
  EXPECT_EQ(ask_often("10.96.0.1", 20)[kept.name()], 20);
  ASSERT_TRUE(ok(handle.load(service({backend(left), backend(kept)}))));
  EXPECT_EQ(ask_often("10.96.0.1", 50)[kept.name()], 50) << "it has a new one";
  ASSERT_TRUE(ok(handle.load(service({backend(left)}))));
  EXPECT_EQ(ask_often("10.96.0.1", 20)[left.name()], 20);
}

TEST_F(PolicyTest, AffinityExpires) {
  const NamedServer one("one"), two("two", "127.0.0.2");
  const Handle handle =
      serve(toml({{"web", "10.96.0.1", 80, {backend(one), backend(two)}, "refuse", "affinity = \"1ms\""}}));
  const std::string first = ask("10.96.0.1", 80).text;
  EXPECT_TRUE(eventually([&] {
    const timespec pause{0, 11'000'000};  // it is rounded up to 10 ms
    ::nanosleep(&pause, nullptr);
    return ask("10.96.0.1", 80).text != first;
  }));
}

TEST_F(PolicyTest, MarkIsSetAndTakenBack) {
  const NamedServer server("server");
  const NamedUdpServer udp("udp");
  const Handle handle =
      serve(toml({{"marked", "10.96.0.1", 53, {backend(udp)}, "refuse", "protocol = \"udp\"\nmark = 193"}}));
  const auto mark_of = [](const Fd& fd) {
    std::uint32_t mark = 0;
    socklen_t length = sizeof mark;
    checked(::getsockopt(fd.get(), SOL_SOCKET, SO_MARK, &mark, &length), "SO_MARK");
    return mark;
  };
  const Fd fd = udp_socket();
  const std::uint32_t own = 7;
  ASSERT_EQ(::setsockopt(fd.get(), SOL_SOCKET, SO_MARK, &own, sizeof own), 0);
  ASSERT_EQ(connect_errno(fd.get(), "10.96.0.1", 53), 0);
  EXPECT_EQ(mark_of(fd), 193u);
  ASSERT_EQ(connect_errno(fd.get(), udp.address(), udp.port()), 0);
  EXPECT_EQ(mark_of(fd), own) << "not for what it connects to next";
}

TEST_F(PolicyTest, HostSaysWhichBackendsAreUp) {
  const NamedServer one("one"), two("two", "127.0.0.2");
  Handle handle = serve(toml({{"web", "10.96.0.1", 80, {backend(one), backend(two)}}}));
  ASSERT_TRUE(ok(handle.set_backend_state("web", one.address(), one.port(), CLUSTERIP_DOWN)));
  EXPECT_EQ(ask_often("10.96.0.1", 50)["two"], 50);
  EXPECT_EQ(handle.visit().at(0).backends.size(), 2u);
  ASSERT_TRUE(ok(handle.set_backend_state("web", two.address(), two.port(), CLUSTERIP_DRAIN)));
  EXPECT_EQ(ask("10.96.0.1", 80), refused_by_program(ECONNREFUSED));
  ASSERT_TRUE(ok(handle.set_backend_state("web", one.address(), one.port(), CLUSTERIP_ACTIVE)));
  EXPECT_EQ(ask_often("10.96.0.1", 20)["one"], 20);
  EXPECT_TRUE(fails_with(-ENOENT, handle.set_backend_state("web", "127.0.0.9", 1, CLUSTERIP_DOWN)));
  EXPECT_TRUE(fails_with(-ENOENT, handle.set_backend_state("none", one.address(), one.port(), CLUSTERIP_DOWN)));
  EXPECT_TRUE(fails_with(-EINVAL, handle.set_backend_state("web", one.address(), one.port(), 9)));
}

TEST_F(PolicyTest, PoliciesAreAdoptedFromPins) {
  const NamedServer one("one"), two("two", "127.0.0.2");
  const std::string text =
      toml({{"a", "10.96.0.1", 80, {backend(one, 3), backend(two, 5)}, "refuse", "policy = \"round_robin\""},
            {"b", "10.96.0.2", 80, {backend(one), backend(two)}, "refuse", "policy = \"maglev\"\naffinity = \"1h\""},
            {"c", "10.96.0.3", 80, {backend(one), backend(two)}, "refuse", "policy = \"least_conn\"\nmark = 5"}});
  {
    const Handle handle = serve(text, pinned());
  }
  Handle adopter(plugin(), pinned());
  EXPECT_EQ(adopter.visit().size(), 3u);
  ASSERT_TRUE(ok(adopter.load(text)));
  EXPECT_EQ(ask_often("10.96.0.1", 8).at("one"), 3);
  ASSERT_TRUE(ok(adopter.detach()));
}

struct SeenEvent {
  std::uint32_t verdict;
  std::string service;
  std::string vip;
  std::string backend;
  int error;
};

TEST_F(PolicyTest, EventsTellEachDecisionWhileSomebodyListens) {
  const NamedServer server("server");
  Handle handle = serve(toml({{"web", "10.96.0.1", 80, {backend(server)}}, {"empty", "10.96.0.2", 80, {}}}));
  std::vector<SeenEvent> events;
  const clusterip_event_visitor visit = [](const clusterip_event* event, void* user) {
    static_cast<std::vector<SeenEvent>*>(user)->push_back(
        {event->verdict, event->service, text_of(event->vip), text_of(event->backend), event->error});
    return 0;
  };
  EXPECT_EQ(plugin().read_events(handle.get(), visit, &events, nullptr), -ENOENT) << "nobody listens";
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("server"));

  ASSERT_GE(plugin().event_fd(handle.get(), 60, nullptr), 0);
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("server"));
  EXPECT_EQ(ask("10.96.0.2", 80), refused_by_program(ECONNREFUSED));
  EXPECT_EQ(ask("10.96.0.1", 81), refused_by_program(ECONNREFUSED));
  EXPECT_EQ(ask(server.address(), server.port()), answered_by("server"));
  EXPECT_EQ(plugin().read_events(handle.get(), visit, &events, nullptr), 3) << "a bystander is no decision";
  ASSERT_EQ(events.size(), 3u);
  EXPECT_EQ(events[0].verdict, CLUSTERIP_VERDICT_REWRITTEN);
  EXPECT_EQ(events[0].service, "web");
  EXPECT_EQ(events[0].vip, "10.96.0.1:80");
  EXPECT_EQ(events[0].backend, server.address() + ":" + std::to_string(server.port()));
  EXPECT_EQ(events[1].verdict, CLUSTERIP_VERDICT_NO_BACKEND);
  EXPECT_EQ(events[1].error, ECONNREFUSED);
  EXPECT_EQ(events[2].verdict, CLUSTERIP_VERDICT_NO_SERVICE);

  ASSERT_GE(plugin().event_fd(handle.get(), 0, nullptr), 0);
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("server"));
  EXPECT_EQ(plugin().read_events(handle.get(), visit, &events, nullptr), 0) << "off again";
}

TEST_F(PolicyTest, HandlesOnNestedCgroupsServeSideBySide) {
  const NamedServer one("one"), two("two", "127.0.0.2");
  const Handle outer = serve(toml({{"web", "10.96.0.1", 80, {backend(one)}}}));
  const ForeignProgram foreign(cgroup(), 7771);
  const Cgroup separate;
  const Handle other = serve(toml({{"web", "10.96.0.1", 80, {backend(two)}}}), {separate.path(), {}, 0});
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("one"));
  EXPECT_EQ(ask("127.0.0.1", 7771), refused_with(EPERM)) << "the other program runs";
  EXPECT_EQ(in_child([&] {
              separate.enter();
              require(ask("10.96.0.1", 80) == answered_by("two"), "the other cgroup has its own configuration");
            }),
            "");
}

}  // namespace
