// SPDX-License-Identifier: BSD-2-Clause
//
// `clusterip status`, of a running service and of what is pinned.
#include <sys/stat.h>

#include <algorithm>
#include <filesystem>
#include <sstream>

#include "tests/run/running.h"

namespace {

using namespace support;
using testing::HasSubstr;

class RunStatus : public Running {
 protected:
  const NamedServer one_{"one"};
};

/// Lines of a table whose title begins with `title`, with it.
std::vector<std::string> table(const std::string& text, const std::string& title) {
  std::istringstream lines(text.substr(std::min(text.find(title), text.size())));
  std::vector<std::string> found;
  for (std::string line; std::getline(lines, line) && !line.empty();) found.push_back(line);
  return found;
}

TEST_F(RunStatus, ShowsBothEnginesInAlignedTables) {
  RunningService service(files(proxy_toml({web({backend(one_)}), proxied({backend(one_)})})));
  EXPECT_EQ(ask(fast_vip, vip_port), answered_by("one"));
  const Finished shown = clusterip({"status", "--control", service.files()->control()});
  EXPECT_EQ(shown.exit_code, fine) << shown.err;
  EXPECT_THAT(shown.out, HasSubstr(fmt::format("pid {}", service.pid())));
  EXPECT_THAT(shown.out, HasSubstr("canary: rewritten, refused with ECONNREFUSED"));
  const auto rows = table(shown.out, "SERVICE  VIP");
  ASSERT_EQ(rows.size(), 3u) << shown.out;
  const std::size_t engine = rows[0].find("ENGINE");
  EXPECT_EQ(rows[1].substr(engine, 3), "bpf") << shown.out;
  EXPECT_EQ(rows[2].substr(engine, 9), "userspace") << shown.out;
}

TEST_F(RunStatus, RateIsThatSinceTheLastLook) {
  RunningService service(files(toml({web({backend(one_)})})));
  const auto rate = [&] { return service_of(status(*service.files()), "web").at("connects_per_second"); };
  EXPECT_TRUE(rate().is_null());
  EXPECT_EQ(rate().to_number<double>(), 0);
  for (int i = 0; i < 10; ++i) EXPECT_EQ(ask(fast_vip, vip_port), answered_by("one"));
  EXPECT_GT(rate().to_number<double>(), 0);
  EXPECT_EQ(rate().to_number<double>(), 0);
}

TEST_F(RunStatus, OfPinsAloneHasTheSameKeys) {
  boost::json::object running;
  {
    RunningService service(files(toml({web({backend(one_)})})));
    running = status(*service.files());
    service.terminate();
  }
  const Finished shown = clusterip({"status", "--pin", pin(), "--json"});
  EXPECT_EQ(shown.exit_code, fine) << shown.err;
  const auto pinned = boost::json::parse(shown.out).as_object();
  const auto keys = [](const boost::json::object& of) {
    std::vector<std::string> list;
    for (const auto& [key, value] : of) list.emplace_back(key);
    return list;
  };
  EXPECT_EQ(keys(pinned), keys(running));
  EXPECT_EQ(keys(service_of(pinned, "web")), keys(service_of(running, "web")));
  EXPECT_TRUE(pinned.at("pid").is_null());
  EXPECT_EQ(text_of(service_of(pinned, "web").at("engine")), "bpf");
}

TEST_F(RunStatus, VerbsLookWhereAConfigurationSays) {
  const auto here = files(toml({web({backend(one_)})}));
  const std::string file = here->config();
  const std::string vip = fmt::format("{}:{}", fast_vip, vip_port);
  {
    RunningService service(here);
    const Finished shown = clusterip({"status", "--config", file, "--json"});
    EXPECT_EQ(text_of(boost::json::parse(shown.out).at("config")), file) << shown.err;
    EXPECT_THAT(clusterip({"resolve", vip, "--config", file}).out,
                HasSubstr(fmt::format("reaches 127.0.0.1:{}", one_.port())));
    service.terminate();
  }
  const Finished of_pins = clusterip({"status", "--config", file, "--json"});
  EXPECT_TRUE(boost::json::parse(of_pins.out).at("config").is_null()) << of_pins.out << of_pins.err;
  EXPECT_THAT(clusterip({"resolve", vip, "--config", file}).out,
              HasSubstr(fmt::format("reaches 127.0.0.1:{}", one_.port())));
  EXPECT_THAT(clusterip({"unload", "--config", file}).out, HasSubstr("detached and removed " + pin()));
  const std::string nothing =
      fmt::format("nobody listens at {}, and nothing is loaded at {}\n", here->control(), pin());
  for (const auto& words : std::vector<std::vector<std::string>>{{"status"}, {"resolve", vip}, {"trace"}}) {
    auto with_config = words;
    with_config.insert(with_config.end(), {"--config", file});
    const Finished refused = clusterip(with_config);
    EXPECT_EQ(refused.exit_code, failed) << words[0];
    EXPECT_EQ(refused.err, "clusterip: " + nothing);
    with_config.insert(with_config.end(), {"--pin", pin()});
    EXPECT_EQ(clusterip(with_config).exit_code, usage) << words[0];
  }
  here->write("[[service]]\nnam = 1\n");
  for (const auto& words : std::vector<std::vector<std::string>>{{"status"}, {"resolve", vip}, {"trace"}, {"unload"}}) {
    auto with_config = words;
    with_config.insert(with_config.end(), {"--config", file});
    const Finished refused = clusterip(with_config);
    EXPECT_EQ(refused.exit_code, configuration) << words[0];
    EXPECT_THAT(refused.err, HasSubstr("clusterip.toml:6:1: service[0]: name: expected a name"));
  }
}

TEST_F(RunStatus, ResolveTellsWhatTheUserspaceEngineCarries) {
  const Backend draining{"127.0.0.1", one_.port(), 1, "drain"};
  const auto resolve = [](const FallbackProxy::Files& files, const std::string& asked) {
    const Finished resolved = clusterip({"resolve", asked, "--control", files.control()});
    EXPECT_EQ(resolved.exit_code, fine) << resolved.err;
    return resolved.out;
  };
  {
    RunningService service(files(toml({web({backend(one_)}), proxied({backend(one_)})})));
    EXPECT_THAT(resolve(*service.files(), "127.0.1.2:80"),
                HasSubstr("service proxied, engine userspace: the kernel leaves a connect() as it is, the userspace "
                          "engine accepts it and chooses the only active backend"));
    EXPECT_THAT(resolve(*service.files(), "10.96.0.1:80"), HasSubstr("service web, engine bpf: a connect() reaches"));
    EXPECT_THAT(resolve(*service.files(), "127.0.1.3:80"), HasSubstr("not ours"));
    EXPECT_THAT(resolve(*service.files(), "[::ffff:127.0.1.2]:80"), HasSubstr("service proxied, engine userspace"));
    const Finished json = clusterip({"resolve", "127.0.1.2:80", "--control", service.files()->control(), "--json"});
    EXPECT_EQ(jq("[.verdict, .service, .engine, .active_backends]|join(\" \")", json.out),
              "pass proxied userspace 1\n");
    service.reload(toml({proxied({draining})}));
    EXPECT_THAT(resolve(*service.files(), "127.0.1.2:80"), HasSubstr("no backend takes connections"));
  }
  RunningService all(files(proxy_toml({proxied({backend(one_)})}), "mode = \"userspace\"\n"));
  EXPECT_THAT(resolve(*all.files(), "127.0.1.2:80"), HasSubstr("engine userspace"));
  EXPECT_THAT(resolve(*all.files(), "10.96.0.1:80"), HasSubstr("not ours"));
}

TEST_F(RunStatus, ResolveTellsThatThePinsAreGone) {
  RunningService service(files(toml({web({backend(one_)})})));
  std::filesystem::remove_all(pin());
  const Finished resolved = clusterip({"resolve", "10.96.0.1:80", "--control", service.files()->control()});
  EXPECT_EQ(resolved.exit_code, failed);
  EXPECT_THAT(resolved.err, HasSubstr(fmt::format("the daemon (pid {}) serves, but its pins at {} were removed",
                                                  service.pid(), pin())));
}

TEST_F(RunStatus, ControlThatNoSocketCanHaveIsAMisuse) {
  for (const char* verb : {"status", "trace"}) {
    const Finished refused = clusterip({verb, "--control", "/" + std::string(107, 'x')});
    EXPECT_EQ(refused.exit_code, usage);
    EXPECT_THAT(refused.err, HasSubstr("--control: expected"));
  }
}

TEST_F(RunStatus, SaysWhatTheUserspaceEngineIgnores) {
  Service unheard = proxied({backend(one_)}, "mark = 7\n");
  unheard.no_backend = "unreachable";
  RunningService service(files(toml({unheard, web({backend(one_)}, "mark = 7\n")})));
  const std::string log = service.terminate().err;
  EXPECT_THAT(log, HasSubstr("warning: service proxied: mark: the userspace engine marks no socket"));
  EXPECT_THAT(log, HasSubstr("warning: service proxied: no_backend: the userspace engine refuses"));
  EXPECT_THAT(log, Not(HasSubstr("service web: ")));
}

TEST_F(RunStatus, ControlSocketIsForTheUserAlone) {
  RunningService service(files(toml({web({backend(one_)})})));
  struct stat socket{};
  ASSERT_EQ(::stat(service.files()->control().c_str(), &socket), 0);
  EXPECT_EQ(socket.st_mode, S_IFSOCK | 0600u);
}

TEST_F(RunStatus, FallbackProxyShowsItToo) {
  RunningService service(files(proxy_toml({web({backend(one_)}), proxied({backend(one_)})})));
  const Finished shown = run({CLUSTERIP_FALLBACK_PROXY, "--status", "--control", service.files()->control()});
  EXPECT_EQ(shown.exit_code, fine) << shown.err;
  EXPECT_THAT(shown.out, testing::StartsWith("clusterip"));
  EXPECT_THAT(shown.out, testing::ContainsRegex("web +10\\.96\\.0\\.1:80/tcp +random +bpf +0 +0 +-"));
  EXPECT_THAT(shown.out, testing::ContainsRegex("proxied +127\\.0\\.1\\.2:80/tcp +random +yes"));
}

}  // namespace
