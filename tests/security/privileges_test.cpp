// SPDX-License-Identifier: BSD-2-Clause
//
// Least privileges: each command runs with exactly the capabilities that docs/security.md names, as root without any
// other, and says which one it misses when one is taken away.
#include <linux/capability.h>
#include <signal.h>
#include <sys/stat.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <regex>
#include <string>
#include <vector>

#include "tests/run/running.h"

namespace {

using namespace support;
using testing::ElementsAre;
using testing::HasSubstr;

enum class Ends : std::uint8_t {
  by_itself,
  when_told,  // it serves until then
};

struct Command {
  std::string shown;               // in docs/security.md
  std::vector<std::string> words;  // FILE, PIN, CONTROL and VIP stand for the test's own; FILE is not what is loaded
  std::vector<unsigned> needs;
  std::string without;  // in docs/security.md: what happens when one of them is missing
  Ends ends = Ends::by_itself;
  bool is_loaded = true;  // the fast path, before it runs
};

const std::string exit_4 = "exit 4, and the line names both";
const std::string serves_less = "it serves what it can, and names what it cannot";

const std::vector<unsigned> of_bpf = {CAP_BPF, CAP_NET_ADMIN};
const std::vector<unsigned> of_proxy = {CAP_NET_ADMIN, CAP_NET_BIND_SERVICE};

const std::vector<Command> commands = {
    {"clusterip check FILE", {"check", "FILE"}, {}, ""},
    {"clusterip probe", {"probe"}, of_bpf, exit_4},
    {"clusterip load", {"load", "--config", "FILE"}, of_bpf, exit_4},
    {"clusterip unload", {"unload", "--pin", "PIN"}, of_bpf, exit_4},
    {"clusterip status --pin DIR", {"status", "--pin", "PIN"}, of_bpf, exit_4},
    {"clusterip resolve", {"resolve", "VIP", "--pin", "PIN"}, of_bpf, exit_4},
    {"clusterip trace, of pins", {"trace", "--pin", "PIN", "--count", "1"}, of_bpf, exit_4},
    {"clusterip run --engine bpf", {"run", "--config", "FILE", "--engine", "bpf"}, of_bpf, exit_4, Ends::when_told},
    {"clusterip run --engine userspace",
     {"run", "--config", "FILE", "--engine", "userspace"},
     of_proxy,
     serves_less,
     Ends::when_told,
     false},
    {"fallback_proxy", {"fallback_proxy", "--config", "FILE"}, of_proxy, serves_less, Ends::when_told, false},
};

/// Of a running service, by its control socket.
const std::vector<Command> of_the_service = {
    {"clusterip status", {"status", "--control", "CONTROL"}, {}, ""},
    {"clusterip trace", {"trace", "--control", "CONTROL", "--count", "1"}, {}, ""},
    {"fallback_proxy --status", {"fallback_proxy", "--status", "--control", "CONTROL"}, {}, ""},
};

std::string name_of(unsigned capability) {
  switch (capability) {
    case CAP_BPF:
      return "CAP_BPF";
    case CAP_NET_ADMIN:
      return "CAP_NET_ADMIN";
    case CAP_NET_BIND_SERVICE:
      return "CAP_NET_BIND_SERVICE";
    default:
      throw std::logic_error("a capability without a name");
  }
}

/// As code, up to a comma.
std::string shown(const Command& command) {
  const auto comma = command.shown.find(',');
  return "`" + command.shown.substr(0, comma) + "`" + (comma == std::string::npos ? "" : command.shown.substr(comma));
}

std::string as_markdown() {
  std::string text = "| command | needs | without |\n| --- | --- | --- |\n";
  for (const auto* table : {&commands, &of_the_service}) {
    for (const Command& command : *table) {
      std::string needs;
      for (const unsigned capability : command.needs) needs += (needs.empty() ? "" : ", ") + name_of(capability);
      text += "| " + shown(command) + " | " + (needs.empty() ? "nothing" : needs) + " | " + command.without + " |\n";
    }
  }
  return text;
}

class Privileges : public Running {
 protected:
  std::vector<std::string> words_of(const Command& command) const {
    std::vector<std::string> words = command.words;
    for (std::string& word : words) {
      if (word == "FILE") word = other_->config();
      if (word == "PIN") word = pin();
      if (word == "CONTROL") word = files_->control();
      if (word == "VIP") word = std::string(fast_vip) + ":80";
    }
    if (words.front() == "fallback_proxy") {
      words.front() = CLUSTERIP_FALLBACK_PROXY;
    } else {
      words.insert(words.begin(), CLUSTERIP_COMMAND);
      words.insert(words.end(), {"--plugin", CLUSTERIP_PLUGIN_PATH});
    }
    return words;
  }

