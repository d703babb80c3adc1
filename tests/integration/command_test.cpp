// SPDX-License-Identifier: BSD-2-Clause
//
// The `clusterip` command: exit codes, and what its output must hold.
#include <fmt/format.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include <algorithm>
#include <filesystem>

#include "tests/support/fixture.h"

namespace {

using namespace support;

constexpr int fine = 0, usage = 2, configuration = 3, cannot = 4;

std::vector<std::string> command(std::vector<std::string> words) {
  words.insert(words.begin(), {CLUSTERIP_COMMAND, "--plugin", CLUSTERIP_PLUGIN_PATH});
  return words;
}

Finished clusterip(std::vector<std::string> words) { return run(command(std::move(words))); }

std::ptrdiff_t lines(const std::string& text) { return std::ranges::count(text, '\n'); }

testing::AssertionResult exits(int code, const Finished& finished) {
  if (finished.exit_code == code) return testing::AssertionSuccess();
  return testing::AssertionFailure() << "exit " << finished.exit_code << ", not " << code
                                     << "\nstdout: " << finished.out << "\nstderr: " << finished.err;
}

/// The command failed with `code`, said so in one line on stderr, and nothing on stdout.
testing::AssertionResult fails_in_one_line(int code, const Finished& finished) {
  if (finished.exit_code == code && finished.out.empty() && lines(finished.err) == 1)
    return testing::AssertionSuccess();
  return exits(code, finished) << "\nstdout: " << finished.out << "\nstderr: " << finished.err;
}

bool contains(const std::string& text, const std::string& piece) { return text.find(piece) != std::string::npos; }

bool is_json(const std::string& text) {
  const TemporaryDirectory directory;
  return run({"python3", "-m", "json.tool", directory.write("input.json", text)}).exit_code == 0;
}

class Command : public Integration {
 protected:
  Finished load(const std::string& text) {
    return clusterip(
        {"load", "--config", directory_.write("services.toml", text), "--cgroup", cgroup().path(), "--pin", pin()});
  }
  Finished unload() { return clusterip({"unload", "--pin", pin()}); }

