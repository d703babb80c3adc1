// SPDX-License-Identifier: BSD-2-Clause
//
// Passive ejection: the kernel skips a backend after failed connects in a row, and nobody has to run for that.
#include <sys/socket.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "tests/support/fixture.h"
#include "tests/support/tcp.h"

namespace {

using namespace support;

/// Longer than any of these tests takes.
const std::string for_long = "eject = { failures = 3, time = \"10m\" }";

struct SeenEvent {
  std::uint32_t verdict;
  std::uint32_t backends;
  std::uint64_t lost;
  std::uint32_t pid;
  std::string service;
  std::string vip;
  std::string backend;
};

class Eject : public Integration {
 protected:
  /// Who answered so many connects, how often; "ECONNREFUSED" for one that failed.
  static std::map<std::string, int> ask_often(int times, const char* vip = "10.96.0.1") {
    std::map<std::string, int> answers;
    for (int i = 0; i < times; ++i) {
      const Answer answer = ask(vip, 80);
      ++answers[answer.error != 0 ? ::strerrorname_np(answer.error) : answer.text];
    }
    return answers;
  }

  static int refused(const std::map<std::string, int>& answers) {
    const auto found = answers.find("ECONNREFUSED");
    return found == answers.end() ? 0 : found->second;
  }

  static std::string web(const std::vector<Backend>& backends, const std::string& keys = for_long,
                         const char* vip = "10.96.0.1") {
    return toml({{"web", vip, 80, backends, "refuse", keys}});
  }

  static SeenBackend seen(Handle& handle, std::uint16_t port, std::size_t service = 0) {
    const auto services = handle.visit();
    const auto& backends = services.at(service).backends;
    const auto found = std::ranges::find(backends, port, &SeenBackend::port);
    require(found != backends.end(), "there is no such backend");
    return *found;
  }

  static std::size_t count_ejected(Handle& handle, std::size_t service = 0) {
    const auto services = handle.visit();
    return static_cast<std::size_t>(std::ranges::count_if(services.at(service).backends,
                                                          [](const SeenBackend& one) { return one.ejected_ms != 0; }));
  }