  /// What it did with these capabilities and no other, while somebody connects.
  Finished run_with(const Command& command, const std::vector<unsigned>& kept) const {
    Process process(words_of(command), nullptr, [&kept] { drop_capabilities_except(kept); });
    if (command.ends == Ends::when_told && can_serve(command, kept)) {
      process.wait_for_error("serving ");
      ::kill(process.pid(), SIGTERM);
    }
    return process.wait();
  }

  /// A service goes on without what it lacks, unless it is told to have the fast path.
  static bool can_serve(const Command& command, const std::vector<unsigned>& kept) {
    return command.without == serves_less || kept == command.needs;
  }

  void prepare(const Command& command) const {
    if (command.is_loaded) require(clusterip({"load", "--config", files_->config()}).exit_code == fine, "load");
  }

  /// What could have changed: pins, each of which has an inode of its own, what is attached to the cgroup, routes.
  std::string state() const {
    std::string text;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(bpffs)) {
      struct stat seen{};
      checked(::lstat(entry.path().c_str(), &seen), entry.path());
      text += fmt::format("{} {} {:o} {}\n", entry.path().string(), seen.st_ino, seen.st_mode, seen.st_uid);
    }
    for (const bpf_attach_type hook : hooks)
      text += fmt::format("at {}: {}\n", static_cast<int>(hook), fmt::join(programs_at(cgroup(), hook), " "));
    const BpfObjects objects = objects_of(cgroup());
    text += fmt::format("maps {}\nlinks {}\n", fmt::join(objects.maps, " "), fmt::join(objects.links, " "));
    for (const char* family : {"-4", "-6"}) text += run({"ip", family, "route", "show", "table", "all"}).out;
    return text;
  }

  static constexpr bpf_attach_type hooks[] = {
      BPF_CGROUP_INET4_CONNECT, BPF_CGROUP_INET6_CONNECT,     BPF_CGROUP_UDP4_SENDMSG,
      BPF_CGROUP_UDP6_SENDMSG,  BPF_CGROUP_UDP4_RECVMSG,      BPF_CGROUP_UDP6_RECVMSG,
      BPF_CGROUP_SOCK_OPS,      BPF_CGROUP_INET4_GETPEERNAME, BPF_CGROUP_INET6_GETPEERNAME};

  const NamedServer one_{"one"}, two_{"two"};
  std::shared_ptr<const FallbackProxy::Files> files_;  // of what is loaded before
  std::shared_ptr<const FallbackProxy::Files> other_;  // another backend of the same VIP, and one more service

  void SetUp() override {
    Running::SetUp();
    if (IsSkipped() || HasFatalFailure()) return;
    Userspace local;
    local.local_vips = true;
    files_ = files(proxy_toml({web({backend(one_)})}, local));
    // It asks for a hook that the other one does without.
    const Service more{"more", "10.96.0.2", vip_port, {backend(two_)}, "refuse", "policy = \"least_conn\"\n"};
    other_ = files(proxy_toml({web({backend(two_)}), more}, local));
  }
};

TEST_F(Privileges, EachCommandRunsWithWhatTheDocumentNames) {
  for (const Command& command : commands) {
    SCOPED_TRACE(command.shown);
    prepare(command);
    const Asker asker(fast_vip, vip_port);
    const Finished finished = run_with(command, command.needs);
    EXPECT_EQ(finished.exit_code, fine) << finished.out << finished.err;
    EXPECT_THAT(finished.err, testing::Not(HasSubstr("CAP_")));
    EXPECT_THAT(finished.err, testing::Not(HasSubstr("warning")));
    clusterip({"unload", "--pin", pin()});
  }
}

/// How a command fails that can do nothing without what it lacks.
void expect_refused(const Command& command, const Finished& finished) {
  EXPECT_EQ(finished.exit_code, cannot) << finished.err;
  for (const unsigned capability : command.needs) EXPECT_THAT(finished.err, HasSubstr(name_of(capability)));
  EXPECT_EQ(std::ranges::count(finished.err, '\n'), 1) << finished.err;
  EXPECT_EQ(finished.out, "");
}

TEST_F(Privileges, EachCommandNamesWhatItMissesAndChangesNothing) {
  for (const Command& command : commands) {
    for (const unsigned missing : command.needs) {
      SCOPED_TRACE(command.shown + " without " + name_of(missing));
      prepare(command);
      const std::string before = state();
      std::vector<unsigned> kept = command.needs;
      std::erase(kept, missing);
      const Finished finished = run_with(command, kept);
      EXPECT_EQ(state(), before);
      if (command.without == serves_less) {
        EXPECT_EQ(finished.exit_code, fine) << finished.err;
        EXPECT_THAT(finished.err, HasSubstr(name_of(missing)));
        EXPECT_THAT(finished.err, HasSubstr("serving 0 of 2 services"));
        continue;
      }
      expect_refused(command, finished);
      EXPECT_EQ(ask(fast_vip, vip_port), answered_by("one"));
    }
  }
}

