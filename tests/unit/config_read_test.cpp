// SPDX-License-Identifier: BSD-2-Clause
#include <fcntl.h>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "config/names.h"
#include "config/read_config.h"

namespace config {
namespace {

using namespace std::chrono_literals;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

using Lines = std::vector<std::string>;

Lines lines_of(const std::vector<Mistake>& mistakes) {
  Lines lines;
  for (const auto& [position, message] : mistakes)
    lines.push_back(fmt::format("{}:{}: {}", position.line, position.column, message));
  return lines;
}

Lines mistakes_of(std::string_view text) {
  const auto config = read_config(text);
  return config ? Lines{} : lines_of(config.error());
}

// A valid service in five lines; what a test adds to it stands on line 6.
std::string service(std::string_view line6) {
  return fmt::format("[[service]]\nname = \"a\"\nvip = \"10.0.0.1\"\nport = 80\n{}\n{}\n",
                     line6.starts_with("backends") ? "" : "backends = []", line6);
}

struct Row {
  std::string text;
  std::string mistake;
};

const Row rows[] = {
    // keys
    {"bogus = 1", "1:1: bogus: unknown key, expected engine, limits, userspace, metrics, kubernetes or service"},
    {"[engine]\ncgruop = 1", "2:1: engine.cgruop: unknown key, did you mean \"cgroup\"?"},
    {"[[services]]\nname = \"a\"", "1:3: services: unknown key, did you mean \"service\"?"},
    {"[limits]\n\"a\\u001b.b\" = 1", "2:1: limits.\"a\\x1b.b\": unknown key, expected services, backends or flows"},
    {service("No-Backend = 1"), "6:1: service \"a\": No-Backend: unknown key, did you mean \"no_backend\"?"},
    {service("vpi = 1"), "6:1: service \"a\": vpi: unknown key, did you mean \"vip\"?"},
    {service("backends = [{ address = \"10.0.0.2\", port = 1, wieght = 2 }]"),
     "6:47: service \"a\": backends[0].wieght: unknown key, did you mean \"weight\"?"},
    {service("backends = [{ addr = \"10.0.0.2\", address = \"10.0.0.2\", port = 1 }]"),
     "6:15: service \"a\": backends[0].addr: unknown key, did you mean \"address\"?"},
    {service("health = { rize = 1 }"), "6:12: service \"a\": health.rize: unknown key, did you mean \"rise\"?"},
    // kubernetes
    {"[kubernetes]\nkubeconfg = \"/a\"", "2:1: kubernetes.kubeconfg: unknown key, did you mean \"kubeconfig\"?"},
    {"[kubernetes]\nkubeconfig = \"a\"", "2:14: kubernetes.kubeconfig: expected an absolute path, got \"a\""},
    {"[kubernetes]\nserver = \"10.0.0.1:6443\"",
     "2:10: kubernetes.server: expected a URL such as \"https://10.0.0.1:6443\", got \"10.0.0.1:6443\""},
    {"[kubernetes]\nkubeconfig = \"/a\"\nserver = \"https://a\"",
     "3:1: kubernetes.server: expected none, as the kubeconfig has it, got \"https://a\""},
    {"[kubernetes]\nserver = \"http://127.0.0.1:8001\"\ntoken_file = \"/a\"",
     "3:1: kubernetes.token_file: expected none, as http:// would send the token in clear, got \"/a\""},
    {"[kubernetes]\ncontext = \"a\"", "2:1: kubernetes.context: expected a kubeconfig that it is of, got \"a\""},
    {"[kubernetes]\nnamespaces = [\"a\", \"b\", \"a\"]",
     "2:1: kubernetes.namespaces: expected each namespace once, got an array"},
    {"[kubernetes]\nnamespaces = [\"a/b\"]",
     "2:15: kubernetes.namespaces[0]: expected a name of 1 to 253 letters, digits and . - _, got \"a/b\""},
    {"[kubernetes]\nselector = \"\"",
     "2:12: kubernetes.selector: expected 1 to 1024 printable ASCII characters, got \"\""},
    {"[kubernetes]\nexternal_ips = 1", "2:16: kubernetes.external_ips: expected true or false, got 1"},
    {"service = [{ name = \"a\", vip = \"10.0.0.1\", port = 1, backends = [] }]\n[kubernetes]",
     "1:12: service[0]: expected a table [[service]], as there is [kubernetes], got a table"},
    // tables
    {"engine = 1", "1:10: engine: expected a table, got 1"},
    {"[[limits]]", "1:1: limits: expected a table, got an array"},
    {"[service]\nname = \"a\"", "1:1: service: expected tables [[service]], got a table"},
    {"service = [ 5 ]", "1:13: service[0]: expected a table [[service]], got 5"},
    {"", "1:1: expected a table such as [[service]], got an empty text"},
    {"# nothing\n", "1:1: expected a table such as [[service]], got an empty text"},
    // required keys
    {"[[service]]\nvip = \"10.0.0.1\"\nport = 80\nbackends = []",
     "1:1: service[0]: name: expected a name of 1 to 159 characters, got nothing"},
    {"[[service]]\nname = \"a\"\nport = 80\nbackends = []",
     "1:1: service \"a\": vip: expected a numeric IPv4 or IPv6 address, got nothing"},
    {"[[service]]\nname = \"a\"\nvip = \"10.0.0.1\"\nbackends = []",
     "1:1: service \"a\": port: expected an integer from 1 to 65535, got nothing"},
    {"[[service]]\nname = \"a\"\nvip = \"10.0.0.1\"\nport = 80",
     "1:1: service \"a\": backends: expected an array of backends, got nothing"},
    {service("backends = [{ port = 1 }]"),
     "6:13: service \"a\": backends[0].address: expected a numeric IPv4 or IPv6 address, got nothing"},
    {service("backends = [{ address = \"10.0.0.2\" }]"),
     "6:13: service \"a\": backends[0].port: expected an integer from 1 to 65535, got nothing"},
    // types
    {"[engine]\nmode = 1", "2:8: engine.mode: expected auto, bpf or userspace, got 1"},
    {"[engine]\ncgroup = false", "2:10: engine.cgroup: expected auto or an absolute path, got false"},
    {"[engine]\npin = 1979-05-27", "2:7: engine.pin: expected an absolute path, got a date or time"},
    {"[engine]\nwatch = \"yes\"", "2:9: engine.watch: expected true or false, got \"yes\""},
    {"[limits]\nservices = 1.5", "2:12: limits.services: expected an integer from 1 to 4194304, got the float 1.5"},
    {"[limits]\nbackends = \"7\"", "2:12: limits.backends: expected an integer from 1 to 4194304, got \"7\""},
    {"[userspace]\nallow_from = \"x\"", "2:14: userspace.allow_from: expected an array of networks, got \"x\""},
    {service("affinity = 3"),
     "6:12: service \"a\": affinity: expected a duration such as \"500ms\", \"2s\", \"1m\" or \"3h\", got 3"},
    {service("health = true"), "6:10: service \"a\": health: expected a table, got true"},
    {service("eject = []"), "6:9: service \"a\": eject: expected a table, got an array"},
    {service("backends = \"10.0.0.2:80\""),
     "6:12: service \"a\": backends: expected an array of backends, got \"10.0.0.2:80\""},
    {service("backends = [ 5 ]"),
     "6:14: service \"a\": backends[0]: expected \"address:port\" or a table with address and port, got 5"},
    // words
    {"[engine]\nmode = \"bfp\"",
     "2:8: engine.mode: expected auto, bpf or userspace, got \"bfp\", did you mean \"bpf\"?"},
    {"[engine]\non_exit = \"stay\"", "2:11: engine.on_exit: expected keep or detach, got \"stay\""},
    {service("no_backend = \"Refuse\""),
     "6:14: service \"a\": no_backend: expected refuse, unreachable or pass, got \"Refuse\", did you mean \"refuse\"?"},
    {service("protocol = \"sctp\""), "6:12: service \"a\": protocol: expected tcp or udp, got \"sctp\""},
    {service("policy = \"ring\""),
     "6:10: service \"a\": policy: expected random, round_robin, least_conn or maglev, got \"ring\""},
    {service("backends = [{ address = \"10.0.0.2\", port = 1, state = \"drained\" }]"),
     "6:55: service \"a\": backends[0].state: expected active or drain, got \"drained\", did you mean \"drain\"?"},
    // paths
    {"[engine]\ncgroup = \"sys/fs\"", "2:10: engine.cgroup: expected auto or an absolute path, got \"sys/fs\""},
    {"[engine]\npin = \"\"", "2:7: engine.pin: expected an absolute path, got \"\""},
    {"[engine]\npin = \"/a\\u0000b\"", "2:7: engine.pin: expected a path without control characters, got \"/a\\x00b\""},
    {"[engine]\ncontrol = \"/" + std::string(107, 'x') + "\"",
     "2:11: engine.control: expected a path of at most 107 bytes, got \"/" + std::string(59, 'x') + "\"..."},
    // durations
    {"[userspace]\nudp_timeout = \"1.5s\"",
     "2:15: userspace.udp_timeout: expected a duration such as \"500ms\", \"2s\", "
     "\"1m\" or \"3h\", got \"1.5s\""},
    {"[userspace]\nudp_timeout = \"-1s\"",
     "2:15: userspace.udp_timeout: expected a duration such as \"500ms\", \"2s\", "
     "\"1m\" or \"3h\", got \"-1s\""},
    {"[userspace]\nudp_timeout = \"2d\"",
     "2:15: userspace.udp_timeout: expected a duration such as \"500ms\", \"2s\", \"1m\" or \"3h\", got \"2d\""},
    {"[userspace]\nudp_timeout = \"0s\"", "2:15: userspace.udp_timeout: expected a duration above zero, got \"0s\""},
    {"[userspace]\nidle_timeout = \"8761h\"",
     "2:16: userspace.idle_timeout: expected a duration of at most a year, \"8760h\", got \"8761h\""},
    {"[userspace]\nidle_timeout = \"99999999999999999999999s\"",
     "2:16: userspace.idle_timeout: expected a duration of at most a year, \"8760h\", got "
     "\"99999999999999999999999s\""},
    // numbers
    {service("mark = 4294967296"),
     "6:8: service \"a\": mark: expected an integer from 0 to 4294967295, got 4294967296"},
    {"[limits]\nbackends = 0", "2:12: limits.backends: expected an integer from 1 to 4194304, got 0"},
    {"[limits]\nservices = 4194305", "2:12: limits.services: expected an integer from 1 to 4194304, got 4194305"},
    {service("backends = [{ address = \"10.0.0.2\", port = 0 }]"),
     "6:44: service \"a\": backends[0].port: expected an integer from 1 to 65535, got 0"},
    {service("backends = [{ address = \"10.0.0.2\", port = 1, weight = 0 }]"),
     "6:56: service \"a\": backends[0].weight: expected an integer from 1 to 65535, got 0"},
    {service("backends = [{ address = \"10.0.0.2\", port = 1, weight = -1 }]"),
     "6:56: service \"a\": backends[0].weight: expected an integer from 1 to 65535, got -1"},
    {service("backends = [{ address = \"10.0.0.2\", port = 1, weight = 65536 }]"),
     "6:56: service \"a\": backends[0].weight: expected an integer from 1 to 65535, got 65536"},
    {"[[service]]\nname = \"a\"\nvip = \"10.0.0.1\"\nport = 65536\nbackends = []",
     "4:8: service \"a\": port: expected an integer from 1 to 65535, got 65536"},
    {"[[service]]\nname = \"a\"\nvip = \"10.0.0.1\"\nport = 0\nbackends = []",
     "4:8: service \"a\": port: expected an integer from 1 to 65535, got 0"},
    // backends as text
    {service("backends = [\"10.0.0.2\"]"),
     "6:13: service \"a\": backends[0]: expected an address and a port such as "
     "\"10.0.0.1:80\" or \"[2001:db8::1]:80\", got \"10.0.0.2\""},
    {service("backends = [\"::2:80\"]"),
     "6:13: service \"a\": backends[0]: expected an address and a port such as "
     "\"10.0.0.1:80\" or \"[2001:db8::1]:80\", got \"::2:80\""},
    {service("backends = [\"10.0.0.2:0\"]"),
     "6:13: service \"a\": backends[0]: expected a port from 1 to 65535 behind the colon, got \"10.0.0.2:0\""},
    {service("backends = [\"10.0.0.2:080\"]"),
     "6:13: service \"a\": backends[0]: expected a port from 1 to 65535 behind the colon, got \"10.0.0.2:080\""},
    {service("backends = [\"10.0.0.2:65536\"]"),
     "6:13: service \"a\": backends[0]: expected a port from 1 to 65535 behind the colon, got \"10.0.0.2:65536\""},
    {service("backends = [\"web.example.org:80\"]"),
     "6:13: service \"a\": backends[0]: expected a numeric IPv4 or IPv6 address, got \"web.example.org:80\""},
    {service("backends = [\"10.0.0.02:80\"]"),
     "6:13: service \"a\": backends[0]: expected a numeric IPv4 or IPv6 address, got \"10.0.0.02:80\""},
    {service("backends = [\"10.0.0.2\\u0000:80\"]"),
     "6:13: service \"a\": backends[0]: expected a numeric IPv4 or IPv6 address, got \"10.0.0.2\\x00:80\""},
    // addresses
    {service("backends = [\"224.0.0.1:80\"]"),
     "6:13: service \"a\": backends[0]: expected a unicast address, not a multicast one, got \"224.0.0.1:80\""},
    {service("backends = [\"0.0.0.0:80\"]"),
     "6:13: service \"a\": backends[0]: expected a unicast address, not the unspecified one, got \"0.0.0.0:80\""},
    {service("backends = [{ address = \"255.255.255.255\", port = 1 }]"),
     "6:25: service \"a\": backends[0].address: expected a unicast address, not the broadcast one, got "
     "\"255.255.255.255\""},
    {"[[service]]\nname = \"a\"\nvip = \"239.1.1.1\"\nport = 80\nbackends = []",
     "3:7: service \"a\": vip: expected a unicast address, not a multicast one, got \"239.1.1.1\""},
    {"[[service]]\nname = \"a\"\nvip = \"::\"\nport = 80\nbackends = []",
     "3:7: service \"a\": vip: expected a unicast address, not the unspecified one, got \"::\""},
    {"[[service]]\nname = \"a\"\nvip = \"ff02::1\"\nport = 80\nbackends = []",
     "3:7: service \"a\": vip: expected a unicast address, not a multicast one, got \"ff02::1\""},
    {"[[service]]\nname = \"a\"\nvip = \"::ffff:10.0.0.1\"\nport = 80\nbackends = []",
     "3:7: service \"a\": vip: expected the IPv4 address itself, \"10.0.0.1\", got \"::ffff:10.0.0.1\""},
    {"[[service]]\nname = \"a\"\nvip = \"fe80::1%lo\"\nport = 80\nbackends = []",
     "3:7: service \"a\": vip: expected an address without a scope, got \"fe80::1%lo\""},
    {"[[service]]\nname = \"a\"\nvip = \"fe80::1\"\nport = 80\nbackends = []",
     "3:7: service \"a\": vip: expected an address that needs no scope, not a link-local one, got \"fe80::1\""},
    {"[[service]]\nname = \"a\"\nvip = \"192.0.0.8\"\nport = 80\nbackends = []",
     "3:7: service \"a\": vip: expected another address, as this one is reserved for the canary, got \"192.0.0.8\""},
    {"[[service]]\nname = \"a\"\nvip = \"10.0.0.1/32\"\nport = 80\nbackends = []",
     "3:7: service \"a\": vip: expected a numeric IPv4 or IPv6 address, got \"10.0.0.1/32\""},
    {"[userspace]\nallow_from = [ \"10.0.0.0\" ]",
     "2:16: userspace.allow_from[0]: expected a network such as \"10.244.0.0/16\", got \"10.0.0.0\""},
    {"[userspace]\nallow_from = [ \"10.0.0.0/33\" ]",
     "2:16: userspace.allow_from[0]: expected a prefix length from 0 to 32 behind the slash, got \"10.0.0.0/33\""},
    {"[metrics]\nlisten = \"9464\"",
     "2:10: metrics.listen: expected an address and a port such as \"10.0.0.1:80\" or "
     "\"[2001:db8::1]:80\", got \"9464\""},
    // names
    {"[[service]]\nname = \"\"\nvip = \"10.0.0.1\"\nport = 80\nbackends = []",
     "2:8: service[0]: name: expected a name of 1 to 159 characters, got \"\""},
    {"[[service]]\nname = \"" + std::string(160, 'n') + "\"\nvip = \"10.0.0.1\"\nport = 80\nbackends = []",
     "2:8: service[0]: name: expected a name of 1 to 159 characters, got \"" + std::string(60, 'n') + "\"..."},
    {"[[service]]\nname = \"a b\"\nvip = \"10.0.0.1\"\nport = 80\nbackends = []",
     "2:8: service[0]: name: expected a name of letters, digits and . _ : / @ -, got \"a b\""},
    {"[[service]]\nname = \"\\u001b]0;\xc3\xa4\\\"\xe2\x80\xae\"\nvip = \"10.0.0.1\"\nport = 80\nbackends = []",
     "2:8: service[0]: name: expected a name of letters, digits and . _ : / @ -, got "
     "\"\\x1b]0;\xc3\xa4\\\"\\xe2\\x80\\xae\""},
    // between services and backends
    {service("backends = [\"10.0.0.2:80\", \"10.0.0.2:81\", \"10.0.0.2:80\"]"),
     "6:43: service \"a\": backends[2]: expected each backend once, got 10.0.0.2:80 as in backends[0]"},
    {service("backends = [\"10.0.0.2:80\", { address = \"10.0.0.2\", port = 80, weight = 2 }]"),
     "6:28: service \"a\": backends[1]: expected each backend once, got 10.0.0.2:80 as in backends[0]"},
    {service("backends = [\"[2001:db8::1]:80\"]"),
     "6:13: service \"a\": backends[0]: expected an IPv4 address like the vip 10.0.0.1, got 2001:db8::1"},
    {service("backends = [\"10.0.0.1:80\"]"),
     "6:13: service \"a\": backends[0]: expected a backend, got 10.0.0.1:80, the vip of service \"a\" on line 3"},
    {service("backends = [\"10.9.9.9:9\"]\n[[service]]\nname = \"b\"\nvip = \"10.9.9.9\"\nport = 9\nbackends = []"),
     "6:13: service \"a\": backends[0]: expected a backend, got 10.9.9.9:9, the vip of service \"b\" on line 9"},
    {service("[[service]]\nname = \"a\"\nvip = \"10.0.0.9\"\nport = 80\nbackends = []"),
     "7:8: service \"a\": name: expected a name of its own, got that of the service on line 2"},
    {service("[[service]]\nname = \"b\"\nvip = \"10.0.0.1\"\nport = 80\nbackends = []"),
     "8:7: service \"b\": vip: expected a vip, port and protocol of its own, got 10.0.0.1:80/tcp as on line 3"},
    {"[limits]\nservices = 1\n" + service("[[service]]\nname = \"b\"\nvip = \"10.0.0.2\"\nport = 80\nbackends = []"),
     "8:1: service \"b\": expected at most 1 services (limits.services), got 2"},
    {"[limits]\nbackends = 2\n" + service("backends = [\"10.0.0.2:80\", \"10.0.0.3:80\", \"10.0.0.4:80\"]"),
     "8:43: service \"a\": backends[2]: expected at most 2 backends (limits.backends), got 3"},
};

TEST(ReadConfig, ReportsEachMistakeWithPositionAndReason) {
  for (const auto& [text, mistake] : rows)
    EXPECT_THAT(mistakes_of(text), ElementsAre(mistake)) << "of the text\n" << text;
}

TEST(ReadConfig, ReportsAllMistakesInTheOrderOfTheText) {
  const std::string text = R"([[service]]
vip = "10.0.0.1"
name = "a"
zzz = 1
port = 0
backends = [ "10.0.0.2:0", { address = "10.0.0.3", port = 1, weight = 0 }, "[::1]:80" ]

[[service]]
name = "a"
vip = "10.0.0.1x"
port = 80
backends = [ "10.0.0.4:80", "10.0.0.4:80" ]

[engine]
mode = "kernel"
watch = 1
)";
  EXPECT_THAT(mistakes_of(text), ElementsAre(HasSubstr("4:1: service \"a\": zzz: unknown key"),
                                             HasSubstr("5:8: service \"a\": port: expected"),
                                             HasSubstr("6:14: service \"a\": backends[0]: expected a port"),
                                             HasSubstr("6:71: service \"a\": backends[1].weight: expected"),
                                             HasSubstr("6:76: service \"a\": backends[2]: expected an IPv4 address"),
                                             HasSubstr("9:8: service \"a\": name: expected a name of its own"),
                                             HasSubstr("10:7: service \"a\": vip: expected a numeric"),
                                             HasSubstr("12:29: service \"a\": backends[1]: expected each backend once"),
                                             HasSubstr("15:8: engine.mode: expected auto, bpf or userspace"),
                                             HasSubstr("16:9: engine.watch: expected true or false, got 1")));
}

TEST(ReadConfig, ReportsDuplicateVipWithBothPositions) {
  const auto config = read_config(service("[[service]]\nname = \"b\"\nvip = \"10.0.0.1\"\nport = 80\nbackends = []"));
  ASSERT_FALSE(config);
  EXPECT_EQ(config.error().at(0).position.line, 8u);
  EXPECT_THAT(config.error().at(0).message, HasSubstr("as on line 3"));
}

TEST(ReadConfig, AcceptsOneVipWithTwoPortsOrTwoProtocols) {
  const std::string second = "[[service]]\nname = \"b\"\nvip = \"10.0.0.1\"\nbackends = []\n";
  EXPECT_THAT(mistakes_of(service(second + "port = 81")), IsEmpty());
  EXPECT_THAT(mistakes_of(service(second + "port = 80\nprotocol = \"udp\"")), IsEmpty());
}

TEST(ReadConfig, AcceptsABackendThatIsTheVipOfAnotherProtocolOrPort) {
  const std::string second = "[[service]]\nname = \"b\"\nvip = \"10.0.0.2\"\nport = 80\nbackends = []\n";
  EXPECT_THAT(mistakes_of(service("backends = [\"10.0.0.2:80\"]\n" + second + "protocol = \"udp\"")), IsEmpty());
  EXPECT_THAT(mistakes_of(service("backends = [\"10.0.0.2:81\"]\n" + second)), IsEmpty());
}

TEST(ReadConfig, AcceptsALoopbackVip) {
  EXPECT_THAT(mistakes_of("[[service]]\nname = \"a\"\nvip = \"127.0.0.9\"\nport = 80\nbackends = [\"127.0.0.1:80\"]"),
              IsEmpty());
}

TEST(ReadConfig, AcceptsTheLongestName) {
  const std::string name(max_name_length, 'n');
  const auto config = read_config("[[service]]\nname = \"" + name + "\"\nvip = \"10.0.0.1\"\nport = 80\nbackends = []");
  ASSERT_TRUE(config);
  EXPECT_EQ(config->services.at(0).name, name);
}

TEST(ReadConfig, CountsWhatItDoesNotShow) {
  std::string text = "[limits]\n";
  for (int i = 0; i < 250; ++i) text += fmt::format("k{:03} = 1\n", 250 - i);  // the parser's order is not the text's
  const auto config = read_config(text);
  ASSERT_FALSE(config);
  ASSERT_EQ(config.error().size(), 101u);
  for (std::size_t i = 0; i < 100; ++i) EXPECT_EQ(config.error()[i].position.line, i + 2);
  EXPECT_EQ(lines_of({config.error().back()}), Lines{"0:0: and 150 more"});
}

TEST(ReadConfig, RefusesMoreBackendsThanAServiceMayHave) {
  std::string backends = "backends = [\n";
  for (std::size_t i = 0; i <= max_backends_per_service; ++i)
    backends += fmt::format("\"10.{}.{}.{}:80\",\n", 1 + i / 65536, i / 256 % 256, i % 256);
  EXPECT_THAT(mistakes_of(service(backends + "]")),
              ElementsAre("65542:1: service \"a\": backends[65535]: expected at most 65535 backends in a service, got "
                          "65536"));
}

TEST(ReadConfig, FillsInTheDefaults) {
  const auto config = read_config(service("backends = [\"10.0.0.2:81\"]"));
  ASSERT_TRUE(config);
  EXPECT_EQ(config->engine.mode, EngineMode::automatic);
  EXPECT_EQ(config->engine.cgroup, "");
  EXPECT_EQ(config->engine.pin, "/sys/fs/bpf/clusterip");
  EXPECT_EQ(config->engine.on_exit, OnExit::keep);
  EXPECT_TRUE(config->engine.peer_names);
  EXPECT_FALSE(config->engine.watch);
  EXPECT_EQ(config->limits.services, 65536u);
  EXPECT_EQ(config->limits.backends, 262144u);
  EXPECT_EQ(config->limits.flows, 131072u);
  EXPECT_EQ(config->userspace.connect_timeout, 2s);
  EXPECT_EQ(config->userspace.idle_timeout, 0s);
  EXPECT_TRUE(config->userspace.local_vips);
  EXPECT_FALSE(config->metrics.listen);
  EXPECT_FALSE(config->kubernetes);
  const Service& service = config->services.at(0);
  EXPECT_EQ(service.protocol, Protocol::tcp);
  EXPECT_EQ(service.policy, Policy::random);
  EXPECT_FALSE(service.affinity);
  EXPECT_FALSE(service.panic);
  EXPECT_EQ(service.no_backend, NoBackend::refuse);
  EXPECT_EQ(service.engine, EngineMode::automatic);
  EXPECT_FALSE(service.health);
  EXPECT_FALSE(service.eject);
  EXPECT_EQ(service.on_remove, OnRemove::drain);
  EXPECT_EQ(service.backends.at(0).weight, 1u);
  EXPECT_EQ(service.backends.at(0).state, BackendState::active);
}

TEST(ReadConfig, KeepsTheLineAndColumnOfServicesAndBackends) {
  const auto config = read_config(service("backends = [\"10.0.0.2:81\", { address = \"10.0.0.3\", port = 1 }]"));
  ASSERT_TRUE(config);
  const Service& service = config->services.at(0);
  EXPECT_EQ(service.position.line, 1u);
  EXPECT_EQ(service.position.column, 1u);
  EXPECT_EQ(service.backends.at(1).position.line, 6u);
  EXPECT_EQ(service.backends.at(1).position.column, 28u);
}

TEST(ReadConfig, AcceptsServicesAsAnArrayOfInlineTables) {
  const auto config =
      read_config("service = [ { name = \"a\", vip = \"10.0.0.1\", port = 80, backends = [ \"10.0.0.2:80\" ] } ]");
  ASSERT_TRUE(config);
  EXPECT_EQ(config->services.at(0).backends.size(), 1u);
}

TEST(ReadConfig, AcceptsTheShippedExample) {
  const auto text = read_file(CLUSTERIP_SOURCE_DIR "/config/clusterip.toml");
  ASSERT_TRUE(text) << text.error().message;
  const auto config = read_config(*text);
  ASSERT_TRUE(config) << testing::PrintToString(lines_of(config.error()));
  ASSERT_EQ(config->services.size(), 2u);
  const auto& [first, second] = std::tie(config->services[0], config->services[1]);
  EXPECT_EQ(first.name, "virtual_svc1");
  EXPECT_EQ(first.vip.to_string(), "10.96.96.96");
  EXPECT_EQ(second.name, "virtual_svc2");
  EXPECT_EQ(second.vip.to_string(), "192.10.100.100");
  for (const Service& service : {first, second}) {
    EXPECT_EQ(service.port, 5201);
    ASSERT_EQ(service.backends.size(), 2u);
    EXPECT_EQ(service.backends[0].address.to_string(), "10.244.209.27");
    EXPECT_EQ(service.backends[1].address.to_string(), "10.244.105.222");
    EXPECT_EQ(service.backends[1].port, 5201);
  }
  EXPECT_EQ(first.backends[1].weight, 1u);
  EXPECT_EQ(second.backends[1].weight, 3u);
}

TEST(ReadConfig, AcceptsWhatIsCommentedOutInTheShippedExample) {
  auto text = read_file(CLUSTERIP_SOURCE_DIR "/config/clusterip.toml").value();
  std::size_t keys = 0;
  for (std::size_t at = 0; (at = text.find("\n# ", at)) != std::string::npos; ++at) {
    const std::size_t end = text.find_first_of("=\n", at + 3);
    if (text[end] != '=') continue;
    text.erase(at + 1, 2);
    ++keys;
  }
  EXPECT_GE(keys, 10u);
  EXPECT_THAT(mistakes_of(text), IsEmpty());
}

constexpr std::string_view every_key = R"([engine]
mode    = "userspace"
cgroup  = "/sys/fs/cgroup/x"
pin     = "/sys/fs/bpf/other"
on_exit = "detach"
peer_names = true
watch   = true
control = "/run/other.sock"
[limits]
services = 5
backends = 6
flows    = 7
[userspace]
threads         = 8
connect_timeout = "9s"
idle_timeout    = "10m"
drain_timeout   = "0s"
udp_timeout     = "11ms"
local_vips      = false
allow_from      = [ "10.244.0.0/16", "2001:db8::/32" ]
[metrics]
listen = "[::1]:9464"
[kubernetes]
server     = "https://10.0.0.1:6443"
ca_file    = "/ca.crt"
token_file = "/token"
namespaces = [ "one", "two" ]
selector   = "app=web,tier!=test"
node       = "node-1"
zone       = "east"
proxy_name = "clusterip"
external_ips      = true
load_balancer_ips = true
[[service]]
name       = "ns/web:http"
vip        = "2001:db8::1"
port       = 53
protocol   = "tcp"
policy     = "maglev"
affinity   = "3h"
client     = "netns"
panic      = true
mark       = 4294967295
proxy_protocol = "v2"
no_backend = "pass"
engine     = "userspace"
health     = { interval = "1s", timeout = "2ms", rise = 3, fall = 4 }
eject      = { failures = 5, time = "6m" }
on_remove  = "reset"
backends   = [ "[2001:db8::2]:80", { address = "2001:db8::3", port = 81, weight = 65535, state = "drain" } ]
)";

