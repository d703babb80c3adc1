// SPDX-License-Identifier: BSD-2-Clause
//
// What others on the host can reach: pins, sockets, metrics.
#include <linux/filter.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
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

/// The inodes of pins and directories of the fast path, of which nobody else has any right.
std::map<std::string, ino_t> private_pins(const std::string& directory) {
  std::map<std::string, ino_t> found;
  std::string shared = shared_rights(directory);
  for (const auto& entry : fs::recursive_directory_iterator(directory)) {
    shared += shared_rights(entry.path());
    struct stat seen{};
    checked(::lstat(entry.path().c_str(), &seen), entry.path());
    found[entry.path().filename()] = seen.st_ino;
  }
  EXPECT_EQ(shared, "");
  EXPECT_GT(found.size(), 10U) << "programs, links and maps";
  EXPECT_EQ(found.count("sock4_connect_link"), 1U);
  return found;
}

TEST_F(Exposure, PinsAreOfRootAloneWhateverTheUmask) {
  const TemporaryDirectory directory;
  const auto load = [&](const std::vector<Service>& services) {
    const std::string file = directory.write("services.toml", toml(services));
    Process process({CLUSTERIP_COMMAND, "load", "--config", file, "--cgroup", cgroup().path(), "--pin", pin(),
                     "--plugin", CLUSTERIP_PLUGIN_PATH},
                    nullptr, [] { ::umask(0); });
    const Finished finished = process.wait();
    EXPECT_EQ(finished.exit_code, fine) << finished.err;
  };
  std::vector<Service> services = {web({backend(one_)})};
  load(services);
  const auto first = private_pins(pin());
  // More than there is room for: other maps and programs take their places.
  std::ranges::copy(more_services(200, backend(one_)), std::back_inserter(services));
  load(services);
  const auto grown = private_pins(pin());
  EXPECT_NE(grown.at("Slot_Map"), first.at("Slot_Map"));
}

