// SPDX-License-Identifier: BSD-2-Clause
//
// What happens to processes in a long life, all at once: they are killed at any moment, two of them want the same pins,
// threads open and close the plugin together, services come and go by the thousand. CLUSTERIP_TORTURE=N: N times as
// much.
#include <fmt/format.h>
#include <signal.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <random>
#include <thread>

#include "tests/run/running.h"

namespace {

using namespace support;
using std::chrono::microseconds;
using std::chrono::steady_clock;
using testing::HasSubstr;

int times(int rounds) {
  const char* factor = std::getenv("CLUSTERIP_TORTURE");
  return rounds * (factor != nullptr ? std::atoi(factor) : 1);
}

class TortureProcesses : public Running {
 protected:
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

  const TemporaryDirectory directory_;
  const NamedServer one_{"one"};
  const NamedServer two_{"two"};
  std::minstd_rand random_{1};
};

/// Starts it, kills it after so long, and waits until it is gone.
void kill_after(const std::vector<std::string>& command, microseconds time) {
  Process process(command);
  std::this_thread::sleep_for(time);
  ::kill(process.pid(), SIGKILL);
  process.wait();
}

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

TEST_F(TortureProcesses, KilledAtAnyMomentTheNextOneRepairs) {
  const auto with = [&](const NamedServer& server, std::uint32_t more) {
    auto services = more_services(more, backend(server));
    services.push_back(web({backend(server)}));
    return toml(services, {2048, 4096});
  };
  // The second takes new maps; the way back does not.
  const std::array files = {directory_.write("few.toml", with(one_, 2)),
                            directory_.write("many.toml", with(two_, 500))};
  const std::array names = {"one", "two"};
  const microseconds loading = time_of(load(files[1])), unloading = time_of(unload());
  bool serves = false;
  for (int round = 0; round < times(30); ++round) {
    SCOPED_TRACE(round);
    if (random_() % 3 == 0) {
      kill_after(unload(), moment(unloading));
      serves = false;  // or not yet
    } else {
      kill_after(load(files[random_() % 2]), moment(loading));
      if (serves) {
        const Answer answer = ask(fast_vip, vip_port);
        EXPECT_TRUE(answer == answered_by("one") || answer == answered_by("two")) << answer;
      }
    }
    if (random_() % 4 == 0) {
      const Finished unloaded = run(unload());
      ASSERT_EQ(unloaded.exit_code, fine) << unloaded.err;
      expect_nothing_left();
      serves = false;
      continue;
    }
    const std::size_t which = random_() % 2;
    const Finished loaded = run(load(files[which]));
    ASSERT_EQ(loaded.exit_code, fine) << loaded.err;
    EXPECT_EQ(ask(fast_vip, vip_port), answered_by(names[which]));
    EXPECT_EQ(ask("10.98.0.2", vip_port), answered_by(names[which]));
    EXPECT_EQ(connect4_programs(cgroup()).size(), 1u);
    serves = true;
  }
}

TEST_F(TortureProcesses, ServiceThatIsKilledWhileItBeginsOrReloadsLeavesTheFastPathServing) {
  const auto made = files(toml({web({backend(one_)})}));
  const std::vector<std::string> service = command({"run", "--config", made->config()});
  const auto begin = steady_clock::now();
  RunningService(made).kill();
  const auto starting = std::chrono::duration_cast<microseconds>(steady_clock::now() - begin);
  Asker asker(fast_vip, vip_port);
  for (int round = 0; round < times(12); ++round) {
    auto services = more_services(round % 2 == 0 ? 2 : 300, backend(one_));
    services.push_back(web({backend(one_)}));
    made->write(toml(services, {1024, 4096}));
    kill_after(service, moment(starting));
    RunningService next(made);
    made->write(toml({web({backend(one_)})}, {1024, 4096}));
    next.signal(SIGHUP);
    std::this_thread::sleep_for(moment(starting / 4));
    next.kill();
    asker.wait_for(5);
  }
  const auto answers = asker.stop();
  EXPECT_THAT(answers, testing::ElementsAre(testing::Pair("one", testing::Ge(60u))));
  RunningService last(made);
  EXPECT_EQ(ask(fast_vip, vip_port), answered_by("one"));
  EXPECT_EQ(connect4_programs(cgroup()).size(), 1u);
}

TEST_F(TortureProcesses, ProxyThatIsKilledInAHandOverLeavesOneThatServesOrRoomForTheNext) {
  const auto made = std::make_shared<FallbackProxy::Files>();
  made->write(proxy_toml({{"web", proxied_vip, vip_port, {backend(one_)}}}));
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
  for (int round = 0; round < times(12); ++round) {
    SCOPED_TRACE(round);
    old = std::make_unique<FallbackProxy>(made, std::function<void()>(), std::vector<std::string>{"--take-over"});
    Process next(successor);
    std::this_thread::sleep_for(moment(taking));
    if (round % 2 == 0) {
      // The new one: the old one serves on, or had handed over and drains.
      ::kill(next.pid(), SIGKILL);
      next.wait();
      old->signal(SIGTERM);
      EXPECT_EQ(old->wait().exit_code, fine);
    } else {
      // The old one: the new one has what was handed to it, or begins anew.
      old->kill();
      try {
        next.wait_for_error("serving ");
        EXPECT_EQ(ask(proxied_vip, vip_port), answered_by("one"));
        ::kill(next.pid(), SIGTERM);
        EXPECT_EQ(next.wait().exit_code, fine);
      } catch (const std::runtime_error&) {
        EXPECT_EQ(next.wait().exit_code, failed) << "it was not told what it needs";
      }
    }
  }
  FallbackProxy last(made);
  EXPECT_EQ(ask(proxied_vip, vip_port), answered_by("one"));
  EXPECT_EQ(last.terminate().exit_code, fine);
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
  constexpr int threads = 8;
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
  for (int i = 0; i < threads; ++i) {
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