TEST(ReadConfig, KubeconfigAndItsContextGoTogether) {
  const auto config = read_config("[kubernetes]\nkubeconfig = \"/kubeconfig\"\ncontext = \"test\"\n");
  ASSERT_TRUE(config) << testing::PrintToString(lines_of(config.error()));
  EXPECT_EQ(config->kubernetes->kubeconfig, "/kubeconfig");
  EXPECT_EQ(config->kubernetes->context, "test");
  EXPECT_EQ(read_config("[kubernetes]\n")->kubernetes, Kubernetes{});
}

TEST(ReadConfig, ReadsEveryKeyOfTheSchema) {
  const auto config = read_config(every_key);
  ASSERT_TRUE(config) << testing::PrintToString(lines_of(config.error()));
  const auto& [engine, limits, userspace, metrics, kubernetes, services] = *config;
  EXPECT_EQ(engine.mode, EngineMode::userspace);
  EXPECT_EQ(engine.cgroup, "/sys/fs/cgroup/x");
  EXPECT_EQ(engine.pin, "/sys/fs/bpf/other");
  EXPECT_EQ(engine.on_exit, OnExit::detach);
  EXPECT_TRUE(engine.peer_names);
  EXPECT_TRUE(engine.watch);
  EXPECT_EQ(engine.control, "/run/other.sock");
  EXPECT_EQ(limits.services, 5u);
  EXPECT_EQ(limits.backends, 6u);
  EXPECT_EQ(limits.flows, 7u);
  EXPECT_EQ(userspace.threads, 8u);
  EXPECT_EQ(userspace.connect_timeout, 9s);
  EXPECT_EQ(userspace.idle_timeout, 10min);
  EXPECT_EQ(userspace.drain_timeout, 0s);
  EXPECT_EQ(userspace.udp_timeout, 11ms);
  EXPECT_FALSE(userspace.local_vips);
  EXPECT_THAT(userspace.allow_from, ElementsAre("10.244.0.0/16", "2001:db8::/32"));
  EXPECT_EQ(metrics.listen, "[::1]:9464");
  Kubernetes expected;
  expected.server = "https://10.0.0.1:6443";
  expected.ca_file = "/ca.crt";
  expected.token_file = "/token";
  expected.namespaces = {"one", "two"};
  expected.selector = "app=web,tier!=test";
  expected.node = "node-1";
  expected.zone = "east";
  expected.proxy_name = "clusterip";
  expected.external_ips = expected.load_balancer_ips = true;
  EXPECT_EQ(kubernetes, expected);
  const Service& service = services.at(0);
  EXPECT_EQ(service.name, "ns/web:http");
  EXPECT_EQ(service.vip.to_string(), "2001:db8::1");
  EXPECT_EQ(service.port, 53);
  EXPECT_EQ(service.protocol, Protocol::tcp);
  EXPECT_EQ(service.policy, Policy::maglev);
  EXPECT_EQ(service.affinity, 3h);
  EXPECT_EQ(service.client, Client::netns);
  EXPECT_TRUE(service.panic);
  EXPECT_EQ(service.mark, 4294967295u);
  EXPECT_EQ(service.proxy_protocol, ProxyProtocol::v2);
  EXPECT_EQ(service.no_backend, NoBackend::pass);
  EXPECT_EQ(service.engine, EngineMode::userspace);
  ASSERT_TRUE(service.health);
  EXPECT_EQ(service.health->interval, 1s);
  EXPECT_EQ(service.health->timeout, 2ms);
  EXPECT_EQ(service.health->rise, 3u);
  EXPECT_EQ(service.health->fall, 4u);
  ASSERT_TRUE(service.eject);
  EXPECT_EQ(service.eject->failures, 5u);
  EXPECT_EQ(service.eject->time, 6min);
  EXPECT_EQ(service.on_remove, OnRemove::reset);
  ASSERT_EQ(service.backends.size(), 2u);
  EXPECT_EQ(service.backends[0].address.to_string(), "2001:db8::2");
  EXPECT_EQ(service.backends[0].port, 80);
  EXPECT_EQ(service.backends[1].port, 81);
  EXPECT_EQ(service.backends[1].weight, 65535u);
  EXPECT_EQ(service.backends[1].state, BackendState::drain);
}

