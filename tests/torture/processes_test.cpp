// SPDX-License-Identifier: BSD-2-Clause
//
// What happens to processes in a long life, all at once: they are killed at any moment, two of them want the same pins,
// threads open and close the plugin together, services come and go by the thousand. CLUSTERIP_TORTURE=N: N times as
// much. CLUSTERIP_TORTURE_SEED=N: the moments of an earlier run, which has printed it.
#include <fmt/format.h>
#include <linux/bpf.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <thread>

#include "bpf/map_layout.h"
#include "tests/run/running.h"
#include "tests/support/udp.h"

namespace {

using namespace support;
using std::chrono::microseconds;
using std::chrono::steady_clock;
using testing::HasSubstr;

int times(int rounds) {
  const char* factor = std::getenv("CLUSTERIP_TORTURE");
  return rounds * (factor != nullptr ? std::atoi(factor) : 1);
}

std::minstd_rand::result_type seed() {
  const char* given = std::getenv("CLUSTERIP_TORTURE_SEED");
  return given != nullptr ? std::strtoul(given, nullptr, 10) : std::random_device()();
}

/// Some of the answers to an Asker, each of which may come, and no other one.
void expect_only(const std::map<std::string, std::uint64_t>& answers, const std::set<std::string>& allowed) {
  for (const auto& [answer, count] : answers) EXPECT_TRUE(allowed.contains(answer)) << count << " times " << answer;
}

class TortureProcesses : public Running {
 protected:
  void SetUp() override {
    std::cout << seed_ << std::endl;  // at once: should it not come to its end
    Running::SetUp();
  }

  std::vector<std::string> command(const std::vector<std::string>& words) const {
    std::vector<std::string> all = {CLUSTERIP_COMMAND};
    all.insert(all.end(), words.begin(), words.end());
    all.insert(all.end(), {"--plugin", CLUSTERIP_PLUGIN_PATH});
    return all;
  }
  std::vector<std::string> load(const std::string& file) const {
    return command({"load", "--config", file, "--cgroup", cgroup().path(), "--pin", pin()});
  }
  std::vector<std::string> unload() const { return command({"unload", "--pin", pin()}); }

  void expect_nothing_left() const {
    EXPECT_TRUE(connect4_programs(cgroup()).empty());
    EXPECT_FALSE(std::filesystem::exists(pin()));
    EXPECT_EQ(ask(fast_vip, vip_port), refused_with(ENETUNREACH));
  }

  /// A moment of something that takes so long; each time another one.
  microseconds moment(microseconds takes) {
    return microseconds(std::uniform_int_distribution<std::int64_t>(0, takes.count())(random_));
  }

  /// An exchange of the fast path's programs has begun, and has not come to its end.
  static bool is_exchanging() { return std::filesystem::exists(pin() + "/next"); }

  /// The keys of services and VIPs that are pinned; -1: none are.
  static int pinned_keys();

  const TemporaryDirectory directory_;
  const NamedServer one_{"one"};
  const NamedServer two_{"two"};

 private:
  const std::minstd_rand::result_type number_ = seed();

 protected:
  const std::string seed_ = fmt::format("CLUSTERIP_TORTURE_SEED={}", number_);
  std::minstd_rand random_{number_};
};

int TortureProcesses::pinned_keys() {
  const std::string path = pin() + "/Service_Map";
  bpf_attr attr{};
  attr.pathname = reinterpret_cast<std::uint64_t>(path.c_str());
  const Fd map(bpf(BPF_OBJ_GET, attr));
  if (map.get() < 0) return -1;
  std::array<std::array<char, sizeof(service_key)>, 2> keys{};
  int count = 0;
  for (bool is_first = true;; is_first = false, ++count) {
    attr = {};
    attr.map_fd = static_cast<std::uint32_t>(map.get());
    if (!is_first) attr.key = reinterpret_cast<std::uint64_t>(keys[0].data());
    attr.next_key = reinterpret_cast<std::uint64_t>(keys[1].data());
    if (bpf(BPF_MAP_GET_NEXT_KEY, attr) != 0) return count;
    keys[0] = keys[1];
  }
}

constexpr int killed = 128 + SIGKILL, killed_at_a_call = 128 + SIGSYS;

/// Where an exchange of programs has begun: all is pinned that is to move up; the first pin is to be made.
constexpr std::array in_an_exchange = {BPF_LINK_UPDATE, BPF_OBJ_PIN};

/// What became of processes that were to be killed in the middle of something.
class Kills {
 public:
  /// Starts it and kills it after so long. False: it had ended before, which tells nothing.
  bool after(microseconds time, const std::vector<std::string>& command) {
    Process process(command);
    std::this_thread::sleep_for(time);
    return kill(process);
  }