  TemporaryDirectory directory_;
};

TEST_F(Command, CheckAcceptsAGoodFile) {
  const Finished check =
      clusterip({"check", directory_.write("good.toml", toml({{"web", "10.96.0.1", 80, {{"127.0.0.1", 80}}}}))});
  EXPECT_TRUE(exits(fine, check));
  EXPECT_EQ(check.err, "");
}

TEST_F(Command, CheckShowsEveryMistakeLikeACompiler) {
  const std::string file = directory_.write("bad.toml",
                                            "[[service]]\n"
                                            "name = \"web\"\n"
                                            "vip = \"224.0.0.1\"\n"
                                            "port = 0\n"
                                            "no_backnd = \"refuse\"\n"
                                            "backends = [ \"[::1]:80\" ]\n");
  const Finished check = clusterip({"check", file});
  EXPECT_TRUE(exits(configuration, check));
  for (const char* position : {":3:", ":4:", ":5:"}) EXPECT_TRUE(contains(check.err, file + position)) << check.err;
  EXPECT_TRUE(contains(check.err, "port = 0\n")) << "the line itself\n" << check.err;
  EXPECT_GE(std::ranges::count(check.err, '^'), 3) << check.err;
  EXPECT_TRUE(contains(check.err, "no_backend")) << "did you mean\n" << check.err;
}

TEST_F(Command, CheckReportsMistakesAsJson) {
  const Finished check =
      clusterip({"check", "--json", directory_.write("bad.toml", "[[service]]\nnaem = \"web\"\nport = 0\n")});
  EXPECT_TRUE(exits(configuration, check));
  EXPECT_TRUE(is_json(check.out)) << check.out;
  EXPECT_NE(jq("[.. | .line? // empty] | index(2) != null and index(3) != null", check.out), "false\n") << check.out;
}

TEST_F(Command, CheckOfBinaryGarbageStaysPrintable) {
  const Finished check =
      clusterip({"check", directory_.write("garbage.toml", std::string("a = \"\x1b[31m\x01\xff\n\0\n", 14))});
  EXPECT_TRUE(exits(configuration, check));
  EXPECT_TRUE(std::ranges::all_of(check.err, [](char c) { return c == '\n' || static_cast<unsigned char>(c) >= 0x20; }))
      << check.err;
}

TEST_F(Command, CheckOfMissingFileIsAConfigurationFailure) {
  const Finished check = clusterip({"check", directory_.path() + "/missing.toml"});
  EXPECT_TRUE(fails_in_one_line(configuration, check));
  EXPECT_TRUE(contains(check.err, "missing.toml")) << check.err;
}

TEST_F(Command, WrongUsageExitsWith2) {
  const std::vector<std::vector<std::string>> wrong = {{},
                                                       {"lod"},
                                                       {"check"},
                                                       {"check", "one", "two"},
                                                       {"check", "--no-such-option", "one"},
                                                       {"load"},
                                                       {"load", "--config"},
                                                       {"resolve"},
                                                       {"resolve", "10.96.0.1"},
                                                       {"resolve", "10.96.0.1:0x50"},
                                                       {"resolve", "10.96.0.1:80/sctp"},
                                                       {"resolve", "10.96.0.1:65536"},
                                                       {"status", "surplus"},
                                                       {"--no-such-option", "probe"},
                                                       {"unload", "--config", "one", "--pin", "/two"},
                                                       {"run", "--config", "one", "--engine", "fast"},
                                                       {"run", "--config", "one", "--control", "relative"},
                                                       {"run", "--config", "one", "--log-level", "loud"}};
  for (const auto& words : wrong)
    EXPECT_TRUE(fails_in_one_line(usage, clusterip(words))) << testing::PrintToString(words);
}

TEST_F(Command, HelpIsOnStdout) {
  for (const auto& words : {std::vector<std::string>{"--help"}, {"check", "--help"}, {"load", "--help"}}) {
    const Finished help = clusterip(words);
    EXPECT_TRUE(exits(fine, help));
    EXPECT_FALSE(help.out.empty());
    EXPECT_EQ(help.err, "");
  }
}

TEST_F(Command, CheckReadsStandardInput) {
  const auto check = [&](const std::string& text) {
    return run({"sh", "-c", fmt::format("\"$@\" <{}", directory_.write("piped.toml", text)), "sh", CLUSTERIP_COMMAND,
                "check", "-"});
  };
  const Finished good = check(toml({{"web", "10.96.0.1", 80, {{"127.0.0.1", 80}}}}));
  EXPECT_TRUE(exits(fine, good));
  EXPECT_EQ(good.out, "<stdin>: valid\n");
  const Finished bad = check("[[service]]\nnaem = \"web\"\n");
  EXPECT_TRUE(exits(configuration, bad));
  EXPECT_TRUE(contains(bad.err, "<stdin>:2:1: ")) << bad.err;
}

TEST_F(Command, CheckWarnsOfWhatTheUserspaceEngineDoesNot) {
  const Finished check = clusterip({"check", directory_.write("warned.toml",
                                                              "[[service]]\n"
                                                              "name = \"web\"\n"
                                                              "vip = \"10.96.0.1\"\n"
                                                              "port = 80\n"
                                                              "engine = \"userspace\"\n"
                                                              "no_backend = \"unreachable\"\n"
                                                              "backends = [ \"127.0.0.1:80\" ]\n")});
  EXPECT_TRUE(exits(fine, check));
  EXPECT_TRUE(contains(check.err, "no_backend: the userspace engine refuses, whatever this says")) << check.err;
}

TEST_F(Command, VersionIsThatOfTheCommandAndOfThePlugin) {
  const Finished version = run({CLUSTERIP_COMMAND, "--plugin", CLUSTERIP_PLUGIN_PATH, "--version"});
  EXPECT_TRUE(exits(fine, version));
  EXPECT_EQ(lines(version.out), 2) << version.out;
  EXPECT_TRUE(version.out.starts_with("clusterip ") && contains(version.out, "\nlibclusterip ")) << version.out;
  EXPECT_TRUE(contains(version.out, CLUSTERIP_PLUGIN_PATH)) << version.out;
}

TEST_F(Command, WhatCannotBeWrittenIsAFailure) {
  const Finished probe =
      run({"sh", "-c", "\"$@\" >/dev/full", "sh", CLUSTERIP_COMMAND, "--plugin", CLUSTERIP_PLUGIN_PATH, "probe"});
  EXPECT_TRUE(fails_in_one_line(1, probe));
  EXPECT_TRUE(contains(probe.err, "standard output: No space left on device")) << probe.err;
}

TEST_F(Command, MissingPluginFails) {
  EXPECT_TRUE(fails_in_one_line(1, run({CLUSTERIP_COMMAND, "--plugin", "/nonexistent/libclusterip.so.1", "probe"})));
}

TEST_F(Command, LibraryThatIsNoPluginIsToldFromOneOfAnotherAbi) {
  const auto probe_with = [&](const std::string& name, const std::string& code) {
    const std::string library = directory_.path() + "/" + name;
    const Finished built =
        run({"cc", "-shared", "-fPIC", "-x", "c", "-o", library, directory_.write(name + ".c", code)});
    EXPECT_TRUE(exits(0, built));
    return run({CLUSTERIP_COMMAND, "--plugin", library, "probe"});
  };
  const Finished nothing = probe_with("nothing.so", "int nothing;\n");
  EXPECT_TRUE(fails_in_one_line(1, nothing));
  EXPECT_TRUE(contains(nothing.err, "nothing.so: is no clusterip plugin")) << nothing.err;
  const Finished later = probe_with("later.so", "unsigned clusterip_abi_version(void) { return 2 << 16 | 3; }\n");
  EXPECT_TRUE(fails_in_one_line(1, later));
  EXPECT_TRUE(contains(later.err, "later.so: has ABI 2.3, this command needs ABI 1")) << later.err;
  const Finished half = probe_with("half.so", "unsigned clusterip_abi_version(void) { return 1 << 16; }\n");
  EXPECT_TRUE(fails_in_one_line(1, half));
  EXPECT_TRUE(contains(half.err, "clusterip_version_string")) << half.err;
}

TEST_F(Command, LoadStatusResolveUnload) {
  const NamedServer one("one", "127.0.0.1"), two("two", "127.0.0.2");
  const Finished loaded = load(
      toml({{"web", "10.96.0.1", 80, {backend(one, 3), backend(two, 1, "drain")}}, {"empty", "10.96.0.2", 443, {}}}));
  ASSERT_TRUE(exits(fine, loaded));
  EXPECT_EQ(loaded.err, "");
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("one")) << "the fast path outlives the command";
  EXPECT_EQ(ask("10.96.0.2", 443), refused_by_program(ECONNREFUSED));