TEST(ReadConfig, RefusesForDatagramsWhatSpeaksOfConnections) {
  const std::string_view of_connections = "proxy_protocol = \"v2\"\nhealth = {}\neject = {}\n";
  const std::string label = "service \"a\": ";
  EXPECT_EQ(mistakes_of(service(std::string(of_connections))), Lines{});
  EXPECT_EQ(
      mistakes_of(service(fmt::format("{}protocol = \"udp\"", of_connections))),
      (Lines{
          "6:1: " + label +
              "proxy_protocol: expected protocol = \"tcp\", as a datagram carries no PROXY header, got \"udp\"",
          "7:1: " + label + "health: expected protocol = \"tcp\", as the check is a TCP connect, got \"udp\"",
          "8:1: " + label + "eject: expected protocol = \"tcp\", as only connections are seen to fail, got \"udp\""}));
  EXPECT_EQ(mistakes_of(service("protocol = \"udp\"\nproxy_protocol = \"none\"")), Lines{});
}

TEST(ReadConfig, RefusesForTheEngineBpfWhatOnlyTheOtherDoes) {
  EXPECT_EQ(
      mistakes_of(service("engine = \"bpf\"\nproxy_protocol = \"v1\"")),
      (Lines{"7:1: service \"a\": proxy_protocol: expected none, as only the userspace engine sends a header, and "
             "engine is \"bpf\""}));
  EXPECT_EQ(mistakes_of(service("engine = \"bpf\"\nproxy_protocol = \"none\"")), Lines{});
}