TEST_F(Exposure, PinsOfAServiceAreOfRootAloneWhateverTheUmask) {
  RunningService service(files(toml({web({backend(one_)})})), {}, [] { ::umask(0); });
  const auto first = private_pins(pin());
  std::vector<Service> services = more_services(200, backend(one_));
  services.push_back(web({backend(one_)}));
  EXPECT_THAT(service.reload(toml(services)), testing::HasSubstr("serving 201"));
  EXPECT_NE(private_pins(pin()).at("Slot_Map"), first.at("Slot_Map"));
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

TEST_F(Exposure, DirectoryThatIsMadeForTheControlSocketIsWrittenToByItsUserAlone) {
  const auto made = files(toml({web({backend(one_)})}));
  const std::string directory = made->control() + ".d";
  RunningService service(made, {"--control", directory + "/control.sock"}, [] { ::umask(0); });
  struct stat seen{};
  ASSERT_EQ(::lstat(directory.c_str(), &seen), 0);
  EXPECT_EQ(seen.st_uid, 0U);
  EXPECT_EQ(seen.st_mode, S_IFDIR | 0755U);
}

/// Of whom nothing is needed for the rest: user 65534, as whom a child goes on.
void become_nobody() {
  checked(::setgid(nobody), "setgid");
  checked(::setuid(nobody), "setuid");
}

int open_by_id(bpf_cmd command, std::uint32_t id) {
  bpf_attr attr{};
  attr.map_id = id;
  return bpf(command, attr);
}

int open_pin(const std::string& path) {
  bpf_attr attr{};
  attr.pathname = reinterpret_cast<std::uint64_t>(path.c_str());
  return bpf(BPF_OBJ_GET, attr);
}

/// Throws unless the last system call has failed with this.
void require_failure(int result, int error, const std::string& what) {
  require(result < 0 && errno == error, fmt::format("{}: {} {}", what, result, std::strerror(errno)));
}

TEST_F(Exposure, AProcessInTheCgroupSeesNoMapAndNoProgram) {
  const Handle handle = serve(toml({web({backend(one_)})}), pinned());
  const BpfObjects objects = objects_of(cgroup());
  ASSERT_FALSE(objects.maps.empty());
  const auto by_id = [&objects] {
    for (const auto id : objects.maps) require_failure(open_by_id(BPF_MAP_GET_FD_BY_ID, id), EPERM, "a map");
    for (const auto id : objects.programs) require_failure(open_by_id(BPF_PROG_GET_FD_BY_ID, id), EPERM, "a program");
    for (const auto id : objects.links) require_failure(open_by_id(BPF_LINK_GET_FD_BY_ID, id), EPERM, "a link");
  };
  // Opened by whoever may, so that it is not for another reason that it cannot be.
  EXPECT_EQ(in_child([&] { checked(open_by_id(BPF_MAP_GET_FD_BY_ID, *objects.maps.begin()), "a map"); }), "");
  EXPECT_EQ(in_child([&] { checked(open_pin(pin() + "/Slot_Map"), "a pin"); }), "");
  EXPECT_EQ(in_child([&] {
              become_nobody();
              require(ask(fast_vip, vip_port) == answered_by("one"), "what the cgroup is for");
              require_failure(open_pin(pin() + "/Slot_Map"), EACCES, "a pin");
              by_id();
            }),
            "");
  EXPECT_EQ(in_child([&] {  // a container's root, which has no BPF filesystem either
              drop_capabilities();
              by_id();
            }),
            "");
}

TEST_F(Exposure, AForkedChildHasNoMemoryOfTheMaps) {
  const Handle handle = serve(toml({web({backend(one_)})}));
  ASSERT_TRUE(is_mapped("bpf-map"));
  EXPECT_EQ(in_child([] { require(!is_mapped("bpf-map"), "inherited"); }), "");
}

/// Fills what the kernel allows a socket to hold beside its buffers, by a filter that takes all packets.
void use_up_option_memory(int fd) {
  // What is not reached costs nothing but its room; the first kind takes more of it, the second fills the rest.
  const sock_filter take_all = {BPF_RET | BPF_K, 0, 0, 0xffffffff};
  const sock_filter large = {BPF_LDX | BPF_B | BPF_MSH, 0, 0, 0};
  const auto fits = [&](std::size_t larges, std::size_t smalls) {
    std::vector<sock_filter> filter = {take_all};
    filter.insert(filter.end(), larges, large);
    filter.insert(filter.end(), smalls + 1, take_all);
    const sock_fprog program{static_cast<unsigned short>(filter.size()), filter.data()};
    constexpr int unused = 0;
    ::setsockopt(fd, SOL_SOCKET, SO_DETACH_FILTER, &unused, sizeof unused);
    return ::setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof program) == 0;
  };
  constexpr std::size_t most = BPF_MAXINSNS - 16;
  const auto largest = [](std::size_t bound, const auto& does_fit) {
    std::size_t low = 0;
    for (std::size_t high = bound; low < high;) {
      const std::size_t middle = (low + high + 1) / 2;
      if (does_fit(middle)) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  };
  const std::size_t larges = largest(most, [&](std::size_t count) { return fits(count, 0); });
  require(larges > 0 && larges < most, "a filter that is as large as net.core.optmem_max");
  const std::size_t smalls = largest(14, [&](std::size_t count) { return fits(larges, count); });
  require(fits(larges, smalls), "the largest filter");
}

TEST_F(Exposure, ASocketWithoutOptionMemoryLosesItsNameAndNoOtherDoes) {
  const Handle handle = serve(toml({web({backend(one_)})}));
  const std::string name = fmt::format("{}:{}", fast_vip, vip_port);
  const Fd before = tcp_socket(), used_up = tcp_socket();
  ASSERT_EQ(connect_errno(before.get(), fast_vip, vip_port), 0);
  use_up_option_memory(used_up.get());
  ASSERT_EQ(connect_errno(used_up.get(), fast_vip, vip_port), 0);
  EXPECT_EQ(peer_of(used_up.get()), fmt::format("127.0.0.1:{}", one_.port()));
  EXPECT_EQ(read_answer(used_up.get()), answered_by("one"));
  const Fd after = tcp_socket();
  ASSERT_EQ(connect_errno(after.get(), fast_vip, vip_port), 0);
  EXPECT_EQ(peer_of(after.get()), name);
  EXPECT_EQ(peer_of(before.get()), name);
}

TEST_F(Exposure, EightWhoAskForMetricsAndDoNotReadKeepOthersFromThem) {
  std::vector<Service> services = more_services(100, backend(one_));
  services.push_back(web({backend(one_)}));
  RunningService service(files("[metrics]\nlisten = \"127.0.0.1:9464\"\n" + toml(services)));
  const auto scrape = [] {
    return run({"curl", "-s", "-o", "/dev/null", "--max-time", "20", "http://127.0.0.1:9464/metrics"}).exit_code;
  };
  // "serving" is in the log a moment before there are metrics.
  ASSERT_TRUE(eventually([&] { return scrape() == 0; }));
  // So that the kernel does not take an answer for who does not read it.
  std::ofstream("/proc/sys/net/ipv4/tcp_wmem") << "4096 4096 4096\n";
  std::vector<Fd> askers;
  // Whether an answer has begun; there is one place fewer while the end of the scrape is not seen.
  const auto ask_and_do_not_read = [&askers] {
    Fd asker = tcp_socket();
    constexpr int small = 1;
    checked(::setsockopt(asker.get(), SOL_SOCKET, SO_RCVBUF, &small, sizeof small), "SO_RCVBUF");
    constexpr std::string_view request = "GET /metrics HTTP/1.1\r\nHost: test\r\n\r\n";
    char first = 0;
    if (connect_errno(asker.get(), "127.0.0.1", 9464) != 0 ||
        ::send(asker.get(), request.data(), request.size(), MSG_NOSIGNAL) < 0 || ::recv(asker.get(), &first, 1, 0) != 1)
      return false;
    askers.push_back(std::move(asker));
    return true;
  };
  for (int i = 0; i < 8; ++i) ASSERT_TRUE(eventually(ask_and_do_not_read)) << i;
  constexpr int no_answer = 52, reset = 56;
  EXPECT_THAT(scrape(), testing::AnyOf(no_answer, reset));
  EXPECT_EQ(ask(fast_vip, vip_port), answered_by("one"));
  askers.pop_back();
  EXPECT_TRUE(eventually([&] { return scrape() == 0; }));
}

/// Where something listens here, TCP and UDP, and the names of sockets of this machine alone, "@" being abstract ones.
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
  // Of all states: one that nobody listens at is a name that others may meet, too.
  const Finished local = run({"ss", "-H", "-x", "-a", "-n"});
  require(local.exit_code == 0, local.err);
  std::istringstream names(local.out);
  for (std::string line; std::getline(names, line);) {
    std::istringstream words(line);
    std::string kind, state, received, sent, address;
    require(static_cast<bool>(words >> kind >> state >> received >> sent >> address), line);
    if (address != "*") found.insert("unix " + address);
  }
  return found;
}

TEST_F(Exposure, NothingListensButWhatTheFileNames) {
  const auto before = listeners();
  const std::string text = toml({web({backend(one_)})});
  const auto expected = [&before](const FallbackProxy& service, const std::set<std::string>& more = {}) {
    std::set<std::string> all = before;
    all.insert("unix " + service.files()->control());
    all.insert("unix @clusterip/local_vips");
    all.insert(more.begin(), more.end());
    return all;
  };
  // "serving" is in the log a moment before all of them are there; its status is answered after that.
  const auto listeners_of = [](const FallbackProxy& service) {
    status(*service.files());
    return listeners();
  };
  {
    RunningService service(files(text));
    EXPECT_EQ(listeners_of(service), expected(service));
  }
  {
    RunningService service(files("[metrics]\nlisten = \"127.0.0.1:9464\"\n" + text));
    EXPECT_EQ(listeners_of(service), expected(service, {"tcp 127.0.0.1:9464"}));
  }
  RunningService service(files(proxy_toml({web({backend(one_)})}, {.local_vips = true})), {"--engine", "userspace"});
  EXPECT_EQ(listeners_of(service), expected(service, {"tcp 10.96.0.1:80"}));
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
