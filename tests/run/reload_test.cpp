// SPDX-License-Identifier: BSD-2-Clause
//
// Reloads: by SIGHUP and by watch, all or nothing, told as a difference.
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "tests/run/running.h"

namespace {

using namespace support;
using testing::HasSubstr;
namespace fs = std::filesystem;

class RunReload : public Running {
 protected:
  const NamedServer one_{"one"};
  const NamedServer two_{"two"};
};

TEST_F(RunReload, TellsWhatChanges) {
  RunningService service(files(toml({web({backend(one_)})})));
  service.files()->write(
      toml({web({backend(two_)}, "policy = \"round_robin\"\n"), {"new", "10.96.0.2", 80, {backend(one_)}}}));
  service.signal(SIGHUP);
  EXPECT_THAT(
      service.wait_for_log("reloaded: "),
      HasSubstr(fmt::format("reloaded: 1 service added (new), 1 changed (web: policy, + 127.0.0.1:{}, - 127.0.0.1:{})",
                            two_.port(), one_.port())));
  EXPECT_EQ(ask(fast_vip, vip_port), answered_by("two"));
  EXPECT_EQ(ask("10.96.0.2", 80), answered_by("one"));
  service.files()->write(toml({web({backend(two_)}, "policy = \"round_robin\"\n")}));
  service.signal(SIGHUP);
  EXPECT_THAT(service.wait_for_log("reloaded: "), HasSubstr("reloaded: 1 service removed (new)"));
  service.files()->write(toml({web({backend(two_, 7)}, "policy = \"round_robin\"\n")}));
  service.signal(SIGHUP);
  EXPECT_THAT(service.wait_for_log("reloaded: "),
              HasSubstr(fmt::format("1 service changed (web: 127.0.0.1:{} weight 1 -> 7)", two_.port())));
}

TEST_F(RunReload, MistakeChangesNothingOnEitherEngine) {
  const std::string good = proxy_toml({web({backend(one_)}), proxied({backend(one_)})});
  RunningService service(files(good));
  const auto is_served = [&] {
    EXPECT_EQ(ask(fast_vip, vip_port), answered_by("one"));
    EXPECT_EQ(ask(proxied_vip, vip_port), answered_by("one"));
  };
  EXPECT_THAT(service.reload(proxy_toml({web({backend(two_)}), proxied({backend(two_)}, "polcy = 1\n")})),
              HasSubstr("did you mean \"policy\"?"));
  is_served();
  auto seen = status(*service.files());
  EXPECT_FALSE(seen.at("last_reload_good").as_bool());
  EXPECT_EQ(seen.at("failed_reloads").to_number<int>(), 1);

  // What only the kernel's maps refuse: more services than may be.
  Limits small;
  small.services = 1;
  service.reload(proxy_toml({web({backend(two_)}), proxied({backend(two_)})}, {}, small));
  is_served();

  const std::string config = service.files()->config();
  fs::remove(config);
  service.signal(SIGHUP);
  EXPECT_THAT(service.wait_for_log("goes on serving"), HasSubstr("No such file"));
  fs::create_directory(config);
  service.signal(SIGHUP);
  EXPECT_THAT(service.wait_for_log("goes on serving"), HasSubstr("Is a directory"));
  fs::remove(config);
  is_served();
  service.reload(good);
  seen = status(*service.files());
  EXPECT_TRUE(seen.at("last_reload_good").as_bool());
  EXPECT_EQ(seen.at("failed_reloads").to_number<int>(), 4);
  EXPECT_EQ(seen.at("reloads").to_number<int>(), 1);
}

TEST_F(RunReload, WhatTheFastPathRefusesIsServedByNeitherEngine) {
  RunningService service(files(proxy_toml({web({backend(one_)}), proxied({backend(one_)})})));
  fs::remove_all(pin());  // new maps cannot be pinned
  auto services = more_services(300, backend(two_));
  services.push_back(web({backend(two_)}));
  services.push_back(proxied({backend(two_)}));
  services.push_back({"new", "127.0.1.9", vip_port, {backend(two_)}, "refuse", "engine = \"userspace\"\n"});
  Limits limits;
  limits.services = 1024;
  EXPECT_THAT(service.reload(proxy_toml(services, {}, limits)), HasSubstr("goes on serving"));
  EXPECT_EQ(ask(fast_vip, vip_port), answered_by("one"));
  EXPECT_EQ(ask(proxied_vip, vip_port), answered_by("one"));
  EXPECT_TRUE(eventually([] { return ask("127.0.1.9", vip_port) == refused_with(ECONNREFUSED); }));
}

TEST_F(RunReload, ServiceMovesBetweenTheEnginesWithoutAFailedConnect) {
  const Service by_kernel{"moving", "127.0.1.4", 80, {backend(one_)}};
  Service by_proxy = by_kernel;
  by_proxy.more = "engine = \"userspace\"\n";
  RunningService service(files(proxy_toml({by_kernel})));
  Asker asker("127.0.1.4", 80);
  for (int i = 0; i < 5; ++i) {
    service.reload(proxy_toml({by_proxy}));
    asker.wait_for(5);
    EXPECT_EQ(text_of(service_of(status(*service.files()), "moving").at("engine")), "userspace");
    service.reload(proxy_toml({by_kernel}));
    asker.wait_for(5);
    EXPECT_EQ(text_of(service_of(status(*service.files()), "moving").at("engine")), "bpf");
  }
  EXPECT_THAT(asker.stop(), testing::ElementsAre(testing::Pair("one", testing::Ge(50u))));
}

TEST_F(RunReload, WhatTakesEffectAtTheNextStartIsTold) {
  const auto made = files(toml({web({backend(one_)})}));
  RunningService service(made);
  std::ofstream(made->config()) << "[engine]\ncontrol = \"/run/elsewhere.sock\"\ncgroup = \"" << cgroup().path()
                                << "\"\npin = \"" << pin() << "\"\n"
                                << toml({web({backend(two_)})});
  service.signal(SIGHUP);
  EXPECT_THAT(service.wait_for_log("takes effect"), HasSubstr("engine.control: takes effect at the next start"));
  EXPECT_EQ(ask(fast_vip, vip_port), answered_by("two"));
  const auto reload = [&](int so_many) {
    service.signal(SIGHUP);
    EXPECT_TRUE(eventually([&] { return status(*made).at("reloads").to_number<int>() == so_many; }));
  };
  reload(2);  // still not in effect
  made->write(toml({web({backend(one_)})}));
  reload(3);  // what is in effect
  const std::string log = service.terminate().err;
  std::size_t told = 0;
  for (auto at = log.find("takes effect"); at != std::string::npos; at = log.find("takes effect", at + 1)) ++told;
  EXPECT_EQ(told, 2u) << log;
}

class RunWatch : public RunReload {
 protected:
  static constexpr const char* watch = "watch = true\n";