  /// Starts what ends by itself, and kills it as soon as it has come to this.
  bool when(const std::function<bool()>& has_come, const std::vector<std::string>& command) {
    Process process(command);
    while (!has_come() && !has_ended(process)) std::this_thread::yield();
    return kill(process);
  }

  /// Starts it; the kernel kills it at its first bpf() with this command. To hit that by chance takes hundreds.
  bool at(bpf_cmd bpf_command, const std::vector<std::string>& command) {
    return note(Process(command, nullptr, [&] { die_at(SYS_bpf, bpf_command); }).wait());
  }

  void found_half_done(bool is_half_done) { half_done_ += is_half_done; }

  /// To be called at the end of a test.
  void tell() const {
    std::cout << fmt::format("{} of {} were killed before they had ended; {} left something half done\n", hits_, all_,
                             half_done_);
  }

 private:
  bool kill(Process& process) {
    ::kill(process.pid(), SIGKILL);
    return note(process.wait());
  }

  bool note(const Finished& finished) {
    const bool is_hit = finished.exit_code == killed || finished.exit_code == killed_at_a_call;
    EXPECT_TRUE(is_hit || finished.exit_code == fine) << "exit code " << finished.exit_code << ": " << finished.err;
    ++all_;
    hits_ += is_hit;
    return is_hit;
  }

  static bool has_ended(const Process& process) {
    siginfo_t info{};
    return ::waitid(P_PID, static_cast<id_t>(process.pid()), &info, WEXITED | WNOHANG | WNOWAIT) == 0 &&
           info.si_pid != 0;
  }

