// SPDX-License-Identifier: BSD-2-Clause
//
// Which engine carries what, and what stays when the service ends.
#include <linux/capability.h>
#include <signal.h>
#include <sys/syscall.h>

#include <cerrno>
#include <filesystem>

#include "tests/run/running.h"

namespace {

using namespace support;
using testing::HasSubstr;

class RunEngine : public Running {
 protected:
  /// Everything is carried by the userspace engine, for a reason that has `why`.
  void expect_all_proxied(const RunningService& service, const std::string& why) {
    EXPECT_EQ(ask(local_vip, vip_port), answered_by("one"));
    EXPECT_EQ(ask(proxied_vip, vip_port), answered_by("two"));
    const auto seen = status(*service.files());
    EXPECT_THAT(text_of(seen.at("no_fast_path")), HasSubstr(why));
    for (const char* name : {"local", "proxied"}) {
      EXPECT_EQ(text_of(service_of(seen, name).at("engine")), "userspace") << name;
      EXPECT_THAT(text_of(service_of(seen, name).at("reason")), HasSubstr(why)) << name;
    }
    EXPECT_TRUE(seen.at("canary").is_null());
  }

  std::string both() const { return proxy_toml({local({backend(one_)}), proxied({backend(two_)})}); }

  /// Either engine can carry it: its VIP is an address of this host.
  static Service local(std::vector<Backend> backends) { return {"local", local_vip, vip_port, std::move(backends)}; }