  const Finished status = clusterip({"status", "--pin", pin()});
  EXPECT_TRUE(exits(fine, status));
  for (const std::string& piece : {std::string("web"), std::string("empty"), std::string("10.96.0.1:80"),
                                   std::string("drain"), "127.0.0.1:" + std::to_string(one.port())})
    EXPECT_TRUE(contains(status.out, piece)) << piece << "\n" << status.out;
  const Finished json = clusterip({"status", "--pin", pin(), "--json"});
  EXPECT_TRUE(exits(fine, json));
  EXPECT_TRUE(is_json(json.out)) << json.out;
  EXPECT_EQ(jq(".services | sort_by(.name) | map({name, vip, port, connects, refused})", json.out),
            "[{\"name\":\"empty\",\"vip\":\"10.96.0.2\",\"port\":443,\"connects\":0,\"refused\":1},"
            "{\"name\":\"web\",\"vip\":\"10.96.0.1\",\"port\":80,\"connects\":1,\"refused\":0}]\n")
      << json.out;
  EXPECT_EQ(jq(".canary.passed", json.out), "true\n") << json.out;

  const Finished resolved = clusterip({"resolve", "10.96.0.1:80", "--pin", pin()});
  EXPECT_TRUE(exits(fine, resolved));
  EXPECT_TRUE(contains(resolved.out, "web")) << resolved.out;
  EXPECT_TRUE(contains(resolved.out, "127.0.0.1:" + std::to_string(one.port()))) << resolved.out;
  const Finished resolved_json = clusterip({"resolve", "10.96.0.1:80", "--pin", pin(), "--json"});
  EXPECT_EQ(jq(".service, .backend.port", resolved_json.out), "web\n" + std::to_string(one.port()) + "\n")
      << resolved_json.out;
  for (const char* target : {"10.96.0.1:80/udp", "10.96.0.1:81", "10.96.0.9:80", "10.96.0.2:443"})
    EXPECT_TRUE(exits(fine, clusterip({"resolve", target, "--pin", pin()}))) << target;
  const Finished empty = clusterip({"resolve", "10.96.0.2:443", "--pin", pin()});
  EXPECT_TRUE(contains(empty.out, "a connect() fails with ECONNREFUSED (no_backend = \"refuse\")")) << empty.out;
  EXPECT_EQ(jq(".no_backend", clusterip({"resolve", "10.96.0.2:443", "--pin", pin(), "--json"}).out), "refuse\n");

