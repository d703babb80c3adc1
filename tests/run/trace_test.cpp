// SPDX-License-Identifier: BSD-2-Clause
//
// `clusterip trace`: one line for each decision, of a running service and of what is pinned.
#include <unistd.h>

#include "tests/run/running.h"

namespace {

using namespace support;
using testing::HasSubstr;

class RunTrace : public Running {
 protected:
  /// A tracer that prints its first decision only when it hears them: the test connects until it does.
  static std::vector<std::string> words(std::vector<std::string> more) {
    std::vector<std::string> all = {CLUSTERIP_COMMAND, "trace", "--plugin", CLUSTERIP_PLUGIN_PATH};
    all.insert(all.end(), more.begin(), more.end());
    return all;
  }

  /// Connects until the tracer has ended, and returns what it printed.
  std::string trace_of(std::vector<std::string> options, const std::function<void()>& connect) {
    Process tracer(words(std::move(options)));
    std::atomic<bool> is_over = false;
    std::thread connects([&] {
      while (!is_over) connect();
    });
    const Finished finished = tracer.wait();
    is_over = true;
    connects.join();
    EXPECT_EQ(finished.exit_code, fine) << finished.err;
    return finished.out;
  }

  const NamedServer one_{"one"};
};

TEST_F(RunTrace, ShowsEachDecisionWithTheProcess) {
  RunningService service(files(toml({web({backend(one_)})})));
  const std::string control = service.files()->control();
  EXPECT_THAT(
      trace_of({"--control", control, "--count", "2"}, [] { ask(fast_vip, vip_port); }),
      HasSubstr(fmt::format("service web {}:{} -> 127.0.0.1:{}, 1 of 1 backend, ", fast_vip, vip_port, one_.port())));
  const std::string json = trace_of({"--control", control, "--count", "1", "--json"}, [] { ask(fast_vip, vip_port); });
  const auto decision = boost::json::parse(json).as_object();
  EXPECT_EQ(decision.at("pid").to_number<pid_t>(), ::getpid());
  EXPECT_EQ(text_of(decision.at("verdict")), "rewritten");
  EXPECT_EQ(text_of(decision.at("comm")), "run_tests");
}

TEST_F(RunTrace, FiltersByServiceBackendProcessAndVerdict) {
  const NamedServer two("two");
  RunningService service(files(toml({web({backend(one_)}), {"other", "10.96.0.2", 80, {backend(two)}}})));
  const std::string control = service.files()->control();
  const auto both = [] {
    ask(fast_vip, vip_port);
    ask("10.96.0.2", 80);
    ask("10.96.0.2", 81);
  };
  const auto lines = [&](std::vector<std::string> filter) {
    filter.insert(filter.end(), {"--control", control, "--count", "3"});
    return trace_of(filter, both);
  };
  EXPECT_THAT(lines({"--service", "other"}), testing::Not(HasSubstr("service web")));
  EXPECT_THAT(lines({"--backend", fmt::format("127.0.0.1:{}", one_.port())}), testing::Not(HasSubstr("service other")));
  EXPECT_THAT(lines({"--verdict", "no_service"}),
              testing::AllOf(HasSubstr("vip 10.96.0.2:81: no service has this port, refused with ECONNREFUSED"),
                             testing::Not(HasSubstr("->"))));
  EXPECT_THAT(lines({"--pid", fmt::to_string(::getpid())}), HasSubstr(fmt::format("[{}]", ::getpid())));
}

TEST_F(RunTrace, OfPinsAloneNeedsNoService) {
  {
    RunningService(files(toml({web({backend(one_)})}))).terminate();
  }
  EXPECT_THAT(trace_of({"--pin", pin(), "--count", "1"}, [] { ask(fast_vip, vip_port); }), HasSubstr("service web"));
}

TEST_F(RunTrace, WithoutAFastPathTellsSo) {
  const Service local{"local", "127.0.1.6", 80, {backend(one_)}};
  RunningService service(files(proxy_toml({local})), {"--engine", "userspace"});
  const Finished traced = clusterip({"trace", "--control", service.files()->control()});
  EXPECT_EQ(traced.exit_code, cannot);
  EXPECT_THAT(traced.err, HasSubstr("no fast path"));
}

TEST_F(RunTrace, FilterThatCannotMatchIsAMisuse) {
  const std::vector<std::pair<const char*, const char*>> filters = {
      {"--verdict", "lost"}, {"--backend", "127.0.0.1"},
      {"--backend", "web"},  {"--backend", "127.0.0.1:80/udp"},
      {"--pid", "0"},        {"--pid", "-1"},
      {"--pid", "iperf3"},   {"--count", "0"},
      {"--count", "-3"},     {"--count", "many"}};
  for (const auto& [option, value] : filters) {
    const Finished traced = clusterip({"trace", fmt::format("{}={}", option, value)});
    EXPECT_EQ(traced.exit_code, usage) << option << value;
    EXPECT_THAT(traced.err, HasSubstr(option + 2)) << value;
  }
}

TEST_F(RunTrace, CanaryIsShownOnlyWhenAskedFor) {
  RunningService service(files(toml({web({backend(one_)})})));
  const std::string control = service.files()->control();
  const auto look = [&] {
    ask(fast_vip, vip_port);
    service.signal(SIGHUP);  // the canary runs at each reload
  };
  EXPECT_THAT(trace_of({"--control", control, "--count", "8"}, look), testing::Not(HasSubstr("192.0.0.8")));
  EXPECT_THAT(trace_of({"--control", control, "--count", "1", "--service", "(canary)"}, look),
              HasSubstr("service (canary) 192.0.0.8:1/udp -> 127.0.0.1:1"));
}

TEST_F(RunTrace, ServiceThatHasNoDecisionsIsTold) {
  const std::vector<std::pair<const char*, const char*>> rows = {
      {"wep", "there is no service wep now"}, {"proxied", "the userspace engine carries service proxied"}};
  const auto expect_told = [&rows](const std::string& option, const std::string& place) {
    for (const auto& [service, told] : rows) {
      Process tracer(words({option, place, "--service", service}));
      EXPECT_THAT(tracer.wait_for_error("warning: "), HasSubstr(told));
    }
  };
  RunningService service(files(toml({web({backend(one_)}), proxied({backend(one_)})})));
  expect_told("--control", service.files()->control());
  service.terminate();
  expect_told("--pin", pin());
}

TEST_F(RunTrace, BackendOfTheFilterMayBeWrittenInAnyWay) {
  RunningService(files(toml({{"six", "2001:db8::1", vip_port, {{"::1", 9}}}}))).terminate();
  EXPECT_THAT(
      trace_of({"--pin", pin(), "--count", "1", "--backend", "[0:0::1]:9"}, [] { ask("2001:db8::1", vip_port); }),
      HasSubstr("-> [::1]:9"));
}

}  // namespace