  static constexpr const char* local_vip = "127.0.1.3";
  const NamedServer one_{"one"};
  const NamedServer two_{"two"};
};

TEST_F(RunEngine, FastPathCarriesWhatItCanAndTheProxyTheRest) {
  RunningService service(files(both()));
  EXPECT_EQ(ask(local_vip, vip_port), answered_by("one"));
  EXPECT_EQ(ask(proxied_vip, vip_port), answered_by("two"));
  const auto seen = status(*service.files());
  EXPECT_EQ(text_of(service_of(seen, "local").at("engine")), "bpf");
  EXPECT_EQ(text_of(service_of(seen, "local").at("reason")), "");
  EXPECT_EQ(service_of(seen, "local").at("connects").to_number<int>(), 1);
  EXPECT_EQ(text_of(service_of(seen, "proxied").at("engine")), "userspace");
  EXPECT_THAT(text_of(service_of(seen, "proxied").at("reason")), HasSubstr("engine userspace"));
  EXPECT_EQ(service_of(seen, "proxied").at("connects").to_number<int>(), 1);
  EXPECT_TRUE(seen.at("no_fast_path").is_null());
  EXPECT_TRUE(seen.at("canary").at("passed").as_bool());
}

TEST_F(RunEngine, ProxyProtocolIsCarriedByTheProxyForThatReason) {
  Service with_header = local({backend(one_)});
  with_header.more = "proxy_protocol = \"v2\"\n";
  RunningService service(files(proxy_toml({with_header})));
  const auto seen = status(*service.files());
  EXPECT_EQ(text_of(service_of(seen, "local").at("engine")), "userspace");
  EXPECT_THAT(text_of(service_of(seen, "local").at("reason")), HasSubstr("proxy_protocol"));
}

TEST_F(RunEngine, ForcedUserspaceCarriesAllByTheProxy) {
  RunningService service(files(both()), {"--engine", "userspace"});
  expect_all_proxied(service, "--engine userspace");
}

TEST_F(RunEngine, ModeOfTheFileForcesUserspace) {
  RunningService service(files(both(), "mode = \"userspace\"\n"));
  expect_all_proxied(service, "engine.mode");
}

TEST_F(RunEngine, OptionWinsOverTheModeOfTheFile) {
  RunningService service(files(toml({web({backend(one_)})}), "mode = \"userspace\"\n"), {"--engine", "bpf"});
  EXPECT_EQ(ask(fast_vip, vip_port), answered_by("one"));
  EXPECT_EQ(text_of(service_of(status(*service.files()), "web").at("engine")), "bpf");
}

TEST_F(RunEngine, WithoutTheSystemCallBpfTheProxyCarriesAll) {
  for (const int error : {EPERM, ENOSYS}) {
    RunningService service(files(both()), {}, [error] { forbid({{SYS_bpf, {}, error}}); });
    expect_all_proxied(service, error == EPERM ? "CAP_BPF" : "bpf");
  }
}

TEST_F(RunEngine, WithoutCapabilitiesTheProxyCarriesAll) {
  RunningService service(files(both()), {}, [] { drop_capabilities_except({CAP_NET_BIND_SERVICE, CAP_DAC_OVERRIDE}); });
  expect_all_proxied(service, "CAP_BPF");
}

TEST_F(RunEngine, ForcedBpfThatIsNotPossibleExitsWith4AndTheReason) {
  const auto made = files(both());
  Process process(
      {CLUSTERIP_COMMAND, "run", "--plugin", CLUSTERIP_PLUGIN_PATH, "--config", made->config(), "--engine", "bpf"},
      nullptr, [] { forbid({{SYS_bpf, {}, EPERM}}); });
  const Finished finished = process.wait();
  EXPECT_EQ(finished.exit_code, cannot);
  EXPECT_THAT(finished.err, HasSubstr("CAP_BPF"));
}

TEST_F(RunEngine, ForcedBpfRefusesAServiceThatItCannotCarry) {
  const auto made = files(both());
  const Finished finished = clusterip({"run", "--config", made->config(), "--engine", "bpf"});
  EXPECT_EQ(finished.exit_code, cannot);
  EXPECT_THAT(finished.err, HasSubstr("service \"proxied\""));
  EXPECT_NE(ask(local_vip, vip_port).error, 0) << "nothing is half applied";
}

TEST_F(RunEngine, WithoutThePluginTheProxyCarriesAll) {
  const auto made = files(both());
  RunningService service(made, {"--plugin", "/nonexistent/libclusterip.so.1"});
  expect_all_proxied(service, "/nonexistent/libclusterip.so.1");
}

TEST_F(RunEngine, FastPathStaysAfterTheEndUnlessItIsToBeDetached) {
  {
    RunningService service(files(toml({web({backend(one_)})})));
    EXPECT_EQ(service.terminate().exit_code, fine);
    EXPECT_EQ(ask(fast_vip, vip_port), answered_by("one"));
  }
  RunningService service(files(toml({web({backend(two_)})}), "on_exit = \"detach\"\n"));
  EXPECT_EQ(ask(fast_vip, vip_port), answered_by("two"));
  EXPECT_EQ(service.terminate().exit_code, fine);
  EXPECT_NE(ask(fast_vip, vip_port).error, 0);
  EXPECT_TRUE(!std::filesystem::exists(pin()) || std::filesystem::is_empty(pin()));
}

TEST_F(RunEngine, PinsThatAreRemovedAreTold) {
  RunningService service(files(toml({web({backend(one_)})})));
  std::filesystem::remove_all(pin());
  EXPECT_TRUE(
      eventually([&] { return clusterip({"status", "--control", service.files()->control()}).exit_code == failed; }));
  EXPECT_THAT(service.wait_for_log("the canary failed: "), HasSubstr(pin() + " was removed"));
  EXPECT_EQ(ask(fast_vip, vip_port), answered_by("one"));
  service.signal(SIGTERM);
  service.wait_for_log("the fast path ends with this process: " + pin() + " was removed");
  service.wait();
  EXPECT_NE(ask(fast_vip, vip_port).error, 0);
}

TEST_F(RunEngine, NoConnectFailsWhileTheServiceIsReplaced) {
  const auto made = files(toml({web({backend(one_)})}));
  auto service = std::make_unique<RunningService>(made);
  Asker asker(fast_vip, vip_port);
  for (const int signal : {SIGTERM, SIGKILL, SIGTERM}) {
    service->signal(signal);
    service->wait();
    asker.wait_for(20);
    service = std::make_unique<RunningService>(made);
    asker.wait_for(20);
  }
  const auto answers = asker.stop();
  EXPECT_THAT(answers, testing::ElementsAre(testing::Pair("one", testing::Ge(120u))));
}

TEST_F(RunEngine, WhatTheProxyHasServedIsRefusedWhenItHasEnded) {
  const Service far{"far", "10.96.0.9", vip_port, {backend(one_)}, "refuse", "engine = \"userspace\"\n"};
  const auto made = files(toml({web({backend(two_)}), far}));
  for (const bool is_killed : {false, true}) {
    SCOPED_TRACE(is_killed ? "killed" : "terminated");
    RunningService service(made);
    EXPECT_EQ(ask(far.vip, vip_port), answered_by("one"));
    if (is_killed) {
      service.kill();
      EXPECT_EQ(clusterip({"unload", "--on-exit", made->config()}).exit_code, fine);
    } else {
      EXPECT_EQ(service.terminate().exit_code, fine);
    }
    EXPECT_EQ(ask(far.vip, vip_port), refused_with(ECONNREFUSED)) << "it would leave a host with a default route";
    EXPECT_EQ(ask(fast_vip, vip_port), answered_by("two"));
    const Finished seen = clusterip({"status", "--pin", pin(), "--json"});
    EXPECT_EQ(seen.exit_code, fine) << seen.err;
    EXPECT_EQ(jq(".services[]|select(.name == \"far\")|[.engine, .reason]|join(\": \")", seen.out),
              "userspace: no userspace engine carries it now: connects are refused\n");
    EXPECT_THAT(clusterip({"resolve", fmt::format("{}:{}", far.vip, vip_port), "--pin", pin()}).out,
                HasSubstr("service far, engine userspace: which does not carry it now: a connect() is refused"));
  }
  RunningService service(made);
  EXPECT_EQ(ask(far.vip, vip_port), answered_by("one"));
}

TEST_F(RunEngine, FastPathThatWasLeftGoesWhenTheProxyIsForced) {
  {
    RunningService(files(proxy_toml({local({backend(one_)})}))).terminate();
  }
  RunningService service(files(proxy_toml({local({backend(two_)})})), {"--engine", "userspace"});
  service.wait_for_log("is detached");
  EXPECT_EQ(ask(local_vip, vip_port), answered_by("two"));
}

TEST_F(RunEngine, SecondServiceIsRefusedInOneLine) {
  const auto made = files(toml({web({backend(one_)})}));
  RunningService service(made);
  const Finished second = clusterip({"run", "--config", made->config()});
  EXPECT_EQ(second.exit_code, failed);
  EXPECT_THAT(second.err, HasSubstr(fmt::format("pid {} serves already", service.pid())));
  const Finished third = clusterip({"run", "--config", made->config(), "--control", made->control() + "2"});
  EXPECT_EQ(third.exit_code, failed);
  EXPECT_THAT(third.err, HasSubstr("another process"));
  EXPECT_FALSE(std::filesystem::exists(made->control() + "2")) << "a socket that nobody listens at";
  EXPECT_EQ(ask(fast_vip, vip_port), answered_by("one"));
}

TEST_F(RunEngine, LoadBesideADaemonSaysWhomTheOtherVerbsAsk) {
  const auto made = files(proxy_toml({local({backend(one_)})}));
  RunningService service(made, {"--engine", "userspace"});
  const Finished loaded = clusterip({"load", "--config", made->config()});
  EXPECT_EQ(loaded.exit_code, fine) << loaded.err;
  EXPECT_THAT(loaded.err, HasSubstr(fmt::format("runs at {}: status, trace and resolve ask it, unless they are given "
                                                "--pin {}",
                                                made->control(), pin())));
  service.terminate();
  EXPECT_EQ(clusterip({"load", "--config", made->config()}).err, "");
}

TEST_F(RunEngine, UnloadOnExitDoesWhatTheFileSays) {
  const auto keep = files(toml({web({backend(one_)})}));
  {
    RunningService service(keep);
    const Finished early = clusterip({"unload", "--on-exit", keep->config()});
    EXPECT_EQ(early.exit_code, fine);
    EXPECT_THAT(early.err, HasSubstr("may leave this machine: " + pin() + " is in use by another process"));
    service.kill();
  }
  const Finished unloaded = clusterip({"unload", "--on-exit", keep->config()});
  EXPECT_EQ(unloaded.exit_code, fine);
  EXPECT_EQ(unloaded.err, "");
  EXPECT_EQ(ask(fast_vip, vip_port), answered_by("one"));
  const Finished unread = clusterip({"unload", "--on-exit", "/nonexistent.toml"});
  EXPECT_EQ(unread.exit_code, fine);
  EXPECT_THAT(unread.out, HasSubstr("the fast path and local routes stay as they are"));
  EXPECT_EQ(ask(fast_vip, vip_port), answered_by("one"));
  const auto detach = files(toml({web({backend(one_)})}), "on_exit = \"detach\"\n");
  EXPECT_EQ(clusterip({"unload", "--on-exit", detach->config()}).exit_code, fine);
  EXPECT_NE(ask(fast_vip, vip_port).error, 0);
}

}  // namespace
