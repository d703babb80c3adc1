// SPDX-License-Identifier: BSD-2-Clause
//
// Which backend is chosen, and which is not.
#include <fmt/format.h>
#include <sched.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <set>
#include <thread>
#include <vector>

#include "tests/parity/checks.h"
#include "tests/support/client.h"
#include "tests/support/environment.h"
#include "tests/support/named_server.h"
#include "tests/support/observe.h"

namespace parity {

using namespace support;
using std::chrono::steady_clock;
using namespace std::chrono_literals;

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

boost::json::object nth_backend(const Stage& stage, std::size_t which) {
  return stage.status_of("web").at("backends").as_array().at(which).as_object();
}
boost::json::object second_backend(const Stage& stage) { return nth_backend(stage, 1); }

std::string text_of(const boost::json::value& value) { return boost::json::value_to<std::string>(value); }

/// While this lives, the process is in a cgroup below its own.
class InnerCgroup {
 public:
  InnerCgroup() {
    const std::string own = read_text("/proc/self/cgroup");
    const std::size_t path = own.find("0::") + 3;
    outer_ = cgroup2_mount() + own.substr(path, own.find('\n', path) - path);
    std::filesystem::create_directory(outer_ + "/inner");
    move_to(outer_ + "/inner");
  }
  ~InnerCgroup() {
    move_to(outer_);
    ::rmdir((outer_ + "/inner").c_str());
  }
  InnerCgroup(const InnerCgroup&) = delete;
  InnerCgroup& operator=(const InnerCgroup&) = delete;

 private:
  static void move_to(const std::string& cgroup) { std::ofstream(cgroup + "/cgroup.procs") << "0"; }

  std::string outer_;
};

/// The backend of a connected UDP socket, where peers have their own names, in a network namespace made for it; all
/// sockets there have the same one.
std::string reached_from_another_namespace(const char* address) {
  std::string reached;
  std::thread([&] {
    checked(::unshare(CLONE_NEWNET), "unshare");
    raise_loopback();
    std::set<std::string> peers;
    for (int i = 0; i < 5; ++i) {
      const Fd fd = udp_socket();
      const int error = connect_errno(fd.get(), address, port);
      peers.insert(error != 0 ? ::strerrorname_np(error) : peer_of(fd.get()));
    }
    EXPECT_EQ(peers.size(), 1U);
    reached = *peers.begin();
  }).join();
  return reached;
}

/// Serves one backend that checks have found down, and which is back, but that they will not find soon.
std::unique_ptr<NamedServer> answers_and_is_down(Stage& stage, const std::string& more) {
  DeadPort dead;
  stage.serve({web({dead.backend()},
                   more + "health = { interval = \"100ms\", timeout = \"100ms\", rise = 1000, fall = 1 }\n")});
  EXPECT_TRUE(eventually([&] { return text_of(nth_backend(stage, 0).at("state")) == "down"; }));
  return dead.listen("back");
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
  ask(vip, port);  // a worker of the userspace engine may take up the change a moment after it is told
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

// What is measured begins before and ends behind what it is about: it may be longer, however slow the machine is.
void ejected_backend_is_tried_again(Stage& stage) {
  DeadPort dead("127.0.0.3");
  const NamedServer one("one");
  stage.serve({web({backend(one), dead.backend()}, "eject = { failures = 1, time = \"1s\" }\n")});
  const auto begin = steady_clock::now();
  EXPECT_TRUE(eventually([&] {
    ask(vip, port);
    return text_of(second_backend(stage).at("state")) == "ejected";
  }));
  const auto back = dead.listen("back");
  EXPECT_TRUE(eventually([&] { return ask(vip, port) == answered_by("back"); }));
  EXPECT_GE(steady_clock::now() - begin, 1s);
}

void ejected_again_for_twice_as_long(Stage& stage) {
  const DeadPort dead("127.0.0.3");
  const NamedServer one("one");
  stage.serve(
      {web({backend(one), dead.backend()}, "policy = \"round_robin\"\neject = { failures = 1, time = \"300ms\" }\n")});
  // Before the connect that meets it, and behind that.
  int failures = 0;
  const auto fails_once_more = [&] {
    steady_clock::time_point before;
    EXPECT_TRUE(eventually([&] {
      before = steady_clock::now();
      ask_often(2);
      return second_backend(stage).at("failures").to_number<int>() > failures;
    }));
    EXPECT_EQ(second_backend(stage).at("failures").to_number<int>(), ++failures);
    return std::pair{before, steady_clock::now()};
  };
  const auto first = fails_once_more(), second = fails_once_more(), third = fails_once_more();
  EXPECT_GE(second.second - first.first, 300ms);
  EXPECT_GE(third.second - second.first, 600ms);
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

void all_down_is_refused(Stage& stage) {
  const auto back = answers_and_is_down(stage, "");
  EXPECT_TRUE(eventually([&] { return ask(vip, port) == stage.refused(ECONNREFUSED); }));
  for (int i = 0; i < 10; ++i) EXPECT_EQ(ask(vip, port), stage.refused(ECONNREFUSED));
}

void panic_tries_what_is_down(Stage& stage) {
  const auto back = answers_and_is_down(stage, "panic = true\n");
  EXPECT_EQ(ask_often(10), (Answers{{"back", 10}}));
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

void client_is_a_namespace(Stage& stage) {
  const NamedServer server("any", "0.0.0.0", NamedServer::Speaks::local_address);
  std::vector<Backend> backends;
  for (int i = 1; i <= 20; ++i) backends.push_back({fmt::format("127.0.2.{}", i), server.port()});
  const std::string client = "affinity = \"1h\"\nclient = \"netns\"\n";
  stage.serve({web(backends, client), {"names", other_vip, port, backends, "refuse", "protocol = \"udp\"\n" + client}},
              "peer_names = false\n");
  std::set<std::string> reached;
  for (int i = 1; i <= 50; ++i) {
    std::optional<InnerCgroup> inner;
    if (i > 45) inner.emplace();
    reached.insert(ask_from(fmt::format("127.1.0.{}", i), vip, port));
  }
  EXPECT_EQ(reached.size() == 1, stage.either(true, false)) << "addresses and cgroups of one namespace";

  std::set<std::string> elsewhere;
  for (int i = 0; i < 6; ++i) elsewhere.insert(reached_from_another_namespace(other_vip));
  EXPECT_EQ(elsewhere.contains("ENETUNREACH"), stage.either(false, true));
  EXPECT_GE(elsewhere.size(), stage.either(2U, 1U)) << "but for once in three million runs";
}

}  // namespace parity
