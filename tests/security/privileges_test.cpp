// SPDX-License-Identifier: BSD-2-Clause
//
// Least privileges: each command runs with exactly the capabilities that docs/security.md names, as root without any
// other, and says which one it misses when one is taken away.
#include <linux/capability.h>
#include <signal.h>

#include <algorithm>
#include <string>
#include <vector>

#include "tests/run/running.h"

namespace {

using namespace support;
using testing::HasSubstr;

enum class Ends : std::uint8_t {
  by_itself,
  when_told,  // it serves until then
};

struct Command {
  std::string shown;               // in docs/security.md
  std::vector<std::string> words;  // FILE, PIN, CONTROL and VIP stand for the test's own
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
      if (word == "FILE") word = files_->config();
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

  const NamedServer one_{"one"};
  std::shared_ptr<const FallbackProxy::Files> files_;

  void SetUp() override {
    Running::SetUp();
    if (IsSkipped() || HasFatalFailure()) return;
    Userspace local;
    local.local_vips = true;
    files_ = files(proxy_toml({web({backend(one_)})}, local));
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

TEST_F(Privileges, EachCommandNamesWhatItMissesAndChangesNothing) {
  for (const Command& command : commands) {
    for (const unsigned missing : command.needs) {
      SCOPED_TRACE(command.shown + " without " + name_of(missing));
      prepare(command);
      std::vector<unsigned> kept = command.needs;
      std::erase(kept, missing);
      const Finished finished = run_with(command, kept);
      EXPECT_THAT(finished.err, HasSubstr(name_of(missing)));
      if (command.without == serves_less) {
        EXPECT_EQ(finished.exit_code, fine) << finished.err;
        EXPECT_THAT(finished.err, HasSubstr("serving 0 of 1 service"));
        continue;
      }
      EXPECT_EQ(finished.exit_code, cannot) << finished.err;
      EXPECT_EQ(std::ranges::count(finished.err, '\n'), 1) << finished.err;
      EXPECT_EQ(finished.out, "");
      EXPECT_EQ(ask(fast_vip, vip_port), command.is_loaded ? answered_by("one") : refused_with(ENETUNREACH));
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

TEST(PrivilegesTable, IsWhatTheDocumentShows) {
  EXPECT_THAT(read_text(CLUSTERIP_SOURCE_DIR "/docs/security.md"), HasSubstr(as_markdown()));
}

}  // namespace