  /// Replaces the file as editors do: another one is renamed over it.
  static void rename_over(const std::string& file, const std::string& text) {
    std::ofstream(file + ".new") << text;
    fs::rename(file + ".new", file);
  }

  /// The whole text that Files would write.
  std::string whole(const FallbackProxy::Files& of, const std::string& services) const {
    of.write(services);
    return read_text(of.config());
  }
};

TEST_F(RunWatch, FileThatIsWrittenOrReplacedIsReadAgain) {
  const auto made = files(toml({web({backend(one_)})}), watch);
  RunningService service(made);
  made->write(toml({web({backend(two_)})}));  // in place
  service.wait_for_log("reloaded: ");
  EXPECT_EQ(ask(fast_vip, vip_port), answered_by("two"));

  const auto other = files(toml({}), watch);
  std::string text = whole(*other, toml({web({backend(one_)})}));
  text.replace(text.find(other->control()), other->control().size(), made->control());
  rename_over(made->config(), text);
  service.wait_for_log("reloaded: ");
  EXPECT_EQ(ask(fast_vip, vip_port), answered_by("one"));
}

TEST_F(RunWatch, MistakeIsToldOnceAndTheNextGoodFileServes) {
  const auto made = files(toml({web({backend(one_)})}), watch);
  RunningService service(made);
  made->write("[[service]]\nname = \"half");  // as if it was being written
  service.wait_for_log("goes on serving");
  EXPECT_EQ(ask(fast_vip, vip_port), answered_by("one"));
  fs::remove(made->config());
  made->write(toml({web({backend(two_)})}));
  service.wait_for_log("reloaded: ");
  EXPECT_EQ(ask(fast_vip, vip_port), answered_by("two"));
  EXPECT_EQ(status(*made).at("failed_reloads").to_number<int>(), 1);
}

TEST_F(RunWatch, WhoPutsBackWhatServesHasMendedIt) {
  const auto made = files(toml({web({backend(one_)})}), watch);
  const std::string good = read_text(made->config());
  RunningService service(made);
  for (const int failed : {1, 2}) {
    rename_over(made->config(), "[[service]]\nname = 7\n");
    service.wait_for_log("goes on serving");
    rename_over(made->config(), good);
    service.wait_for_log("reloaded: no service has changed");
    const auto seen = status(*made);
    EXPECT_TRUE(seen.at("last_reload_good").as_bool());
    EXPECT_EQ(seen.at("failed_reloads").to_number<int>(), failed) << "the same mistake is told again";
  }
}

TEST_F(RunWatch, ConfigMapThatSwapsItsLinkIsReadAgain) {
  // As the kubelet writes them: clusterip.toml -> ..data/clusterip.toml, ..data -> a directory of this version.
  const TemporaryDirectory volume;
  const auto made = files(toml({web({backend(one_)})}), watch);
  const auto version = [&](const char* name, const std::string& services) {
    fs::create_directory(volume.path() + "/" + name);
    std::ofstream(volume.path() + "/" + name + "/clusterip.toml") << whole(*made, services);
  };
  const auto point_to = [&](const char* name) {
    fs::create_directory_symlink(name, volume.path() + "/..data_tmp");
    fs::rename(volume.path() + "/..data_tmp", volume.path() + "/..data");
  };
  version("..2026_1", toml({web({backend(one_)})}));
  point_to("..2026_1");
  fs::create_symlink("..data/clusterip.toml", volume.path() + "/clusterip.toml");
  Process service(
      {CLUSTERIP_COMMAND, "run", "--plugin", CLUSTERIP_PLUGIN_PATH, "--config", volume.path() + "/clusterip.toml"});
  service.wait_for_error("serving");
  for (const auto& [name, server] : {std::pair("..2026_2", &two_), std::pair("..2026_3", &one_)}) {
    version(name, toml({web({backend(*server)})}));
    point_to(name);
    service.wait_for_error("reloaded: ");
    EXPECT_EQ(ask(fast_vip, vip_port), answered_by(server->name()));
  }
}

}  // namespace
