// SPDX-License-Identifier: BSD-2-Clause
//
// Backends that go down and come back, seen by health checks or by failed connects, on either engine.
#include <algorithm>
#include <chrono>
#include <memory>

#include "tests/run/running.h"

namespace {

using namespace support;
using testing::HasSubstr;

/// Where both engines can serve: an address of this host.
constexpr const char* vip = "127.0.1.5";

constexpr const char* checked = "health = { interval = \"50ms\", timeout = \"500ms\", rise = 2, fall = 2 }\n";

class RunHealth : public Running, public testing::WithParamInterface<const char*> {
 protected:
  std::string text(const std::string& more, const std::vector<Backend>& backends) const {
    return proxy_toml({{"checked", vip, 80, backends, "refuse", fmt::format("engine = \"{}\"\n{}", GetParam(), more)}});
  }

  static std::string state(const FallbackProxy::Files& files, std::size_t backend) {
    return text_of(service_of(Running::status(files), "checked").at("backends").at(backend).at("state"));
  }
};

TEST_P(RunHealth, BackendThatGoesDownAndComesBackIsAvoidedMeanwhile) {
  const NamedServer one("one");
  auto two = std::make_unique<NamedServer>("two");
  const Backend backends[] = {backend(one), backend(*two)};
  RunningService service(files(text(checked, {backends[0], backends[1]})));
  const std::uint16_t port = two->port();
  two.reset();
  EXPECT_THAT(service.wait_for_log(" is down: "),
              HasSubstr(fmt::format("backend 127.0.0.1:{} of checked is down: connection refused", port)));
  // Whoever begins now reaches the other one.
  for (int i = 0; i < 200; ++i) ASSERT_EQ(ask(vip, 80), answered_by("one")) << i;
  EXPECT_EQ(state(*service.files(), 1), "down");
  EXPECT_THAT(text_of(service_of(status(*service.files()), "checked").at("backends").at(1).at("reason")),
              HasSubstr("refused"));

  two = std::make_unique<NamedServer>("two", "127.0.0.1", NamedServer::Speaks::name, port);
  service.wait_for_log(fmt::format("backend 127.0.0.1:{} of checked is up", port));
  EXPECT_TRUE(eventually([&] { return ask(vip, 80) == answered_by("two"); }));
  EXPECT_EQ(state(*service.files(), 1), "active");
}

TEST_P(RunHealth, ReloadAndRestartKeepWhatIsKnownToBeDown) {
  const NamedServer one("one");
  auto two = std::make_unique<NamedServer>("two");
  const Backend backends[] = {backend(one), backend(*two)};
  const auto made = files(text(checked, {backends[0], backends[1]}));
  auto service = std::make_unique<RunningService>(made);
  two.reset();
  service->wait_for_log(" is down: ");
  Asker asker(vip, 80);
  for (int i = 0; i < 10; ++i) {
    service->reload(
        text(checked + std::string(i % 2 == 0 ? "policy = \"round_robin\"\n" : ""), {backends[0], backends[1]}));
    asker.wait_for(5);
  }
  if (GetParam() == std::string("bpf")) {  // a proxied service has a gap in a restart
    service->terminate();
    asker.wait_for(10);
    service = std::make_unique<RunningService>(made);
    asker.wait_for(10);
    EXPECT_EQ(state(*made, 1), "down");
  }
  EXPECT_THAT(asker.stop(), testing::ElementsAre(testing::Pair("one", testing::Ge(50u))));
}

TEST_P(RunHealth, WithoutAnyBackendItIsRefusedOrWithPanicAllAreTried) {
  auto one = std::make_unique<NamedServer>("one");
  const Backend the_one = backend(*one);
  RunningService service(files(text(checked, {the_one})));
  one.reset();
  service.wait_for_log(" is down: ");
  // The proxy's thread closes its listener a moment later.
  EXPECT_TRUE(eventually([&] { return ask(vip, 80) == refused_with(ECONNREFUSED); }));
  service.reload(text(checked + std::string("panic = true\n"), {the_one}));
  const NamedServer back("back", "127.0.0.1", NamedServer::Speaks::name, the_one.port);
  EXPECT_TRUE(eventually([&] { return ask(vip, 80) == answered_by("back"); }));
}

TEST_P(RunHealth, BackendOfTwoServicesIsCheckedOnce) {
  const NamedServer one("one");
  const std::string more = fmt::format("engine = \"{}\"\nhealth = {{ interval = \"20ms\" }}\n", GetParam());
  RunningService service(files(
      proxy_toml({{"a", vip, 80, {backend(one)}, "refuse", more}, {"b", vip, 81, {backend(one)}, "refuse", more}})));
  EXPECT_EQ(status(*service.files()).at("checked_backends").to_number<int>(), 1);
  EXPECT_TRUE(eventually([&] { return one.accepted() > 3; }));
}

TEST_P(RunHealth, BackendIsEjectedAfterThreeFailedConnects) {
  const NamedServer one("one"), two("two");
  std::uint16_t dead_port = 0;
  {
    dead_port = NamedServer("dead").port();
  }
  const Backend dead{"127.0.0.1", dead_port};
  RunningService service(files(text("eject = { failures = 3, time = \"1h\" }\n", {backend(one), backend(two), dead})));
  std::uint64_t failures = 0;
  for (int i = 0; i < 300; ++i) failures += ask(vip, 80).error != 0 ? 1U : 0U;
  // The proxy tries another backend, the kernel cannot.
  EXPECT_EQ(failures, GetParam() == std::string("bpf") ? 3u : 0u);
  const auto seen = service_of(status(*service.files()), "checked").at("backends").at(2);
  EXPECT_EQ(text_of(seen.at("state")), "ejected");
  EXPECT_EQ(seen.at("failures").to_number<int>(), 3);
  EXPECT_GT(seen.at("ejected_ms").to_number<int>(), 3'000'000);
}

TEST_P(RunHealth, TheOnlyBackendIsNeverEjected) {
  std::uint16_t port = 0;
  {
    port = NamedServer("dead").port();
  }
  RunningService service(files(text("eject = { failures = 2, time = \"1h\" }\n", {Backend{"127.0.0.1", port}})));
  for (int i = 0; i < 10; ++i) EXPECT_NE(ask(vip, 80).error, 0);
  EXPECT_EQ(state(*service.files(), 0), "active");
  const NamedServer back("back", "127.0.0.1", NamedServer::Speaks::name, port);
  EXPECT_TRUE(eventually([&] { return ask(vip, 80) == answered_by("back"); }));
}

INSTANTIATE_TEST_SUITE_P(Engines, RunHealth, testing::Values("bpf", "userspace"),
                         [](const auto& engine) { return std::string(engine.param); });

}  // namespace
