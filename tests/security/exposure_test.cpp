// SPDX-License-Identifier: BSD-2-Clause
//
// What others on the host can reach: pins, sockets, metrics.
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <regex>
#include <set>
#include <sstream>

#include "tests/run/running.h"

namespace {

using namespace support;
namespace fs = std::filesystem;

constexpr uid_t nobody = 65534;

class Exposure : public Running {
 protected:
  const NamedServer one_{"one"};
};

/// The rights of group and others, with what has them.
std::string shared_rights(const std::string& path) {
  struct stat seen{};
  checked(::lstat(path.c_str(), &seen), path);
  return (seen.st_mode & 077) == 0 && seen.st_uid == 0 ? "" : fmt::format("{} {:o}\n", path, seen.st_mode & 07777);
}

TEST_F(Exposure, PinsAreOfRootAloneWhateverTheUmask) {
  const TemporaryDirectory directory;
  const std::string file = directory.write("services.toml", toml({web({backend(one_)})}));
  Process load({CLUSTERIP_COMMAND, "load", "--config", file, "--cgroup", cgroup().path(), "--pin", pin(), "--plugin",
                CLUSTERIP_PLUGIN_PATH},
               nullptr, [] { ::umask(0); });
  ASSERT_EQ(load.wait().exit_code, fine);
  std::string shared = shared_rights(pin());
  std::size_t count = 0;
  for (const auto& entry : fs::recursive_directory_iterator(pin())) {
    shared += shared_rights(entry.path());
    ++count;
  }
  EXPECT_EQ(shared, "");
  EXPECT_GT(count, 10U) << "programs, links and maps";
}

TEST_F(Exposure, ControlSocketIsOfItsUserAloneWhateverTheUmask) {
  RunningService service(files(toml({web({backend(one_)})})), {}, [] { ::umask(0); });
  EXPECT_EQ(shared_rights(service.files()->control()), "");
  EXPECT_EQ(shared_rights(service.files()->control() + ".lock"), "");
  // Somebody else, who can reach the directory.
  ::chmod(fs::path(service.files()->control()).parent_path().c_str(), 0755);
  Process other(
      {CLUSTERIP_COMMAND, "status", "--control", service.files()->control(), "--plugin", CLUSTERIP_PLUGIN_PATH},
      nullptr, [] {
        if (::setgid(nobody) != 0 || ::setuid(nobody) != 0) ::_exit(99);
      });
  const Finished asked = other.wait();
  EXPECT_EQ(asked.exit_code, cannot) << asked.out;
  EXPECT_THAT(asked.err, testing::HasSubstr("Permission denied"));
}

/// The addresses on which something listens here, TCP and UDP.
std::set<std::string> listeners() {
  const Finished shown = run({"ss", "-H", "-t", "-u", "-l", "-n"});
  require(shown.exit_code == 0, shown.err);
  std::set<std::string> found;
  std::istringstream lines(shown.out);
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    std::string kind, state, received, sent, address;
    require(static_cast<bool>(words >> kind >> state >> received >> sent >> address), line);
    found.insert(kind + " " + address);
  }
  return found;
}

TEST_F(Exposure, NothingListensButWhatTheFileNames) {
  const auto before = listeners();
  const std::string text = toml({web({backend(one_)})});
  {
    RunningService service(files(text));
    EXPECT_EQ(listeners(), before);
  }
  auto with_metrics = before;
  with_metrics.insert("tcp 127.0.0.1:9464");
  {
    RunningService service(files("[metrics]\nlisten = \"127.0.0.1:9464\"\n" + text));
    EXPECT_EQ(listeners(), with_metrics);
  }
  auto with_vip = before;
  with_vip.insert("tcp 10.96.0.1:80");
  RunningService service(files(proxy_toml({web({backend(one_)})}, {.local_vips = true})), {"--engine", "userspace"});
  EXPECT_EQ(listeners(), with_vip);
}

TEST(ShippedFiles, MetricsAreOnLoopback) {
  const std::regex listen(R"re(listen\s*=\s*"([^"]*)")re");
  ASSERT_TRUE(std::regex_search(read_text(CLUSTERIP_SOURCE_DIR "/config/clusterip.toml"), listen));
  for (const char* file : {"/config/clusterip.toml", "/packaging/clusterip.toml"}) {
    const std::string text = read_text(std::string(CLUSTERIP_SOURCE_DIR) + file);
    for (std::sregex_iterator match(text.begin(), text.end(), listen), end; match != end; ++match)
      EXPECT_EQ((*match)[1], "127.0.0.1:9464") << file;
  }
}

}  // namespace