  const BpfObjects ours = objects_of(cgroup());
  const Finished unloaded = unload();
  EXPECT_TRUE(exits(fine, unloaded));
  EXPECT_EQ(unloaded.err, "");
  EXPECT_EQ(ask("10.96.0.1", 80), refused_with(ENETUNREACH));
  EXPECT_TRUE(connect4_programs(cgroup()).empty());
  EXPECT_FALSE(std::filesystem::exists(pin()));
  EXPECT_TRUE(eventually([&] { return still_there(ours) == 0; }));
  EXPECT_TRUE(exits(fine, unload())) << "nothing to do is no failure";
}

TEST_F(Command, LoadAgainReplacesWithoutAGap) {
  const NamedServer one("one"), two("two");
  ASSERT_TRUE(exits(fine, load(toml({{"web", "10.96.0.1", 80, {backend(one)}}}))));
  Asker asker("10.96.0.1", 80);
  for (int round = 0; round < 4; ++round) {
    ASSERT_TRUE(exits(fine, load(toml({{"web", "10.96.0.1", 80, {backend(round % 2 == 0 ? two : one)}}}))));
    asker.wait_for(10);
  }
  const auto answers = asker.stop();
  EXPECT_EQ(answers.size(), 2u) << testing::PrintToString(answers);
  EXPECT_TRUE(answers.contains("one") && answers.contains("two")) << testing::PrintToString(answers);
  EXPECT_TRUE(exits(fine, unload()));
}

TEST_F(Command, LoadOfABadFileKeepsWhatServes) {
  const NamedServer one("one");
  ASSERT_TRUE(exits(fine, load(toml({{"web", "10.96.0.1", 80, {backend(one)}}}))));
  for (const std::string& text :
       {std::string("[[service]\n"), std::string("[[service]]\nname = 7\n"), std::string(100, '\xfe')}) {
    const Finished bad = load(text);
    EXPECT_TRUE(exits(configuration, bad));
    EXPECT_TRUE(contains(bad.err, "services.toml:1:") || contains(bad.err, "services.toml:2:")) << bad.err;
    EXPECT_EQ(ask("10.96.0.1", 80), answered_by("one"));
  }
  EXPECT_TRUE(exits(fine, unload()));
}

