// SPDX-License-Identifier: BSD-2-Clause
//
// The host changes under a running service: what it stands on is taken away, or the clock jumps.
#include <signal.h>
#include <sys/mount.h>

#include <cstdlib>
#include <ctime>
#include <filesystem>

#include "tests/run/running.h"

namespace {

using namespace support;
using testing::HasSubstr;

class HostFault : public Running {
 protected:
  const NamedServer one_{"one"};
  const NamedServer two_{"two"};
};

TEST_F(HostFault, BpfFilesystemThatIsUnmountedIsToldAndServesOn) {
  RunningService service(files(toml({web({backend(one_)})})));
  ASSERT_EQ(::umount2(bpffs, MNT_DETACH), 0);
  EXPECT_EQ(ask(fast_vip, vip_port), answered_by("one"));
  EXPECT_TRUE(
      eventually([&] { return clusterip({"status", "--control", service.files()->control()}).exit_code == failed; }));
  EXPECT_THAT(service.wait_for_log("the canary failed: "), HasSubstr(pin()));
  service.reload(toml({web({backend(two_)})}));
  EXPECT_EQ(ask(fast_vip, vip_port), answered_by("two")) << "the maps are this process's still";
  EXPECT_EQ(service.terminate().exit_code, fine);
  ASSERT_EQ(::mount("bpf", bpffs, "bpf", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=0700"), 0);
}

TEST_F(HostFault, ReloadThatMustPinWithoutTheBpfFilesystemIsToldAndTheOldServesOn) {
  RunningService service(files(toml({web({backend(one_)})})));
  auto services = more_services(300, backend(two_));  // than the maps have room for
  services.push_back(web({backend(two_)}));
  const std::string next = toml(services, {1024, 4096});
  ASSERT_EQ(::umount2(bpffs, MNT_DETACH), 0);
  const std::string told = service.reload(next);
  EXPECT_THAT(told, testing::ContainsRegex(" error: .*" + pin() + ".*: the configuration that serves goes on serving"));
  const auto of_the_canary = told.find(" error: the canary failed: ");  // it may have looked before
  EXPECT_TRUE(told.find(" error: ") == told.rfind(" error: ") || told.find(" error: ") == of_the_canary) << told;
  EXPECT_EQ(ask(fast_vip, vip_port), answered_by("one"));
  EXPECT_EQ(ask("10.98.0.1", 80), refused_with(ENETUNREACH));
  // Another one is not the one that it has pinned to.
  ASSERT_EQ(::mount("bpf", bpffs, "bpf", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=0700"), 0);
  EXPECT_THAT(service.reload(next), HasSubstr("restart this process: the configuration that serves goes on serving"));
  EXPECT_EQ(ask(fast_vip, vip_port), answered_by("one"));
  EXPECT_EQ(service.terminate().exit_code, fine);
  const RunningService restarted(service.files());
  EXPECT_EQ(ask(fast_vip, vip_port), answered_by("two"));
  EXPECT_EQ(ask("10.98.0.1", 80), answered_by("two"));
}

TEST_F(HostFault, CgroupThatIsRemovedIsToldAndItsSuccessorServed) {
  const std::string below = cgroup().path() + "/below";
  std::filesystem::create_directory(below);
  auto made = std::make_shared<FallbackProxy::Files>(fmt::format("cgroup = \"{}\"\npin = \"{}\"\n", below, pin()));
  made->write(toml({web({backend(one_)})}));
  RunningService service(made);
  const auto remove = [&] {
    std::error_code is_busy;  // the canary's process has ended, but may be in it still
    return std::filesystem::remove(below, is_busy);
  };
  EXPECT_TRUE(eventually(remove));
  const auto status = [&] { return clusterip({"status", "--control", made->control()}); };
  // Looks that come within a second share what one canary has seen.
  EXPECT_TRUE(eventually([&] { return status().exit_code == failed; }));
  EXPECT_THAT(service.wait_for_log("the canary failed: "), HasSubstr(below));
  std::filesystem::create_directory(below);
  EXPECT_TRUE(eventually([&] { return status().exit_code == fine; }));
  service.terminate();
  clusterip({"unload", "--pin", pin()});
  EXPECT_TRUE(eventually(remove));
}

TEST_F(HostFault, ClockThatJumpsChangesNothing) {
  const TemporaryDirectory directory;
  for (const char* seconds : {"86400", "-86400"}) {
    SCOPED_TRACE(seconds);
    const std::string jump = directory.path() + "/jump";
    const std::string keys =
        "affinity = \"1h\"\nhealth = { interval = \"100ms\", timeout = \"100ms\", rise = 1, fall = 1 }\n";
    RunningService service(
        files(proxy_toml({web({backend(one_), backend(two_)}, keys), proxied({backend(one_), backend(two_)}, keys)})),
        {}, [&] {
          ::setenv("LD_PRELOAD", CLUSTERIP_FAULT_INJECTOR, 1);
          ::setenv("CLUSTERIP_CLOCK", fmt::format("{} {} {}", jump, seconds, CLOCK_REALTIME).c_str(), 1);
        });
    const std::string by_kernel = ask(fast_vip, vip_port).text;
    const std::string by_proxy = ask(proxied_vip, vip_port).text;
    directory.write("jump", "");
    for (int i = 0; i < 50; ++i) {
      ASSERT_EQ(ask(fast_vip, vip_port), answered_by(by_kernel));
      ASSERT_EQ(ask(proxied_vip, vip_port), answered_by(by_proxy));
    }
    for (const char* name : {"web", "proxied"}) {
      const auto seen = status(*service.files());
      for (const auto& backend : service_of(seen, name).at("backends").as_array())
        EXPECT_EQ(text_of(backend.at("state")), "active") << name;
    }
    const Finished finished = service.terminate();
    EXPECT_EQ(finished.exit_code, fine);
    EXPECT_THAT(finished.err, testing::Not(HasSubstr("down")));
    EXPECT_TRUE(std::filesystem::remove(jump + ".shifted")) << "no clock was shifted";
    std::filesystem::remove(jump);
  }
}

// It does not on a machine that is as it should be, but may where a machine is stopped, moved, and goes on.
TEST_F(HostFault, MonotonicClockThatJumpsFailsNoConnection) {
  const TemporaryDirectory directory;
  for (const char* seconds : {"3600", "-3600"}) {
    SCOPED_TRACE(seconds);
    const std::string jump = directory.path() + "/jump";
    const std::string keys = "affinity = \"1h\"\n";
    RunningService service(
        files(proxy_toml({web({backend(one_), backend(two_)}, keys), proxied({backend(one_), backend(two_)}, keys)})),
        {}, [&] {
          ::setenv("LD_PRELOAD", CLUSTERIP_FAULT_INJECTOR, 1);
          ::setenv("CLUSTERIP_CLOCK", fmt::format("{} {} {}", jump, seconds, CLOCK_MONOTONIC).c_str(), 1);
        });
    ASSERT_EQ(ask(fast_vip, vip_port).error, 0);
    ASSERT_EQ(ask(proxied_vip, vip_port).error, 0);
    directory.write("jump", "");
    for (int i = 0; i < 50; ++i) {
      ASSERT_EQ(ask(fast_vip, vip_port).error, 0);
      ASSERT_EQ(ask(proxied_vip, vip_port).error, 0);
    }
    service.reload(proxy_toml({web({backend(two_)}), proxied({backend(two_)})}));
    EXPECT_EQ(ask(fast_vip, vip_port), answered_by("two"));
    EXPECT_EQ(ask(proxied_vip, vip_port), answered_by("two"));
    EXPECT_EQ(service.terminate().exit_code, fine);
    EXPECT_TRUE(std::filesystem::remove(jump + ".shifted")) << "no clock was shifted";
    std::filesystem::remove(jump);
  }
}

}  // namespace