  int all_ = 0;
  int hits_ = 0;
  int half_done_ = 0;
};

microseconds time_of(const std::vector<std::string>& command) {
  const auto begin = steady_clock::now();
  const Finished finished = run(command);
  EXPECT_EQ(finished.exit_code, fine) << finished.err;
  return std::chrono::duration_cast<microseconds>(steady_clock::now() - begin);
}

TEST_F(TortureProcesses, OfTwoLoadsAtOnceEachIsWholeOrRefused) {
  const std::array files = {directory_.write("one.toml", toml({web({backend(one_)})})),
                            directory_.write("two.toml", toml({web({backend(two_)})}))};
  for (int round = 0; round < times(10); ++round) {
    Process first(load(files[0])), second(load(files[1]));
    const std::array results = {first.wait(), second.wait()};
    int loaded = 0;
    for (const Finished& result : results) {
      loaded += result.exit_code == fine;
      if (result.exit_code == fine) continue;
      EXPECT_EQ(result.exit_code, failed);
      EXPECT_THAT(result.err, HasSubstr("another process"));
      EXPECT_EQ(std::ranges::count(result.err, '\n'), 1) << result.err;
    }
    ASSERT_GE(loaded, 1) << results[0].err << results[1].err;
    const Answer answer = ask(fast_vip, vip_port);
    if (loaded == 2)
      EXPECT_TRUE(answer == answered_by("one") || answer == answered_by("two")) << answer;
    else
      EXPECT_EQ(answer, answered_by(results[0].exit_code == fine ? "one" : "two"));
    EXPECT_EQ(connect4_programs(cgroup()).size(), 1u);
    ASSERT_EQ(run(unload()).exit_code, fine);
    expect_nothing_left();
  }
}

TEST_F(TortureProcesses, OfTwoServicesAtOnceOneServes) {
  for (int round = 0; round < times(5); ++round) {
    std::array<std::shared_ptr<const FallbackProxy::Files>, 2> made = {files(toml({web({backend(one_)})})),
                                                                       files(toml({web({backend(two_)})}))};
    std::array<std::unique_ptr<Process>, 2> services;
    for (std::size_t i = 0; i < services.size(); ++i)
      services[i] = std::make_unique<Process>(command({"run", "--engine", "bpf", "--config", made[i]->config()}));
    int serving = 0;
    for (std::size_t i = 0; i < services.size(); ++i) {
      try {
        services[i]->wait_for_error("serving ");
        ++serving;
      } catch (const std::runtime_error&) {
        const Finished refused = services[i]->wait();
        EXPECT_EQ(refused.exit_code, failed);
        EXPECT_THAT(refused.err, HasSubstr("another process"));
        EXPECT_FALSE(std::filesystem::exists(made[i]->control()));
        services[i].reset();
      }
    }
    EXPECT_EQ(serving, 1);
    EXPECT_EQ(ask(fast_vip, vip_port), answered_by(services[0] ? "one" : "two"));
    for (const auto& service : services) {
      if (!service) continue;
      ::kill(service->pid(), SIGTERM);
      EXPECT_EQ(service->wait().exit_code, fine);
    }
    ASSERT_EQ(run(unload()).exit_code, fine);
  }
}

TEST_F(TortureProcesses, LoadThatIsKilledAtAnyMomentIsRepairedAndNoConnectFails) {
  const auto with = [&](const NamedServer& server, std::uint32_t more) {
    auto services = more_services(more, backend(server));
    services.push_back(web({backend(server)}));
    return toml(services, {2048, 4096});
  };
  // The first time, the second one takes new maps.
  const std::array files = {directory_.write("few.toml", with(one_, 2)),
                            directory_.write("many.toml", with(two_, 500))};
  const std::array names = {"one", "two"};
  std::array<microseconds, 2> takes{};
  std::array<int, 2> keys{};
  Kills kills;
  for (int turn = 0; turn < times(2); ++turn) {
    for (const std::size_t which : {std::size_t{1}, std::size_t{0}}) {
      run(unload());
      takes[which] = time_of(load(files[which]));
      keys[which] = pinned_keys();
    }
    ASSERT_LT(keys[0], keys[1]);
    Asker asker(fast_vip, vip_port);
    for (int round = 0; round < 6; ++round) {
      SCOPED_TRACE(fmt::format("round {} of turn {}", round, turn));
      const std::size_t killed_one = round == 0 ? 1 : random_() % 2;
      if (round % 3 == 0) {
        EXPECT_TRUE(kills.at(in_an_exchange[random_() % 2], load(files[killed_one])));
        EXPECT_TRUE(is_exchanging());
      } else {
        for (microseconds time = moment(takes[killed_one]); !kills.after(time, load(files[killed_one]));) time /= 2;
      }
      const int left = pinned_keys();
      kills.found_half_done(is_exchanging() || (left != keys[0] && left != keys[1]));
      const Answer answer = ask(fast_vip, vip_port);
      EXPECT_TRUE(answer == answered_by("one") || answer == answered_by("two")) << answer;

      const std::size_t which = random_() % 2;
      takes[which] = time_of(load(files[which]));
      EXPECT_EQ(ask(fast_vip, vip_port), answered_by(names[which]));
      EXPECT_EQ(ask("10.98.0.2", vip_port), answered_by(names[which]));
      EXPECT_EQ(ask("10.98.1.2", vip_port), which == 0 ? refused_with(ENETUNREACH) : answered_by("two"));
      EXPECT_EQ(connect4_programs(cgroup()).size(), 1u);
      EXPECT_EQ(pinned_keys(), keys[which]);
      EXPECT_FALSE(is_exchanging());
      asker.wait_for(1);
    }
    expect_only(asker.stop(), {"one", "two"});
    ASSERT_EQ(run(unload()).exit_code, fine);
    expect_nothing_left();
  }
  kills.tell();
}

// An unload takes away what is served, and before a first load there is nothing: here a connect is answered or finds
// no VIP. It finds no service that refuses, and no other backend.
TEST_F(TortureProcesses, UnloadAndFirstLoadThatAreKilledAtAnyMomentAreRepaired) {
  auto services = more_services(100, backend(one_));
  services.push_back(web({backend(one_)}));
  const std::string file = directory_.write("file.toml", toml(services, {256, 1024}));
  microseconds loading = time_of(load(file)), unloading = time_of(unload());
  Kills kills;
  Asker asker(fast_vip, vip_port);
  for (int round = 0; round < times(8); ++round) {
    SCOPED_TRACE(round);
    if (round % 4 == 0) {
      EXPECT_TRUE(kills.at(BPF_OBJ_PIN, load(file)));
      EXPECT_TRUE(is_exchanging());
    } else if (round % 2 == 0) {
      for (microseconds time = moment(loading); !kills.after(time, load(file)); time /= 2) run(unload());
    } else {
      loading = time_of(load(file));
      EXPECT_EQ(ask(fast_vip, vip_port), answered_by("one"));
      if (round % 4 == 1)
        for (microseconds time = moment(unloading); !kills.after(time, unload()); time /= 2) run(load(file));
      else
        kills.when([this] { return connect4_programs(cgroup()).empty(); }, unload());
    }
    const bool is_attached = !connect4_programs(cgroup()).empty();
    const bool is_pinned = std::filesystem::exists(pin() + "/sock4_connect");
    kills.found_half_done(std::filesystem::exists(pin()) && (is_exchanging() || is_attached != is_pinned));
    EXPECT_EQ(ask(fast_vip, vip_port), is_attached ? answered_by("one") : refused_with(ENETUNREACH));
    if (random_() % 2 == 0) {
      loading = time_of(load(file));
      EXPECT_EQ(ask(fast_vip, vip_port), answered_by("one"));
      EXPECT_EQ(ask("10.98.0.2", vip_port), answered_by("one"));
      EXPECT_EQ(connect4_programs(cgroup()).size(), 1u);
    }
    unloading = time_of(unload());
    // Of a load that was killed before its first pin the directory is left, which unload takes for nothing.
    std::error_code not_empty;
    if (round % 2 == 0) std::filesystem::remove(pin(), not_empty);
    expect_nothing_left();
  }
  expect_only(asker.stop(), {"one", "ENETUNREACH"});
  kills.tell();
}

TEST_F(TortureProcesses, ServiceThatIsKilledWhileItBeginsOrReloadsLeavesTheFastPathServing) {
  const auto made = files(toml({web({backend(one_)})}));
  const std::vector<std::string> service = command({"run", "--config", made->config()});
  const auto begin = steady_clock::now();
  RunningService(made).kill();
  const auto starting = std::chrono::duration_cast<microseconds>(steady_clock::now() - begin);
  Kills kills;
  Asker asker(fast_vip, vip_port);
  for (int round = 0; round < times(12); ++round) {
    SCOPED_TRACE(round);
    auto services = more_services(round % 2 == 0 ? 2 : 300, backend(one_));
    services.push_back(web({backend(one_)}));
    made->write(toml(services, {1024, 4096}));
    if (round % 4 == 0) {
      EXPECT_TRUE(kills.at(in_an_exchange[random_() % 2], service));
      EXPECT_TRUE(is_exchanging());
    } else {
      EXPECT_TRUE(kills.after(moment(starting), service)) << "it ended by itself";
    }
    kills.found_half_done(is_exchanging());
    EXPECT_EQ(ask(fast_vip, vip_port), answered_by("one"));
    RunningService next(made);
    EXPECT_FALSE(is_exchanging());
    made->write(toml({web({backend(one_)})}, {1024, 4096}));
    next.signal(SIGHUP);
    std::this_thread::sleep_for(moment(starting / 4));
    next.kill();
    EXPECT_EQ(ask(fast_vip, vip_port), answered_by("one"));
    asker.wait_for(5);
  }
  const auto answers = asker.stop();
  EXPECT_THAT(answers, testing::ElementsAre(testing::Pair("one", testing::Ge(60u))));
  RunningService last(made);
  EXPECT_EQ(ask(fast_vip, vip_port), answered_by("one"));
  EXPECT_EQ(connect4_programs(cgroup()).size(), 1u);
  kills.tell();
}

// As long as the old process has not said that it is replaced, no connect is refused, whatever becomes of the new one.
// What a process has accepted dies with it, what was handed over with the new one, what was not yet with the old one.
TEST_F(TortureProcesses, ProxyThatIsKilledInAHandOverLeavesOneThatServesOrRoomForTheNext) {
  const auto made = std::make_shared<FallbackProxy::Files>();
  Userspace settings;
  settings.local_vips = true;  // whose routes are handed over as well
  made->write(proxy_toml({{"web", fast_vip, vip_port, {backend(one_)}}}, settings));
  const std::vector<std::string> successor = {CLUSTERIP_FALLBACK_PROXY, "--config", made->config(), "--take-over"};
  auto old = std::make_unique<FallbackProxy>(made);
  const auto begin = steady_clock::now();
  {
    Process next(successor);
    next.wait_for_error("has handed over");
    ::kill(next.pid(), SIGKILL);
  }
  const auto taking = std::chrono::duration_cast<microseconds>(steady_clock::now() - begin);
  old->wait();
  int new_killed = 0, serving_on = 0, half_done = 0;
  // Until one was in the middle, but not for ever.
  for (int round = 0; round < times(16) || (half_done == 0 && round < times(80)); ++round) {
    SCOPED_TRACE(round);
    old = std::make_unique<FallbackProxy>(made, std::function<void()>(), std::vector<std::string>{"--take-over"});
    if (round % 2 == 0) {
      Asker asker(fast_vip, vip_port);
      Process next(successor);
      if (round % 4 == 0)
        next.wait_for_error("taking over from pid");
      else
        std::this_thread::sleep_for(moment(taking));
      ::kill(next.pid(), SIGKILL);
      EXPECT_EQ(next.wait().exit_code, killed);
      const Answer answer = ask(fast_vip, vip_port);
      const auto answers = asker.stop();
      old->signal(SIGTERM);
      const Finished ended = old->wait();
      EXPECT_EQ(ended.exit_code, fine);
      ++new_killed;
      half_done += ended.err.contains("the process that was to take over has not");
      if (ended.err.contains("replaced; ")) continue;
      ++serving_on;
      EXPECT_EQ(answer, answered_by("one"));
      std::uint64_t count = 0;
      for (const auto& [each, times] : answers) count += times;
      expect_only(answers, {"one", "", "ECONNRESET"});
      EXPECT_LE(count - answers.at("one"), 1u) << "one at a time is on its way";
    } else {
      // The new one has what was handed to it, or begins anew.
      Process next(successor);
      std::this_thread::sleep_for(moment(taking));
      old->kill();
      try {
        next.wait_for_error("serving ");
        EXPECT_EQ(ask(fast_vip, vip_port), answered_by("one"));
        ::kill(next.pid(), SIGTERM);
        const Finished ended = next.wait();
        EXPECT_EQ(ended.exit_code, fine) << ended.err;
      } catch (const std::runtime_error&) {
        EXPECT_EQ(next.wait().exit_code, failed) << "it was not told what it needs";
      }
    }
  }
  std::cout << fmt::format("{} new ones were killed; {} old ones served on, {} of them in the middle of a hand-over\n",
                           new_killed, serving_on, half_done);
  EXPECT_GE(half_done, 1);
  FallbackProxy last(made);
  EXPECT_EQ(ask(fast_vip, vip_port), answered_by("one"));
  EXPECT_EQ(last.terminate().exit_code, fine);
}

/// Asks by datagrams over and over, each time from another socket, and counts what it is told.
class DatagramAsker {
 public:
  using Ask = UdpAnswer(const UdpSocket& client, const std::string& address, std::uint16_t port);