TEST_F(Command, UnloadLeavesForeignPrograms) {
  const NamedServer one("one");
  const ForeignProgram before(cgroup(), 7771);
  ASSERT_TRUE(exits(fine, load(toml({{"web", "10.96.0.1", 80, {backend(one)}}}))));
  const ForeignProgram after(cgroup(), 7772);
  EXPECT_TRUE(exits(fine, unload()));
  EXPECT_EQ(connect4_programs(cgroup()), (std::vector{before.id(), after.id()}));
}

TEST_F(Command, MissingCgroupExitsWith4) {
  const std::string file = directory_.write("services.toml", toml({}));
  const Finished missing =
      clusterip({"load", "--config", file, "--cgroup", cgroup().path() + "/missing", "--pin", pin()});
  EXPECT_TRUE(fails_in_one_line(cannot, missing));
  EXPECT_TRUE(contains(missing.err, cgroup().path() + "/missing")) << missing.err;
  EXPECT_FALSE(std::filesystem::exists(pin()));
  EXPECT_TRUE(
      fails_in_one_line(cannot, clusterip({"load", "--config", file, "--cgroup", directory_.path(), "--pin", pin()})));
  EXPECT_FALSE(std::filesystem::exists(pin()));
}

TEST_F(Command, EmptyPathsAreUsageErrors) {
  const std::string file = directory_.write("services.toml", toml({}));
  for (const auto& words : {std::vector<std::string>{"load", "--config", file, "--cgroup", "", "--pin", pin()},
                            {"load", "--config", file, "--cgroup", cgroup().path(), "--pin", ""},
                            {"load", "--config", file, "--cgroup=", "--pin", pin()}}) {
    // Were it taken for the whole host, it would not get there.
    const auto unable_to_attach = [] {
      forbid({{SYS_bpf, BPF_LINK_CREATE, EPERM}, {SYS_bpf, BPF_PROG_ATTACH, EPERM}});
    };
    EXPECT_TRUE(fails_in_one_line(usage, Process(command(words), nullptr, unable_to_attach).wait()))
        << testing::PrintToString(words);
    EXPECT_TRUE(connect4_programs(cgroup()).empty());
    EXPECT_FALSE(std::filesystem::exists(pin()));
  }
}

TEST_F(Command, UnloadKeepsForeignPins) {
  ASSERT_TRUE(std::filesystem::create_directory(pin()));
  ASSERT_EQ(::chmod(pin().c_str(), 0700), 0);
  const std::string map = pin() + "/Meta_Map";
  pin_foreign_map(map);
  const Finished unloaded = unload();
  EXPECT_TRUE(fails_in_one_line(1, unloaded));
  EXPECT_TRUE(contains(unloaded.err, map)) << unloaded.err;
  EXPECT_TRUE(std::filesystem::remove(map));
}

TEST_F(Command, PinPathOutsideTheBpfFilesystemExitsWith4) {
  const std::string file = directory_.write("services.toml", toml({}));
  const std::string path = directory_.path() + "/clusterip";
  const Finished finished = clusterip({"load", "--config", file, "--cgroup", cgroup().path(), "--pin", path});
  EXPECT_TRUE(fails_in_one_line(cannot, finished));
  EXPECT_TRUE(contains(finished.err, path)) << finished.err;
  EXPECT_FALSE(std::filesystem::exists(path));
  EXPECT_TRUE(connect4_programs(cgroup()).empty());
}

TEST_F(Command, WithoutPrivilegesExitsWith4) {
  const std::string file = directory_.write("services.toml", toml({}));
  for (const auto& words :
       {std::vector<std::string>{"load", "--config", file, "--cgroup", cgroup().path(), "--pin", pin()}, {"probe"}}) {
    EXPECT_TRUE(fails_in_one_line(cannot, Process(command(words), nullptr, drop_capabilities).wait())) << words[0];
  }
  EXPECT_TRUE(connect4_programs(cgroup()).empty());
  EXPECT_FALSE(std::filesystem::exists(pin()));
}