TEST_F(Privileges, FirstLoadThatMissesOneLeavesNothing) {
  const std::string before = state();
  ASSERT_THAT(before, testing::Not(HasSubstr(pin())));
  for (const Command& command : commands) {
    if (std::ranges::find(command.words, "FILE") == command.words.end() || command.without != exit_4) continue;
    for (const unsigned missing : command.needs) {
      SCOPED_TRACE(command.shown + " without " + name_of(missing));
      std::vector<unsigned> kept = command.needs;
      std::erase(kept, missing);
      expect_refused(command, run_with(command, kept));
      EXPECT_EQ(state(), before);
      EXPECT_FALSE(std::filesystem::exists(other_->control()));
      EXPECT_EQ(ask(fast_vip, vip_port), refused_with(ENETUNREACH));
    }
  }
}

TEST_F(Privileges, OfARunningServiceTheUserAsksWithoutAny) {
  RunningService service(files_);
  const Asker asker(fast_vip, vip_port);
  for (const Command& command : of_the_service) {
    SCOPED_TRACE(command.shown);
    const Finished finished = run_with(command, command.needs);
    EXPECT_EQ(finished.exit_code, fine) << finished.out << finished.err;
  }
}

TEST_F(Privileges, WhatAKilledProxyHasLeftIsRemovedWithOneCapability) {
  {
    FallbackProxy proxy(files_);
    proxy.kill();
  }
  const auto routes = [] { return run({"ip", "route", "show", "table", "local", "proto", "96"}).out; };
  ASSERT_THAT(routes(), HasSubstr(fast_vip));
  const Command cleanup{"", {"fallback_proxy", "--cleanup"}, {}, ""};
  const Finished without = run_with(cleanup, {});
  EXPECT_EQ(without.exit_code, cannot) << without.err;
  EXPECT_THAT(without.err, HasSubstr("CAP_NET_ADMIN"));
  EXPECT_THAT(routes(), HasSubstr(fast_vip));
  EXPECT_EQ(run_with(cleanup, {CAP_NET_ADMIN}).exit_code, fine);
  EXPECT_EQ(routes(), "");
}

/// The values of a key of the unit, each line's by themselves.
std::vector<std::string> unit(const std::string& key) {
  const std::string text = read_text(CLUSTERIP_SOURCE_DIR "/systemd/clusterip.service");
  const std::regex line("(?:^|\n)" + key + "=([^\n]*)");
  std::vector<std::string> values;
  for (std::sregex_iterator found(text.begin(), text.end(), line), end; found != end; ++found)
    values.push_back((*found)[1]);
  return values;
}

TEST(PrivilegesTable, UnitHasWhatTheDocumentSays) {
  const std::string document = read_text(CLUSTERIP_SOURCE_DIR "/docs/security.md");
  std::smatch sentence;
  ASSERT_TRUE(std::regex_search(
      document, sentence,
      std::regex(R"(\[clusterip\.service\]\(\.\./systemd/clusterip\.service\) has ([^]*?), a filter of system\scalls,)"
                 R"( and a read-only view of the machine but for pins, cgroups and its runtime directory\.)")));
  const std::string given = sentence[1];
  const std::regex capability("CAP_\\w+");
  std::string capabilities;
  for (std::sregex_iterator found(given.begin(), given.end(), capability), end; found != end; ++found)
    capabilities += (capabilities.empty() ? "" : " ") + found->str();
  EXPECT_THAT(unit("CapabilityBoundingSet"), ElementsAre(capabilities));
  EXPECT_THAT(unit("AmbientCapabilities"), ElementsAre());
  EXPECT_THAT(unit("User"), ElementsAre()) << "root without all others";
  EXPECT_THAT(unit("NoNewPrivileges"), ElementsAre("yes"));
  EXPECT_THAT(unit("SystemCallFilter"), ElementsAre("@system-service", "~@privileged @resources @keyring @aio", "bpf"));
  EXPECT_THAT(unit("ProtectSystem"), ElementsAre("strict"));
  EXPECT_THAT(unit("ReadWritePaths"), ElementsAre("/sys/fs/bpf", "/sys/fs/cgroup"));
  EXPECT_THAT(unit("RuntimeDirectory"), ElementsAre("clusterip"));
  for (const char* directory : {"StateDirectory", "CacheDirectory", "LogsDirectory", "BindPaths"})
    EXPECT_THAT(unit(directory), ElementsAre()) << directory;
}

TEST(PrivilegesTable, IsWhatTheDocumentShows) {
  EXPECT_THAT(read_text(CLUSTERIP_SOURCE_DIR "/docs/security.md"), HasSubstr(as_markdown()));
}

}  // namespace
