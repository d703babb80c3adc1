// SPDX-License-Identifier: BSD-2-Clause
//
// `clusterip status`, of a running service and of what is pinned.
#include <sys/stat.h>

#include <algorithm>
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
