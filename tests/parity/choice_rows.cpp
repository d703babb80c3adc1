// SPDX-License-Identifier: BSD-2-Clause
//
// Which backend is chosen, and which is not.
#include <fmt/format.h>

#include <cmath>
#include <set>
#include <vector>

#include "tests/parity/checks.h"
#include "tests/support/client.h"
#include "tests/support/named_server.h"
#include "tests/support/observe.h"

namespace parity {

using namespace support;

namespace {

using Answers = std::map<std::string, int>;

/// One in 100,000 runs exceeds this by chance, with 2 degrees of freedom.
constexpr double chi_squared_bound = 23;

/// How far three backends, which weigh 1, 2 and 5, are off their shares.
double chi_squared(Answers seen, int connections) {
  double sum = 0;
  for (const auto& [name, weight] : {std::pair{"one", 1}, {"two", 2}, {"five", 5}}) {
    const double expected = connections * weight / 8.0;
    sum += std::pow(seen[name] - expected, 2) / expected;
  }
  return sum;
}

/// How many of so many connects failed.
int failed_of(const Answers& answers) {
  const auto found = answers.find("ECONNREFUSED");
  return found == answers.end() ? 0 : found->second;
}

}  // namespace

void random_draws_by_weight(Stage& stage) {
  const NamedServer one("one"), two("two"), five("five");
  stage.serve({web({backend(one, 1), backend(two, 2), backend(five, 5)})});
  EXPECT_LT(chi_squared(ask_often(1600), 1600), chi_squared_bound);
}

void round_robin_takes_turns(Stage& stage) {
  const NamedServer one("one"), two("two"), five("five");
  stage.serve({web({backend(one, 1), backend(two, 2), backend(five, 5)}, "policy = \"round_robin\"\n")});
  for (int turn = 0; turn < 10; ++turn) EXPECT_EQ(ask_often(8), (Answers{{"one", 1}, {"two", 2}, {"five", 5}}));
}

void least_conn_prefers_the_idle(Stage& stage) {
  const TcpListener busy;
  const NamedServer idle("idle");
  const char* policy = "policy = \"least_conn\"\n";
  stage.serve({web({busy.backend()}, policy)});
  std::vector<Fd> held;
  for (int i = 0; i < 20; ++i) {
    held.push_back(dial(vip, port));
    held.push_back(busy.accept());
  }
  stage.reload({web({busy.backend(), backend(idle)}, policy)});
  EXPECT_EQ(ask_often(15), (Answers{{"idle", 15}}));
}

void maglev_keeps_a_client(Stage& stage) {
  const NamedServer one("one"), two("two"), three("three");
  const std::vector<Backend> backends = {backend(one), backend(two), backend(three)};
  stage.serve({web(backends, "policy = \"maglev\"\n"),
               {"sockets", other_vip, port, backends, "refuse", "policy = \"maglev\"\nclient = \"socket\"\n"}});
  EXPECT_EQ(ask_often(50).size(), 1U);
  EXPECT_EQ(ask_often(200, other_vip).size(), 3U) << "each socket is a client";
}

void affinity_keeps_until_the_backend_leaves(Stage& stage) {
  const NamedServer one("one"), two("two"), three("three");
  stage.serve({web({backend(one), backend(two), backend(three)}, "affinity = \"1h\"\n")});
  const std::string first = ask(vip, port).text;
  EXPECT_EQ(ask_often(30), (Answers{{first, 30}}));
  std::vector<Backend> others;
  for (const NamedServer* server : {&one, &two, &three})
    if (server->name() != first) others.push_back(backend(*server));
  stage.reload({web(others, "affinity = \"1h\"\n")});
  const std::string next = ask(vip, port).text;
  EXPECT_NE(next, first);
  EXPECT_EQ(ask_often(30), (Answers{{next, 30}}));
}

void affinity_expires(Stage& stage) {
  const NamedServer one("one"), two("two");
  stage.serve({web({backend(one), backend(two)}, "affinity = \"1ms\"\n")});
  const std::string first = ask(vip, port).text;
  EXPECT_TRUE(eventually([&] {
    const timespec pause{0, 11'000'000};  // the fast path rounds it up to 10 ms
    ::nanosleep(&pause, nullptr);
    return ask(vip, port).text != first;
  }));
}

void ejected_backend_is_skipped(Stage& stage) {
  const DeadPort dead("127.0.0.3");
  const NamedServer one("one"), two("two");
  stage.serve({web({backend(one), backend(two), dead.backend()}, "eject = { failures = 3, time = \"10m\" }\n")});
  ask_often(100);  // three of them, at least, have met the dead one, but for once in 10^13 runs
  const auto status = stage.status_of("web");
  const auto& seen = status.at("backends").as_array().at(2).as_object();
  EXPECT_EQ(boost::json::value_to<std::string>(seen.at("state")), "ejected");
  EXPECT_EQ(seen.at("failures").to_number<int>(), 3) << "after the third it is not tried";
  EXPECT_EQ(failed_of(ask_often(60)), 0);
}

void ejected_backend_is_tried_again(Stage& stage) {
  DeadPort dead("127.0.0.3");
  const NamedServer one("one");
  stage.serve({web({backend(one), dead.backend()}, "eject = { failures = 1, time = \"1s\" }\n")});
  const auto is_ejected = [&] {
    const auto status = stage.status_of("web");
    return boost::json::value_to<std::string>(status.at("backends").as_array().at(1).at("state")) == "ejected";
  };
  EXPECT_TRUE(eventually([&] {
    ask(vip, port);
    return is_ejected();
  }));
  const auto back = dead.listen("back");
  EXPECT_TRUE(eventually([&] { return ask(vip, port) == answered_by("back"); }));
}

void health_takes_the_dead_out(Stage& stage) {
  DeadPort dead("127.0.0.3");
  const NamedServer one("one");
  stage.serve({web({backend(one), dead.backend()},
                   "health = { interval = \"100ms\", timeout = \"100ms\", rise = 1, fall = 1 }\n")});
  const auto state = [&] {
    const auto status = stage.status_of("web");
    return boost::json::value_to<std::string>(status.at("backends").as_array().at(1).at("state"));
  };
  EXPECT_TRUE(eventually([&] { return state() == "down"; }));
  EXPECT_EQ(ask_often(40), (Answers{{"one", 40}}));
  const auto back = dead.listen("back");
  EXPECT_TRUE(eventually([&] { return state() == "active"; }));
  EXPECT_TRUE(eventually([&] { return ask(vip, port) == answered_by("back"); }));
}

void all_down_is_refused_or_tried(Stage& stage) {
  const DeadPort dead;
  const std::string health = "health = { interval = \"100ms\", timeout = \"100ms\", rise = 1, fall = 1 }\n";
  stage.serve({web({dead.backend()}, health)});
  EXPECT_TRUE(eventually([&] {
    const auto status = stage.status_of("web");
    return boost::json::value_to<std::string>(status.at("backends").as_array().at(0).at("state")) == "down";
  }));
  EXPECT_TRUE(eventually([&] { return ask(vip, port) == stage.refused(ECONNREFUSED); }));
}

void dead_backend(Stage& stage) {
  const DeadPort dead("127.0.0.3");
  const NamedServer one("one");
  stage.serve({web({backend(one), dead.backend()}, "policy = \"round_robin\"\n")});
  EXPECT_EQ(failed_of(ask_often(20)), stage.either(10, 0));
}

void all_backends_dead(Stage& stage) {
  const DeadPort dead;
  stage.serve({web({dead.backend()})});
  const Fd fd = tcp_socket();
  EXPECT_EQ(connect_errno(fd.get(), vip, port), stage.either(ECONNREFUSED, 0));
  const Fd again = tcp_socket();
  const int connected = connect_errno(again.get(), vip, port);
  EXPECT_EQ(connected != 0 ? connected : read_answer(again.get()).error, stage.either(ECONNREFUSED, ECONNRESET));
}

void client_is_whom(Stage& stage) {
  const NamedServer one("one"), two("two");
  stage.serve({web({backend(one), backend(two)}, "affinity = \"1h\"\n")});
  std::set<std::string> reached;
  for (int i = 0; i < 50; ++i) reached.insert(ask_from(fmt::format("127.1.0.{}", i + 1), vip, port));
  EXPECT_EQ(reached.size(), stage.either(1U, 2U)) << "addresses of one cgroup";
}

}  // namespace parity