  DatagramAsker(Ask& ask, std::string address, std::uint16_t port) {
    thread_ = std::thread([this, &ask, address = std::move(address), port] {
      while (!stopping_) {
        try {
          ++seen_[ask(UdpSocket(), address, port).name];
        } catch (const std::exception& error) {
          ++seen_[error.what()];
        }
        std::this_thread::sleep_for(microseconds(500));  // each is a flow to the userspace engine
      }
    });
  }
  ~DatagramAsker() { stop(); }
  DatagramAsker(const DatagramAsker&) = delete;
  DatagramAsker& operator=(const DatagramAsker&) = delete;

  std::map<std::string, std::uint64_t> stop() {
    stopping_ = true;
    if (thread_.joinable()) thread_.join();
    return seen_;
  }

 private:
  std::atomic<bool> stopping_ = false;
  std::map<std::string, std::uint64_t> seen_;  // the thread's until it is joined
  std::thread thread_;
};

// Services change and come and go around those that are asked; two of them stay with the userspace engine, the others
// move to the fast path and back. Nothing that is served throughout fails. (Of datagrams, those may be lost that are on
// their way while their service moves.)
TEST_F(TortureProcesses, NoConnectFailsInAStormOfReloadsOfTheUserspaceEngine) {
  const char *staying = "10.96.0.2", *moving = fast_vip, *moving6 = "fd00:96::1";
  const NamedServer six("one", "::1");
  const UdpServer udp_one("one"), udp_two("two");
  const auto text = [&](int turn) {
    const std::string userspace = "engine = \"userspace\"\n", udp = "protocol = \"udp\"\n";
    const auto moves = [&](int each) { return turn / each % 2 == 0 ? userspace : std::string(); };
    constexpr std::array policies = {"random", "round_robin", "least_conn", "maglev"};
    const std::string policy = fmt::format("policy = \"{}\"\n", policies[static_cast<std::size_t>(turn / 5 % 4)]);
    std::vector<Backend> backends = {backend(one_, 1 + static_cast<std::uint32_t>(turn) % 7)};
    if (turn % 3 != 0) backends.push_back(backend(two_, 2, turn % 4 == 0 ? "drain" : "active"));
    const std::vector<Backend> both = {udp_one.backend(), udp_two.backend()};
    std::vector<Service> services = {{"staying", staying, vip_port, backends, "refuse", userspace + policy},
                                     {"moving", moving, vip_port, backends, "refuse", moves(1) + policy},
                                     {"moving6", moving6, vip_port, {backend(six)}, "refuse", moves(2)},
                                     {"names", staying, 53, both, "refuse", udp + userspace + policy},
                                     {"moving-names", moving, 53, both, "refuse", udp + moves(3) + policy}};
    for (int i = 0; i < turn % 10; ++i)
      services.push_back({fmt::format("more-{}", i),
                          fmt::format("10.96.1.{}", i + 1),
                          vip_port,
                          {backend(two_)},
                          "refuse",
                          (turn + i) % 3 == 0 ? "" : userspace});
    Userspace settings;
    settings.local_vips = true;
    settings.udp_timeout = "1s";
    return proxy_toml(services, settings);
  };
  RunningService service(files(text(0)));
  Asker first(staying, vip_port), second(moving, vip_port), third(moving6, vip_port);
  DatagramAsker fourth(ask, staying, 53), fifth(ask_until_answered, moving, 53);
  const int turns = times(40);
  for (int turn = 1; turn <= turns; ++turn) {
    const std::string log = service.reload(text(turn));
    EXPECT_THAT(log, testing::Not(HasSubstr("goes on serving"))) << log;
    if (turn % 10 != 0) continue;
    for (const Asker* asker : {&first, &second, &third}) asker->wait_for(10);
  }
  const std::array answers = {first.stop(), second.stop(), third.stop(), fourth.stop(), fifth.stop()};
  std::uint64_t count = 0;
  for (const auto& each : answers) {
    expect_only(each, {"one", "two"});
    for (const auto& [answer, times] : each) count += times;
  }
  std::cout << fmt::format("{} reloads under {} connects and datagrams\n", turns, count);
  EXPECT_GT(answers[3].size() + answers[4].size(), 2u) << "datagrams are answered";
}

TEST_F(TortureProcesses, SignalsUntilTheVeryEndChangeNoExitCode) {
  const auto made = std::make_shared<FallbackProxy::Files>();
  made->write(proxy_toml({{"web", proxied_vip, vip_port, {backend(one_)}}}));
  for (int round = 0; round < times(80); ++round) {
    FallbackProxy proxy(made);
    proxy.signal(SIGTERM);
    proxy.wait_for_log("accepting nothing more");
    // Until it is gone, and no longer than what is in one moment.
    for (int sent = 0; sent < 4000 && ::kill(proxy.pid(), SIGTERM) == 0; ++sent) {
    }
    ASSERT_EQ(proxy.wait().exit_code, fine) << "in round " << round;
  }
}

TEST_F(TortureProcesses, EightThreadsOpenAndCloseThePlugin) {
  constexpr std::size_t threads = 8;
  const std::string text = toml({web({backend(one_)})}, {16, 16});
  const std::vector<Cgroup> cgroups(threads);
  unload_plugin();
  const auto cycle = [&](const Cgroup& own) {
    const Plugin plugin;
    Handle handle(plugin, {own.path(), {}, 0});
    require_ok(handle.load(text));
    require_ok(handle.attach());
    require(connect4_programs(own).size() == 1, "it is not attached");
    require(handle.visit().size() == 1, "it has another service");
    require_ok(handle.set_backends("web", {backend(two_)}));
    clusterip_resolution seen{};
    require_ok(handle.resolve(fast_vip, vip_port, seen));
    require(seen.verdict == CLUSTERIP_VERDICT_REWRITTEN, "it does not resolve");
  };
  cycle(cgroups[0]);
  const std::size_t files = open_files();
  std::array<std::string, threads> complaints;
  std::vector<std::thread> running;
  for (std::size_t i = 0; i < threads; ++i) {
    running.emplace_back([&, i] {
      try {
        for (int round = 0; round < times(6); ++round) cycle(cgroups[i]);
      } catch (const std::exception& error) {
        complaints[i] = error.what();
      }
    });
  }
  for (std::thread& thread : running) thread.join();
  for (const std::string& complaint : complaints) EXPECT_EQ(complaint, "");
  EXPECT_EQ(open_files(), files);
  EXPECT_FALSE(is_mapped("libclusterip"));
  for (const Cgroup& each : cgroups) EXPECT_TRUE(connect4_programs(each).empty());
}

TEST_F(TortureProcesses, ChurnOf10000ServicesGrowsNothing) {
  constexpr std::uint32_t count = 10'000, step = 1'000;
  const auto window = [&](std::uint32_t first) {
    std::vector<Service> services;
    for (std::uint32_t i = first; i < first + count; ++i)
      services.push_back({fmt::format("svc-{}", i),
                          fmt::format("10.{}.{}.{}", 100 + i / 62'500, i / 250 % 250, i % 250 + 1),
                          vip_port,
                          {backend(i % 2 == 0 ? one_ : two_)}});
    return services;
  };
  const Limits limits{count, 2 * count};
  Handle handle = serve(toml(window(0), limits));
  BpfObjects before;
  std::size_t resident = 0;
  constexpr int warm_up = 3;
  for (int round = 1; round <= warm_up + times(8); ++round) {
    const auto services = window(static_cast<std::uint32_t>(round) * step);
    ASSERT_TRUE(ok(handle.load(toml(services, limits))));
    EXPECT_EQ(ask(services.front().vip, vip_port), answered_by("one"));
    EXPECT_EQ(ask(services.back().vip, vip_port), answered_by("two"));
    EXPECT_EQ(ask(window(static_cast<std::uint32_t>(round - 1) * step).front().vip, vip_port),
              refused_with(ENETUNREACH));
    if (round == warm_up) {
      before = objects_of(cgroup());
      resident = resident_bytes();
    }
  }
  EXPECT_EQ(objects_of(cgroup()).maps, before.maps) << "the maps that were large enough still are";
  EXPECT_LT(resident_bytes(), resident + 8'000'000);
  EXPECT_EQ(handle.visit().size(), count);
}

}  // namespace