TEST(ReadConfig, ProposesTheWordThatIsNear) {
  EXPECT_THAT(mistakes_of(service("policy = \"magelv\"")), ElementsAre(HasSubstr("did you mean \"maglev\"?")));
}

// Hostile texts

TEST(ReadConfig, TellsTheFirstSyntaxError) {
  EXPECT_THAT(mistakes_of("a ="), ElementsAre("1:4: syntax error in key-value pair: encountered end-of-file"));
  EXPECT_THAT(mistakes_of("[engine\n"), ElementsAre(HasSubstr("1:8: syntax error in table header: expected ']'")));
  EXPECT_THAT(mistakes_of("a = 1\na = 2\nb = "), ElementsAre(HasSubstr("2:5: syntax error in key-value pair: cannot")));
  EXPECT_THAT(mistakes_of("name = virtual"), ElementsAre(HasSubstr("1:8: syntax error in value:")));
}

TEST(ReadConfig, RefusesEveryTruncationInsideAService) {
  const std::string text = service("no_backend = \"refuse\"");
  const std::string complete = text.substr(0, text.find("no_backend"));
  for (std::size_t length = 0; length + 1 < complete.size(); ++length)
    EXPECT_FALSE(read_config(text.substr(0, length))) << text.substr(0, length);
  EXPECT_TRUE(read_config(complete));
}