  std::vector<SeenEvent> read_events(Handle& handle) const {
    std::vector<SeenEvent> events;
    const clusterip_event_visitor visit = [](const clusterip_event* event, void* user) {
      static_cast<std::vector<SeenEvent>*>(user)->push_back({event->verdict, event->backends, event->lost, event->pid,
                                                             event->service, text_of(event->vip),
                                                             text_of(event->backend)});
      return 0;
    };
    plugin().read_events(handle.get(), visit, &events, nullptr);
    return events;
  }
};

TEST_F(Eject, NoConnectReachesTheBackendAfterItsThirdFailureInARow) {
  const DeadPort dead("127.0.0.3");
  const NamedServer one("one"), two("two", "127.0.0.2");
  const std::vector<Backend> backends = {backend(one), backend(two), dead.backend()};
  struct {
    const char* vip;
    const char* keys;
  } const rows[] = {{"10.96.0.1", "policy = \"random\"\n"},
                    {"10.96.0.2", "policy = \"round_robin\"\n"},
                    {"10.96.0.3", "policy = \"least_conn\"\n"},
                    {"10.96.0.4", "policy = \"maglev\"\nclient = \"socket\"\n"}};
  std::vector<Service> services;
  for (const auto& row : rows)
    services.push_back({std::string("web") + row.vip, row.vip, 80, backends, "refuse", row.keys + for_long});
  Handle handle = serve(toml(services));
  for (std::size_t i = 0; i < std::size(rows); ++i) {
    SCOPED_TRACE(rows[i].keys);
    const auto answers = ask_often(400, rows[i].vip);
    EXPECT_EQ(refused(answers), 3);
    EXPECT_EQ(answers.size(), 3u) << "both others are chosen";
    const SeenBackend ejected = seen(handle, dead.port(), i);
    EXPECT_EQ(ejected.failures, 3u);
    EXPECT_EQ(ejected.connects, 3u);
    EXPECT_GT(ejected.ejected_ms, 500'000u);
    EXPECT_LE(ejected.ejected_ms, 600'000u);
    EXPECT_EQ(ejected.state, CLUSTERIP_ACTIVE);
    EXPECT_EQ(count_ejected(handle, i), 1u);
    clusterip_resolution resolution;
    for (int times = 0; times < 100; ++times) {
      ASSERT_TRUE(ok(handle.resolve(rows[i].vip, 80, resolution)));
      EXPECT_NE(text_of(resolution.backend), "127.0.0.3:" + std::to_string(dead.port()));
      EXPECT_EQ(resolution.backends, 2u);
    }
  }
}

TEST_F(Eject, WorksForIpv6) {
  const DeadPort dead("::1");
  const NamedServer one("one", "::1");
  Handle handle = serve(web({backend(one), dead.backend()}, for_long, "fd00::1"));
  const auto answers = ask_often(200, "fd00::1");
  EXPECT_EQ(refused(answers), 3);
  EXPECT_EQ(answers.at("one"), 197);
}

TEST_F(Eject, BackendIsTriedAgainWhenItsTimeIsOverAndServesWhenItListensAgain) {
  DeadPort dead("127.0.0.2");
  const NamedServer one("one");
  Handle handle = serve(web({backend(one), dead.backend()}, "eject = { failures = 3, time = \"1s\" }"));
  ASSERT_TRUE(eventually([&] { return static_cast<std::size_t>(refused(ask_often(1))) + count_ejected(handle) >= 2; }))
      << "the third failure";
  ASSERT_EQ(count_ejected(handle), 1u);
  const auto two = dead.listen("two");
  EXPECT_EQ(ask_often(20)["one"], 20) << "not yet";
  ASSERT_TRUE(eventually([&] { return ask("10.96.0.1", 80) == answered_by("two"); }));
  const auto answers = ask_often(100);
  EXPECT_EQ(answers.size(), 2u);
  EXPECT_EQ(refused(answers), 0);
  EXPECT_EQ(count_ejected(handle), 0u);
  EXPECT_EQ(seen(handle, dead.port()).failures, 3u);
}

TEST_F(Eject, TimeDoublesWithEachEjectionInARowAndNotAfterASuccess) {
  constexpr std::uint32_t time = 200;  // ms
  auto dead = std::make_unique<DeadPort>("127.0.0.2");
  const std::uint16_t port = dead->port();
  const NamedServer one("one");
  Handle handle = serve(web({backend(one), dead->backend()}, "eject = { failures = 2, time = \"200ms\" }"));
  const auto eject_again = [&] {
    std::uint64_t failures = 0;
    while (count_ejected(handle) == 0) {
      require(failures < 3, "it is not ejected");
      failures += static_cast<std::uint64_t>(refused(ask_often(1)));
    }
    return failures;
  };
  const auto pass = [&] { return eventually([&] { return count_ejected(handle) == 0; }); };
  EXPECT_EQ(eject_again(), 2u);
  EXPECT_LE(seen(handle, port).ejected_ms, time);
  ASSERT_TRUE(pass());
  EXPECT_EQ(eject_again(), 1u) << "the row goes on: one more connect is enough to tell";
  EXPECT_GT(seen(handle, port).ejected_ms, time);
  EXPECT_LE(seen(handle, port).ejected_ms, 2 * time);
  ASSERT_TRUE(pass());
  EXPECT_EQ(eject_again(), 1u);
  EXPECT_GT(seen(handle, port).ejected_ms, 2 * time);
  EXPECT_LE(seen(handle, port).ejected_ms, 4 * time);
  ASSERT_TRUE(pass());
  {
    const auto two = dead->listen("two");
    ASSERT_TRUE(eventually([&] { return ask("10.96.0.1", 80) == answered_by("two"); }));
  }
  dead = std::make_unique<DeadPort>("127.0.0.2", port);
  EXPECT_EQ(eject_again(), 2u) << "a new row";
  EXPECT_LE(seen(handle, port).ejected_ms, time);
}

TEST_F(Eject, SuccessEndsTheRow) {
  auto dead = std::make_unique<DeadPort>("127.0.0.2");
  const std::uint16_t port = dead->port();
  const NamedServer one("one");
  Handle handle = serve(web({backend(one), dead->backend()}, "policy = \"round_robin\"\n" + for_long));
  for (int i = 0; i < 5; ++i) {
    EXPECT_EQ(refused(ask_often(4)), 2) << "two of three";
    {
      const auto two = dead->listen("two");
      EXPECT_EQ(ask_often(2)["two"], 1);
    }
    dead = std::make_unique<DeadPort>("127.0.0.2", port);
  }
  EXPECT_EQ(count_ejected(handle), 0u);
  EXPECT_EQ(seen(handle, port).failures, 10u);
  EXPECT_EQ(refused(ask_often(100)), 3);
}

TEST_F(Eject, NeverMoreThanHalfOfAServiceIsEjected) {
  const std::vector<std::size_t> sizes = {1, 2, 3, 5, 32, 33, 40, 65};
  for (const std::size_t size : sizes) {
    SCOPED_TRACE(size);
    std::vector<DeadPort> dead;
    std::vector<Backend> backends;
    for (std::size_t i = 0; i < size; ++i) {
      dead.emplace_back("127.0.0.1");
      backends.push_back(dead.back().backend());
    }
    Handle handle = serve(web(backends, "policy = \"round_robin\"\neject = { failures = 1, time = \"10m\" }"));
    const int times = static_cast<int>(size) * 12;
    EXPECT_EQ(refused(ask_often(times)), times);
    // Groups of at most 32, half of each: 33 is 16 and 17, 40 is 20 and 20, 65 is 21, 22 and 22.
    const std::size_t expected = size == 65 ? 10 + 11 + 11 : size / 2;
    EXPECT_EQ(count_ejected(handle), expected);
    std::uint64_t most = 0;
    const auto services = handle.visit();
    for (const SeenBackend& one : services.at(0).backends) {
      if (one.ejected_ms != 0) most = std::max(most, one.connects);
    }
    EXPECT_LE(most, 1u) << "no connect reaches one that is ejected";
  }
}

TEST_F(Eject, WeightOfTheDeadBackendGoesToTheOthers) {
  const DeadPort dead("127.0.0.3");
  const NamedServer light("light"), heavy("heavy", "127.0.0.2");
  struct {
    const char* vip;
    const char* keys;
  } const rows[] = {{"10.96.0.1", "policy = \"random\"\n"},
                    {"10.96.0.2", "policy = \"maglev\"\nclient = \"socket\"\n"}};
  std::vector<Service> services;
  for (const auto& row : rows) {
    services.push_back({std::string("web") + row.vip,
                        row.vip,
                        80,
                        {backend(light), dead.backend(1000)},
                        "refuse",
                        row.keys + for_long});
  }
  services.push_back(
      {"weights", "10.96.0.3", 80, {backend(light), backend(heavy, 9), dead.backend(10)}, "refuse", for_long});
  const Handle handle = serve(toml(services));
  for (const auto& row : rows) {
    const auto answers = ask_often(300, row.vip);
    EXPECT_EQ(refused(answers), 3) << row.keys;
    EXPECT_EQ(answers.at("light"), 297) << row.keys;
  }
  // Four draws by weight find one that is not ejected in 15 of 16 cases; the rest is shared evenly: 12.5 % instead
  // of 10.
  EXPECT_LT(ask_often(1000, "10.96.0.3")["light"], 190) << "the others keep their weights";
}

TEST_F(Eject, AffinityMovesToAnotherBackendAndStaysThere) {
  const DeadPort dead("127.0.0.3");
  const NamedServer one("one"), two("two", "127.0.0.2");
  Handle handle = serve(web({backend(one, 1), backend(two, 1), dead.backend(65535)}, "affinity = \"1h\"\n" + for_long));
  const auto answers = ask_often(100);
  EXPECT_EQ(refused(answers), 3) << "the client was given it, as nearly all are";
  ASSERT_EQ(answers.size(), 2u) << "and then another one, for good";
  EXPECT_EQ(seen(handle, dead.port()).connects, 3u);
}

TEST_F(Eject, MaglevClientKeepsItsSecondChoice) {
  const DeadPort dead("127.0.0.3");
  const NamedServer one("one"), two("two", "127.0.0.2");
  const Handle handle = serve(web({backend(one, 1), backend(two, 1), dead.backend(65535)},
                                  "policy = \"maglev\"\nclient = \"cgroup\"\n" + for_long));
  const auto answers = ask_often(100);
  EXPECT_EQ(refused(answers), 3);
  EXPECT_EQ(answers.size(), 2u);
}

TEST_F(Eject, ConnectThatIsGivenUpIsAFailure) {
  const TcpListener full("127.0.0.2", 0, 0);
  const NamedServer one("one");
  std::vector<Fd> queued;
  // A queue of 0 takes one connection; SYNs that come after it are not answered.
  queued.push_back(tcp_socket());
  ASSERT_EQ(connect_errno(queued.back().get(), full.address(), full.port()), 0);
  Handle handle = serve(web({backend(one), full.backend()}, "policy = \"round_robin\"\n" + for_long));
  for (int i = 0; i < 6; ++i) {
    const Fd fd = tcp_socket(SOCK_NONBLOCK);
    connect_errno(fd.get(), "10.96.0.1", 80);
  }
  EXPECT_EQ(seen(handle, full.port()).failures, 3u);
  EXPECT_EQ(count_ejected(handle), 1u);
  EXPECT_EQ(seen(handle, full.port()).live, 0u);
}

TEST_F(Eject, FailuresWhileItIsEjectedDoNotCount) {
  const TcpListener full("127.0.0.2", 0, 0);
  const NamedServer one("one");
  const Fd queued = tcp_socket();
  ASSERT_EQ(connect_errno(queued.get(), full.address(), full.port()), 0);
  Handle handle = serve(
      web({backend(one), full.backend()}, "policy = \"round_robin\"\neject = { failures = 3, time = \"400ms\" }"));
  std::vector<Fd> trying;
  for (int i = 0; i < 20; ++i) {
    trying.push_back(tcp_socket(SOCK_NONBLOCK));
    connect_errno(trying.back().get(), "10.96.0.1", 80);
  }
  trying.clear();
  EXPECT_EQ(seen(handle, full.port()).failures, 10u);
  EXPECT_GT(seen(handle, full.port()).ejected_ms, 0u);
  EXPECT_LE(seen(handle, full.port()).ejected_ms, 400u) << "ejected once";
}

TEST_F(Eject, WorksWithoutPeerNamesAndWithoutAProcess) {
  const DeadPort dead("127.0.0.2");
  const NamedServer one("one");
  {
    const Handle handle = serve("[engine]\npeer_names = false\n" + web({backend(one), dead.backend()}), pinned());
  }
  EXPECT_EQ(refused(ask_often(200)), 3);
  Handle handle(plugin(), pinned());
  EXPECT_EQ(count_ejected(handle), 1u) << "as one that only looks sees it";
  EXPECT_TRUE(ok(handle.detach()));
}

TEST_F(Eject, AdoptionKeepsTheEjectionAndWhatIsAskedFor) {
  for (const char* policy : {"random", "round_robin", "least_conn", "maglev"}) {
    SCOPED_TRACE(policy);
    const DeadPort dead("127.0.0.2"), other_dead("127.0.0.4");
    const NamedServer one("one"), two("two", "127.0.0.3");
    const std::string text = web({backend(one), dead.backend(), backend(two)},
                                 std::string("client = \"socket\"\npolicy = \"") + policy + "\"\n" + for_long);
    {
      const Handle handle = serve(text, pinned());
      EXPECT_EQ(refused(ask_often(200)), 3);
    }
    Handle adopter(plugin(), pinned());
    ASSERT_TRUE(ok(adopter.load(text)));
    ASSERT_TRUE(ok(adopter.attach()));
    EXPECT_EQ(count_ejected(adopter), 1u);
    EXPECT_EQ(refused(ask_often(100)), 0);
    ASSERT_TRUE(ok(adopter.set_backends("web", {backend(one), dead.backend(), backend(two), other_dead.backend()})));
    EXPECT_EQ(refused(ask_often(200)), 3) << "the new one is ejected after as many failures";
    EXPECT_EQ(count_ejected(adopter), 2u);
    EXPECT_TRUE(ok(adopter.detach()));
  }
}

TEST_F(Eject, LoadThatIsTheFirstToAskForItExchangesThePrograms) {
  const DeadPort dead("127.0.0.2");
  const NamedServer one("one");
  const std::vector<Backend> backends = {backend(one), dead.backend()};
  {
    Handle handle = serve(web(backends, ""), pinned());
    EXPECT_GT(refused(ask_often(100)), 20);
    ASSERT_TRUE(ok(handle.load(web(backends))));
    EXPECT_EQ(refused(ask_often(100)), 3);
    ASSERT_TRUE(ok(handle.load(web(backends, ""))));
    EXPECT_GT(refused(ask_often(100)), 20);
    ASSERT_TRUE(ok(handle.attach())) << "the programs know nothing of ejection again";
  }
  Handle adopter(plugin(), pinned());
  ASSERT_TRUE(ok(adopter.load(web(backends))));
  EXPECT_EQ(refused(ask_often(100)), 3);
  EXPECT_TRUE(ok(adopter.detach()));
}

TEST_F(Eject, ReloadKeepsTheEjectionAlsoInNewMaps) {
  const DeadPort dead("127.0.0.2");
  const NamedServer one("one"), two("two", "127.0.0.3");
  std::vector<Service> services = {{"a", "10.96.0.1", 80, {backend(one), dead.backend()}, "refuse", for_long}};
  Handle handle = serve(toml(services));
  EXPECT_EQ(refused(ask_often(100)), 3);
  services[0].backends = {dead.backend(2), backend(two), backend(one)};
  ASSERT_TRUE(ok(handle.load(toml(services))));
  EXPECT_EQ(refused(ask_often(100)), 0) << "at another place among the backends";
  EXPECT_EQ(count_ejected(handle), 1u);

  const auto more = more_services(200, backend(one));
  services.insert(services.end(), more.begin(), more.end());
  ASSERT_TRUE(ok(handle.load(toml(services))));
  EXPECT_EQ(refused(ask_often(100)), 0) << "in new maps";
  EXPECT_EQ(count_ejected(handle), 1u);
  EXPECT_EQ(seen(handle, dead.port()).failures, 3u);

  services[0].more = {};
  ASSERT_TRUE(ok(handle.load(toml(services))));
  EXPECT_EQ(count_ejected(handle), 0u) << "nobody asks for it any more";
  EXPECT_GT(refused(ask_often(100)), 20);
}

TEST_F(Eject, ReloadThatTakesTheOthersAwayEndsTheEjection) {
  const DeadPort dead("127.0.0.2"), also_dead("127.0.0.3");
  const NamedServer one("one"), two("two", "127.0.0.4");
  Handle handle = serve(web({backend(one), backend(two), dead.backend(), also_dead.backend()}));
  ask_often(200);
  EXPECT_EQ(count_ejected(handle), 2u);
  ASSERT_TRUE(ok(handle.load(web({backend(one), dead.backend(), also_dead.backend()}))));
  EXPECT_EQ(count_ejected(handle), 1u) << "half of three";
  ASSERT_TRUE(ok(handle.load(web({dead.backend(), also_dead.backend()}))));
  EXPECT_EQ(count_ejected(handle), 1u);
  ASSERT_TRUE(ok(handle.load(web({dead.backend()}))));
  EXPECT_EQ(count_ejected(handle), 0u) << "the only one";
  EXPECT_EQ(refused(ask_often(20)), 20);
  EXPECT_EQ(count_ejected(handle), 0u);
}

TEST_F(Eject, FailuresAreCountedAlsoWhereNobodyIsEjected) {
  const DeadPort dead("127.0.0.2");
  Handle handle = serve(web({dead.backend()}, ""));
  EXPECT_EQ(refused(ask_often(7)), 7);
  EXPECT_EQ(seen(handle, dead.port()).failures, 7u);
  EXPECT_EQ(seen(handle, dead.port()).ejected_ms, 0u);
}

TEST_F(Eject, ConnectThatFailsWithoutASynIsNoFailureOfTheBackend) {
  const NamedServer one("one");
  Handle handle = serve(web({backend(one), {"203.0.113.1", 80}}, "policy = \"round_robin\"\n" + for_long));
  const Fd fd = tcp_socket();
  for (int i = 0; i < 10; ++i) EXPECT_EQ(ask_often(2).size(), 2u) << "no route to one of them";
  EXPECT_EQ(seen(handle, 80).failures, 0u);
  EXPECT_EQ(count_ejected(handle), 0u);
}

TEST_F(Eject, EventTellsOfTheEjectionAndHowManyBackendsThereWere) {
  const DeadPort dead("127.0.0.2");
  const NamedServer one("one"), two("two", "127.0.0.3");
  Handle handle = serve(web({backend(one), dead.backend(), backend(two)}, "policy = \"round_robin\"\n" + for_long));
  ASSERT_GE(plugin().event_fd(handle.get(), 60, nullptr), 0);
  EXPECT_EQ(refused(ask_often(9)), 3);
  const auto events = read_events(handle);
  ASSERT_EQ(events.size(), 10u) << "nine decisions, and one ejection";
  const auto ejected = std::ranges::find(events, CLUSTERIP_VERDICT_EJECTED, &SeenEvent::verdict);
  ASSERT_NE(ejected, events.end());
  EXPECT_EQ(ejected->service, "web");
  EXPECT_EQ(ejected->vip, "10.96.0.1:80");
  EXPECT_EQ(ejected->backend, "127.0.0.2:" + std::to_string(dead.port()));
  EXPECT_EQ(ejected->pid, 0u);
  for (const SeenEvent& event : events) {
    EXPECT_EQ(event.backends, 3u);
    EXPECT_EQ(event.lost, 0u);
  }
}

TEST_F(Eject, EventsThatFoundNoRoomAreCounted) {
  const NamedServer one("one");
  Handle handle = serve(web({backend(one)}, ""));
  ASSERT_GE(plugin().event_fd(handle.get(), 60, nullptr), 0);
  constexpr std::size_t asked = 1500;
  for (std::size_t i = 0; i < asked; ++i) ask("10.96.0.1", 80);
  const auto kept = read_events(handle);
  ASSERT_LT(kept.size(), asked);
  EXPECT_EQ(kept.back().lost, 0u) << "before the first that was lost";
  ask("10.96.0.1", 80);
  const auto next = read_events(handle);
  ASSERT_EQ(next.size(), 1u);
  EXPECT_EQ(next[0].lost, asked - kept.size());

  ASSERT_TRUE(ok(handle.load(toml(more_services(200, backend(one))))));
  ask("10.98.0.1", 80);
  const auto in_new_maps = read_events(handle);
  ASSERT_EQ(in_new_maps.size(), 1u);
  EXPECT_EQ(in_new_maps[0].lost, asked - kept.size());
}

TEST_F(Eject, ManyClientsAtOnceNeverEjectMoreThanHalf) {
  constexpr int clients = 4;
  std::vector<DeadPort> dead;
  std::vector<Backend> backends;
  for (int i = 0; i < 6; ++i) {
    dead.emplace_back("127.0.0.1");
    backends.push_back(dead.back().backend());
  }
  Handle handle = serve(web(backends, "eject = { failures = 1, time = \"1m\" }"));
  std::vector<std::thread> threads;
  for (int i = 0; i < clients; ++i) {
    threads.emplace_back([] { ask_often(2000); });
  }
  for (std::thread& thread : threads) thread.join();
  // Meanwhile there may be more for a moment: one that is too many is taken back.
  EXPECT_EQ(count_ejected(handle), 3u);
  std::uint64_t failures = 0;
  const SeenService service = handle.visit().at(0);
  for (const SeenBackend& one : service.backends) failures += one.failures;
  EXPECT_EQ(failures, std::uint64_t{clients} * 2000) << "each is counted";
}

}  // namespace