TEST_F(Command, CheckNeedsNoPrivileges) {
  const std::string file = directory_.write("services.toml", toml({}));
  EXPECT_TRUE(exits(fine, Process(command({"check", file}), nullptr, drop_capabilities).wait()));
}

TEST_F(Command, WithoutBpfExitsWith4) {
  const std::string file = directory_.write("services.toml", toml({}));
  const auto without_bpf = [] { forbid({{SYS_bpf, {}, ENOSYS}}); };
  EXPECT_TRUE(fails_in_one_line(
      cannot,
      Process(command({"load", "--config", file, "--cgroup", cgroup().path(), "--pin", pin()}), nullptr, without_bpf)
          .wait()));
  const Finished probe = Process(command({"probe"}), nullptr, without_bpf).wait();
  EXPECT_EQ(probe.exit_code, cannot) << probe.out << probe.err;
}

TEST_F(Command, ProbeTellsAboutThisKernel) {
  const Finished probe = clusterip({"probe"});
  EXPECT_TRUE(exits(fine, probe));
  EXPECT_GE(lines(probe.out), 2);
  const Finished json = clusterip({"probe", "--json"});
  EXPECT_TRUE(exits(fine, json));
  EXPECT_TRUE(is_json(json.out)) << json.out;
}

TEST_F(Command, StatusAndResolveOfNothingFail) {
  EXPECT_TRUE(fails_in_one_line(1, clusterip({"status", "--pin", pin()})));
  EXPECT_TRUE(fails_in_one_line(1, clusterip({"resolve", "10.96.0.1:80", "--pin", pin()})));
  EXPECT_FALSE(std::filesystem::exists(pin()));
}

TEST_F(Command, StatusFailsWhenSomebodyDetachedTheProgram) {
  ASSERT_TRUE(exits(fine, load(toml({}))));
  for (const std::uint32_t id : objects_of(cgroup()).links) detach_link(id);
  ASSERT_TRUE(connect4_programs(cgroup()).empty());
  EXPECT_TRUE(exits(1, clusterip({"status", "--pin", pin()}))) << "healthy is what the canary saw";
  EXPECT_TRUE(exits(fine, unload()));
}

TEST_F(Command, UnloadTellsThatTheDirectoryStaysWithWhatIsNotOurs) {
  ASSERT_TRUE(exits(fine, load(toml({}))));
  std::filesystem::create_directory(pin() + "/foreign");
  const Finished unloaded = unload();
  EXPECT_TRUE(exits(fine, unloaded));
  EXPECT_NE(unloaded.out.find("detached; " + pin() + " stays, with what somebody else has put there"),
            std::string::npos)
      << unloaded.out;
  std::filesystem::remove(pin() + "/foreign");
  std::filesystem::remove(pin());
}

TEST_F(Command, BpftoolListsTheNamesThatOperatorsKnow) {
  const NamedServer one("one");
  ASSERT_TRUE(exits(fine, load(toml({{"web", "10.96.0.1", 80, {backend(one)}}}))));
  const BpfObjects ours = objects_of(cgroup());
  ASSERT_EQ(ours.programs.size(), 1u);
  const std::string program = std::to_string(*ours.programs.begin());
  const Finished shown = run({"bpftool", "cgroup", "show", cgroup().path()});
  EXPECT_TRUE(contains(shown.out, "sock4_connect")) << shown.out << shown.err;
  EXPECT_TRUE(
      contains("\n" + run({"bpftool", "prog", "show"}).out, "\n" + program + ": cgroup_sock_addr  name sock4_connect"));
  std::string maps;
  for (const std::uint32_t id : ours.maps) maps += run({"bpftool", "map", "show", "id", std::to_string(id)}).out;
  EXPECT_TRUE(contains(maps, "name Service_Map")) << maps;
  EXPECT_TRUE(contains(maps, "name Backend_Map")) << maps;
  EXPECT_TRUE(exits(fine, unload()));
}

}  // namespace