TEST(ReadConfig, RefusesBinaryGarbage) {
  using std::string_literals::operator""s;
  EXPECT_THAT(mistakes_of("\x7f"
                          "ELF\x02\x01\x01\0"s),
              ElementsAre(HasSubstr("1:1: syntax error in root table")));
  EXPECT_THAT(mistakes_of("a = \"\xff\xfe\""), ElementsAre(HasSubstr("1:5: syntax error: Encountered invalid utf-8")));
  EXPECT_THAT(mistakes_of("\xff\xfe[\0e\0"s), ElementsAre(HasSubstr("1:1: syntax error")));
  EXPECT_THAT(mistakes_of("a = 1\n\0\0\0\0"s), ElementsAre(HasSubstr("2:1: syntax error")));
  EXPECT_THAT(mistakes_of("a = [}"), ElementsAre(HasSubstr("1:6: syntax error")));
}

TEST(ReadConfig, RefusesAbsurdNesting) {
  const auto repeated = [](std::string_view part, std::size_t count) {
    std::string text;
    while (count-- > 0) text += part;
    return text;
  };
  const std::string message = "syntax error: expected at most 32 levels of nesting, got more";
  EXPECT_THAT(mistakes_of(repeated("[", 300'000)), ElementsAre("1:33: " + message));
  EXPECT_THAT(mistakes_of("x = " + repeated("[", 300'000)), ElementsAre("1:37: " + message));
  EXPECT_THAT(mistakes_of("\n" + repeated("a.", 300'000) + "b = 1"), ElementsAre("2:66: " + message));
  EXPECT_THAT(mistakes_of("[" + repeated("a.", 300'000) + "b]"), ElementsAre("1:65: " + message));
  EXPECT_THAT(mistakes_of(repeated("\"\xc3\xa4.#\" . ", 300'000) + "b = 1"), ElementsAre("1:263: " + message));
  EXPECT_THAT(mistakes_of(repeated("a = { ", 300'000)), ElementsAre("1:197: " + message));
  EXPECT_THAT(mistakes_of("x = { " + repeated("a.b.c = { d.e.f = { ", 300'000)), ElementsAre(HasSubstr(message)));
}

TEST(ReadConfig, LooksForNestingOutsideStringsAndComments) {
  const std::string deep(100, '[');
  for (const std::string& text :
       {"a = 1 # " + deep, "a = \"" + deep + "\"", "a = '" + deep + "'", "a = \"\\\"" + deep + "\"",
        "a = \"\"\"\n\"" + deep + "\\\"\"\"\" # \"", "a = '''\n''" + deep + "'''''",
        "a = \"\"\"x\"\"\"\"\"\nb = \"" + deep + "\"", "a = ''\nb = '" + deep + "'"})
    EXPECT_THAT(mistakes_of(text), testing::Each(HasSubstr("unknown key"))) << text;
  EXPECT_THAT(mistakes_of("a = \"\"\"\n[[[\n\"\"\"\nb = " + deep), ElementsAre(HasSubstr("4:37: syntax error")));
}

TEST(ReadConfig, RefusesTextsThatAreTooLong) {
  const std::string text(max_text_size + 1, '\n');
  EXPECT_THAT(mistakes_of(text), ElementsAre("1:1: expected at most 268435456 bytes, got 268435457"));
}

TEST(ReadConfig, CutsLongKeysInMessages) {
  const std::string key(100'000, 'k');
  for (const std::string& text : {key + " = 1", key + " = 1\n" + key + " = 2"}) {
    const auto config = read_config(text);
    ASSERT_FALSE(config);
    EXPECT_LT(config.error().at(0).message.size(), 400u);
  }
}

// Files

TEST(ReadFile, NamesThePathAndTheReason) {
  const auto missing = read_file("/nonexistent/clusterip.toml");
  ASSERT_FALSE(missing);
  EXPECT_EQ(missing.error().code, -ENOENT);
  EXPECT_EQ(missing.error().message, "/nonexistent/clusterip.toml: No such file or directory");
  const auto directory = read_file("/");
  ASSERT_FALSE(directory);
  EXPECT_EQ(directory.error().code, -EISDIR);
}

TEST(ReadFile, TakesNoDevice) {
  const auto endless = read_file("/dev/zero");
  ASSERT_FALSE(endless);
  EXPECT_EQ(endless.error().message, "/dev/zero: expected a file or a pipe");
}

/// A FIFO, as long as this lives.
class Fifo {
 public:
  Fifo() {
    EXPECT_NE(::mkdtemp(directory_.data()), nullptr);
    EXPECT_EQ(::mkfifo(path().c_str(), 0600), 0);
  }
  ~Fifo() {
    ::unlink(path().c_str());
    ::rmdir(directory_.c_str());
  }
  Fifo(const Fifo&) = delete;
  Fifo& operator=(const Fifo&) = delete;

  std::string path() const { return directory_ + "/fifo"; }

 private:
  std::string directory_ = testing::TempDir() + "clusterip-XXXXXX";
};

TEST(ReadFile, DoesNotWaitForSomebodyToWriteToAPipe) {
  const Fifo fifo;
  const auto nobody = read_file(fifo.path());
  ASSERT_FALSE(nobody);
  EXPECT_EQ(nobody.error().message, fifo.path() + ": a pipe, and nobody writes to it");
}

TEST(ReadFile, ReadsAPipeToItsEnd) {
  const std::string text(1 << 20, '#');  // more than a pipe holds
  int ends[2];
  ASSERT_EQ(::pipe2(ends, O_CLOEXEC), 0);
  std::thread writer([&] {
    for (std::size_t sent = 0; sent < text.size();) {
      const ssize_t more = ::write(ends[1], text.data() + sent, text.size() - sent);
      if (more <= 0) break;
      sent += static_cast<std::size_t>(more);
    }
    ::close(ends[1]);
  });
  const auto read = read_file(fmt::format("/dev/fd/{}", ends[0]));
  writer.join();
  ::close(ends[0]);
  ASSERT_TRUE(read) << read.error().message;
  EXPECT_EQ(*read, text);
}

TEST(ReadFile, StopsReadingWhatIsTooLong) {
  std::string path = testing::TempDir() + "clusterip-XXXXXX";
  const int file = ::mkostemp(path.data(), O_CLOEXEC);
  ASSERT_GE(file, 0);
  EXPECT_EQ(::ftruncate(file, (257 << 20)), 0);
  ::close(file);
  const auto endless = read_file(path);
  ::unlink(path.c_str());
  ASSERT_FALSE(endless);
  EXPECT_EQ(endless.error().code, -EFBIG);
  EXPECT_EQ(endless.error().message, path + ": expected at most 256 MiB, got more");
}

// Backends from elsewhere

Backend backend(std::string_view address, std::uint16_t port, std::uint32_t weight = 1) {
  return {boost::asio::ip::make_address(address), port, weight, BackendState::active, {}};
}

Service service_with_vip(std::string_view vip) {
  Service service;
  service.name = "a";
  service.vip = boost::asio::ip::make_address(vip);
  service.port = 80;
  return service;
}

TEST(CheckBackends, AcceptsWhatTheFileMayHold) {
  EXPECT_THAT(check_backends(service_with_vip("10.0.0.1"), {}), IsEmpty());
  const Backend backends[] = {backend("10.0.0.2", 80), backend("10.0.0.2", 81, max_weight), backend("127.0.0.1", 80)};
  EXPECT_THAT(check_backends(service_with_vip("10.0.0.1"), backends), IsEmpty());
}

TEST(CheckBackends, ReportsEachMistakeOfTheList) {
  const Backend backends[] = {backend("10.0.0.2", 80),  backend("10.0.0.2", 80, 2), backend("2001:db8::1", 80),
                              backend("10.0.0.3", 0),   backend("10.0.0.4", 80, 0), backend("10.0.0.5", 80, 65536),
                              backend("224.0.0.1", 80), backend("0.0.0.0", 80),     backend("255.255.255.255", 80)};
  EXPECT_THAT(
      lines_of(check_backends(service_with_vip("10.0.0.1"), backends)),
      testing::UnorderedElementsAre(
          "0:0: service \"a\": backends[1]: expected each backend once, got 10.0.0.2:80 as in backends[0]",
          "0:0: service \"a\": backends[2]: expected an IPv4 address like the vip 10.0.0.1, got 2001:db8::1",
          "0:0: service \"a\": backends[3].port: expected an integer from 1 to 65535, got 0",
          "0:0: service \"a\": backends[4].weight: expected an integer from 1 to 65535, got 0",
          "0:0: service \"a\": backends[5].weight: expected an integer from 1 to 65535, got 65536",
          "0:0: service \"a\": backends[6].address: expected a unicast address, not a multicast one, got \"224.0.0.1\"",
          "0:0: service \"a\": backends[7].address: expected a unicast address, not the unspecified one, got "
          "\"0.0.0.0\"",
          "0:0: service \"a\": backends[8].address: expected a unicast address, not the broadcast one, got "
          "\"255.255.255.255\""));
}

TEST(CheckBackends, RefusesMappedAndScopedAddresses) {
  const Backend backends[] = {backend("::ffff:10.0.0.2", 80), backend("fe80::1", 80)};
  EXPECT_THAT(lines_of(check_backends(service_with_vip("2001:db8::1"), backends)),
              ElementsAre(HasSubstr("backends[0].address: expected the IPv4 address itself, \"10.0.0.2\""),
                          HasSubstr("backends[1].address: expected an address that needs no scope")));
}

TEST(CheckBackends, RefusesMoreBackendsThanAServiceMayHave) {
  std::vector<Backend> backends;
  for (std::uint32_t i = 0; i <= max_backends_per_service; ++i) {
    backends.push_back(backend("10.0.0.2", 80));
    backends.back().address = boost::asio::ip::address_v4(0x0a000000 + 2 + i);
  }
  EXPECT_THAT(lines_of(check_backends(service_with_vip("10.0.0.1"), backends)),
              ElementsAre(HasSubstr("expected at most 65535 backends in a service, got 65536")));
}

TEST(Names, AreSpeltAsInTheFile) {
  EXPECT_EQ(name_of(policy_names, Policy::least_conn), "least_conn");
  EXPECT_EQ(name_of(engine_names, EngineMode::automatic), "auto");
  EXPECT_EQ(name_of(no_backend_names, NoBackend::unreachable), "unreachable");
}

// As long as it takes to read a string of quotes once, not once for each.
TEST(ReadConfig, ReadsAMillionQuotesOnce) {
  EXPECT_THAT(mistakes_of("a=\"\"\"" + std::string(1'000'000, '"')), testing::SizeIs(1));
}

}  // namespace
}  // namespace config
