// SPDX-License-Identifier: BSD-2-Clause
//
// Where the kernel, the privileges or the paths do not allow it: one clear line, the right errno, nothing half done;
// where there is another way, the fast path takes it.
#include <linux/capability.h>
#include <linux/membarrier.h>
#include <sched.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <filesystem>

#include "tests/support/fixture.h"

namespace {

using namespace support;

class Refusal : public Integration {
 protected:
  /// One service on `server` at 10.96.0.1:80.
  static std::string text(const NamedServer& server) {
    return toml({{"web", "10.96.0.1", 80, {backend(server)}}}, {8, 8});
  }

  static void require_failure(int code, const Outcome& outcome) {
    require(outcome.code == code, "the code is " + std::to_string(outcome.code) + ": " + outcome.message);
    require(!outcome.message.empty() && outcome.message.find('\n') == std::string::npos,
            "not one line: " + outcome.message);
  }

  void expect_nothing_of_ours() {
    EXPECT_TRUE(connect4_programs(cgroup()).empty());
    EXPECT_FALSE(std::filesystem::exists(pin()));
  }
};

TEST_F(Refusal, WithoutCapabilitiesIsNotPermitted) {
  const NamedServer server("server");
  EXPECT_EQ(in_child([&] {
              drop_capabilities();
              for (const Paths& paths : {unpinned(), pinned()}) require_failure(-EPERM, open_outcome(plugin(), paths));
              clusterip_capabilities seen{};
              seen.size = sizeof seen;
              require(plugin().probe(&seen, nullptr) == -EPERM, "probe without capabilities");
            }),
            "");
  expect_nothing_of_ours();
}

TEST_F(Refusal, TwoCapabilitiesAreEnough) {
  const NamedServer one("one"), two("two");
  EXPECT_EQ(in_child([&] {
              drop_capabilities_except({CAP_BPF, CAP_NET_ADMIN});
              Handle handle = serve(text(one), pinned());
              require(ask("10.96.0.1", 80) == answered_by("one"), "not served");
              require_ok(handle.canary());
              require_ok(handle.load(text(two)));
              require(ask("10.96.0.1", 80) == answered_by("two"), "not changed");
            }),
            "");
  EXPECT_EQ(in_child([&] {
              drop_capabilities_except({CAP_BPF, CAP_NET_ADMIN});
              Handle handle(plugin(), pinned());
              require_ok(handle.load(text(one)));
              require(ask("10.96.0.1", 80) == answered_by("one"), "not adopted");
              require_ok(handle.canary());
              require_ok(handle.detach());
            }),
            "");
  expect_nothing_of_ours();
}

TEST_F(Refusal, WithoutPerfmonTheStatusSaysThatSocketsStayWithABackendThatLeft) {
  const NamedUdpServer one("one"), two("two");
  EXPECT_EQ(in_child([&] {
              drop_capabilities_except({CAP_BPF, CAP_NET_ADMIN});
              Handle handle = serve(
                  toml({{"kept", "10.96.0.1", 53, {backend(one)}, "refuse", "protocol = \"udp\"\non_remove = \"keep\""},
                        {"udp", "10.96.0.2", 53, {backend(one)}, "refuse", "protocol = \"udp\""}}));
              const Fd fd = udp_socket();
              require(connect_errno(fd.get(), "10.96.0.2", 53) == 0, "not served");
              require_ok(handle.set_backends("udp", {backend(two)}));
              require(::send(fd.get(), "x", 1, 0) == 1, "the socket has been ended");
              require(receive(fd.get()) == "one from 10.96.0.2:53", "the socket has another backend");
              const auto seen = handle.visit();
              require(seen[0].reason.empty(), seen[0].reason);
              require(seen[1].reason.find("CAP_PERFMON") != std::string::npos, "no reason: " + seen[1].reason);
            }),
            "");
}

TEST_F(Refusal, WithPerfmonAloneSocketsOfTheOwnNamespaceAreEnded) {
  if (!can(CLUSTERIP_CAN_DESTROY)) SKIP_OR_FAIL("this kernel cannot end sockets");

  const NamedUdpServer one("one"), two("two");
  // A process whose namespace can be seen by whoever has no less capabilities, but not entered.
  Child neighbour([](const Channel& channel) {
    checked(::unshare(CLONE_NEWNET), "unshare");
    drop_capabilities();
    channel.tell('r');
    channel.hear();  // stays
  });
  neighbour.channel().hear();
  EXPECT_EQ(in_child([&] {
              drop_capabilities_except({CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON});
              Handle handle = serve(toml({{"udp", "10.96.0.2", 53, {backend(one)}, "refuse", "protocol = \"udp\""}}));
              const Fd fd = udp_socket();
              require(connect_errno(fd.get(), "10.96.0.2", 53) == 0, "not served");
              require_ok(handle.set_backends("udp", {backend(two)}));
              require(receive(fd.get()) == "ECONNABORTED", "the socket goes on");
              const auto seen = handle.visit();
              require(seen[0].reason.contains("CAP_SYS_PTRACE and CAP_SYS_ADMIN"),
                      "others are not told: " + seen[0].reason);
            }),
            "");
}

TEST_F(Refusal, DirectoryThatOthersCanWriteToIsNoPinPath) {
  const NamedServer server("server");
  const struct {
    uid_t owner;
    mode_t mode;
  } directories[] = {{65534, 0700}, {0, 0720}, {0, 0702}, {0, 0777}};
  for (const auto& [owner, mode] : directories) {
    SCOPED_TRACE(std::to_string(owner) + " " + std::to_string(mode));
    ASSERT_TRUE(std::filesystem::create_directory(pin()));
    ASSERT_EQ(::chmod(pin().c_str(), mode), 0);
    ASSERT_EQ(::chown(pin().c_str(), owner, 0), 0);
    Handle handle(plugin(), pinned());
    EXPECT_TRUE(fails_with(-EPERM, handle.load(text(server))));
    EXPECT_TRUE(fails_with(-EPERM, handle.attach()));
    EXPECT_TRUE(std::filesystem::is_empty(pin()));
    EXPECT_TRUE(connect4_programs(cgroup()).empty());
    EXPECT_EQ(ask("10.96.0.1", 80), refused_with(ENETUNREACH));

    ASSERT_TRUE(std::filesystem::remove(pin())) << "as the message says";
    ASSERT_TRUE(ok(handle.load(text(server))));
    ASSERT_TRUE(ok(handle.attach()));
    EXPECT_EQ(ask("10.96.0.1", 80), answered_by("server"));
    EXPECT_TRUE(ok(handle.detach()));
    expect_nothing_of_ours();
  }
}

TEST_F(Refusal, CheckNeedsNoCapabilities) {
  const NamedServer server("server");
  const std::string good = text(server);
  EXPECT_EQ(in_child([&] {
              drop_capabilities();
              const auto visit = [](const clusterip_error*, void*) {};
              require(plugin().check_text(good.data(), good.size(), "good.toml", visit, nullptr) == 0, "good text");
              require(plugin().check_text("x", 1, "bad.toml", visit, nullptr) == -EBADMSG, "bad text");
            }),
            "");
}

TEST_F(Refusal, CapabilitiesLostAfterOpenChangeNothing) {
  const NamedServer server("server");
  EXPECT_EQ(in_child([&] {
              Handle handle(plugin(), pinned());
              drop_capabilities();
              const Outcome loaded = handle.load(text(server));
              const Outcome attached = handle.attach();
              require(attached.code < 0, "attached without capabilities");
              require_failure(loaded.code < 0 ? -EPERM : 0, loaded.code < 0 ? loaded : Outcome{0, 0, 0, "fine"});
            }),
            "");
  expect_nothing_of_ours();
}

TEST_F(Refusal, MissingCgroupIsNotFound) {
  const std::string path = cgroup().path() + "/missing";
  const Outcome outcome = open_outcome(plugin(), {path, {}});
  EXPECT_TRUE(fails_with(-ENOENT, outcome));
  EXPECT_NE(outcome.message.find(path), std::string::npos) << outcome;
}

TEST_F(Refusal, CgroupThatIsAFileIsNoDirectory) {
  EXPECT_TRUE(fails_with(-ENOTDIR, open_outcome(plugin(), {cgroup().procs(), {}})));
}

TEST_F(Refusal, DirectoryThatIsNoCgroupIsInvalid) {
  const TemporaryDirectory directory;
  const Outcome outcome = open_outcome(plugin(), {directory.path(), {}});
  EXPECT_TRUE(fails_with(-EINVAL, outcome));
  EXPECT_NE(outcome.message.find(directory.path()), std::string::npos) << outcome;
}

TEST_F(Refusal, PinPathOutsideTheBpfFilesystemIsInvalid) {
  const TemporaryDirectory directory;
  for (const std::string& path : {directory.path(), directory.path() + "/clusterip"}) {
    const Outcome outcome = open_outcome(plugin(), {cgroup().path(), path});
    EXPECT_TRUE(fails_with(-EINVAL, outcome));
    EXPECT_NE(outcome.message.find(path), std::string::npos) << outcome;
  }
  EXPECT_TRUE(std::filesystem::is_empty(directory.path()));
}

TEST_F(Refusal, PinPathWhoseParentIsMissingIsNotFound) {
  const std::string path = std::string(bpffs) + "/missing/clusterip";
  const Outcome outcome = open_outcome(plugin(), {cgroup().path(), path});
  EXPECT_TRUE(fails_with(-ENOENT, outcome));
  EXPECT_NE(outcome.message.find(path), std::string::npos) << outcome;
  EXPECT_FALSE(std::filesystem::exists(std::string(bpffs) + "/missing"));
}

TEST_F(Refusal, KernelWithoutBpfIsNotSupported) {
  EXPECT_EQ(in_child([&] {
              forbid({{SYS_bpf, {}, ENOSYS}});
              for (const Paths& paths : {unpinned(), pinned()})
                require_failure(-EOPNOTSUPP, open_outcome(plugin(), paths));
              clusterip_capabilities seen{};
              seen.size = sizeof seen;
              require(plugin().probe(&seen, nullptr) == 0, "probe can tell that there is nothing");
              require((seen.can & (CLUSTERIP_CAN_CONNECT4 | CLUSTERIP_CAN_MAP_MEMORY)) == 0,
                      "probe claims what is not there");
              require(seen.reason[0] != '\0', "probe gives no reason");
            }),
            "");
  expect_nothing_of_ours();
}

TEST_F(Refusal, ForbiddenBpfIsNotPermitted) {
  EXPECT_EQ(in_child([&] {
              forbid({{SYS_bpf, {}, EPERM}});
              for (const Paths& paths : {unpinned(), pinned()}) require_failure(-EPERM, open_outcome(plugin(), paths));
            }),
            "");
  expect_nothing_of_ours();
}

TEST_F(Refusal, ForbiddenAttachLeavesNothing) {
  const NamedServer server("server");
  for (const int error : {EPERM, EINVAL}) {
    EXPECT_EQ(in_child([&] {
                forbid({{SYS_bpf, BPF_LINK_CREATE, error}, {SYS_bpf, BPF_PROG_ATTACH, error}});
                Handle handle(plugin(), pinned());
                require_ok(handle.load(text(server)));
                const Outcome outcome = handle.attach();
                require(outcome.code < 0 && !outcome.message.empty(), "attached although it was forbidden");
              }),
              "");
    expect_nothing_of_ours();
  }
}

TEST_F(Refusal, ForbiddenPinLeavesNothing) {
  const NamedServer server("server");
  EXPECT_EQ(in_child([&] {
              forbid({{SYS_bpf, BPF_OBJ_PIN, EPERM}});
              Handle handle(plugin(), pinned());
              require_ok(handle.load(text(server)));
              require_failure(-EPERM, handle.attach());
            }),
            "");
  expect_nothing_of_ours();
  EXPECT_EQ(ask("10.96.0.1", 80), refused_with(ENETUNREACH));
}

TEST_F(Refusal, WithoutLinksItAttachesTheOlderWay) {
  const NamedServer one("one"), two("two");
  const ForeignProgram foreign(cgroup(), 7771);
  const auto without_links = [&](const std::function<void()>& body) {
    return in_child([&] {
      forbid({{SYS_bpf, BPF_LINK_CREATE, EINVAL}});
      body();
    });
  };
  EXPECT_EQ(without_links([&] {
              {
                const Handle handle = serve(text(one));
                require(ask("10.96.0.1", 80) == answered_by("one"), "not served");
              }
              require(ask("10.96.0.1", 80) == refused_with(ENETUNREACH), "served after close");
            }),
            "");
  EXPECT_EQ(connect4_programs(cgroup()).size(), 1u);

  EXPECT_EQ(without_links([&] { const Handle handle = serve(text(one), pinned()); }), "");
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("one"));
  EXPECT_TRUE(objects_of(cgroup()).links.empty());

  Asker asker("10.96.0.1", 80);
  EXPECT_EQ(without_links([&] { const Handle handle = serve(text(two), pinned()); }), "");
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("two"));
  EXPECT_EQ(connect4_programs(cgroup()).size(), 2u);
  // Now with so many services that it takes another program, and from a process that could have links.
  {
    std::vector<Service> services = more_services(200, backend(two));
    services.push_back({"web", "10.96.0.1", 80, {backend(one)}});
    const Handle handle = serve(toml(services), pinned());
  }
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("one"));
  EXPECT_EQ(connect4_programs(cgroup()).size(), 2u);
  for (const auto& [answer, count] : asker.stop())
    EXPECT_TRUE(answer == "one" || answer == "two") << answer << " " << count;

  // As `clusterip unload` does: it knows the pin path alone.
  EXPECT_TRUE(ok(Handle(plugin(), {{}, pin()}).detach()));
  EXPECT_EQ(connect4_programs(cgroup()), std::vector{foreign.id()});
  EXPECT_FALSE(std::filesystem::exists(pin()));
  EXPECT_EQ(ask("127.0.0.1", 7771), refused_with(EPERM)) << "the other program runs";
}

TEST_F(Refusal, WithoutMembarrierChangesArePublishedAllTheSame) {
  const NamedServer one("one", "127.0.0.1"), two("two", "127.0.0.2");
  EXPECT_EQ(in_child([&] {
              forbid({{SYS_membarrier, {}, EINVAL}});
              Handle handle = serve(text(one));
              Asker asker("10.96.0.1", 80);
              for (int i = 0; i < 500; ++i) require_ok(handle.set_backends("web", {backend(i % 2 == 0 ? two : one)}));
              for (int i = 0; i < 50; ++i) require_ok(handle.load(text(i % 2 == 0 ? two : one)));
              asker.wait_for(10);
              for (const auto& [answer, count] : asker.stop()) require(answer == "one" || answer == "two", answer);
              require(ask("10.96.0.1", 80) == answered_by("one"), "the last change is not served");
            }),
            "");
}

TEST_F(Refusal, WithoutBatchesServicesAreLoadedAllTheSame) {
  const NamedServer one("one");
  EXPECT_EQ(in_child([&] {
              forbid({{SYS_bpf, BPF_MAP_UPDATE_BATCH, EINVAL},
                      {SYS_bpf, BPF_MAP_DELETE_BATCH, EINVAL},
                      {SYS_bpf, BPF_MAP_LOOKUP_BATCH, EINVAL}});
              std::vector<Service> services;
              for (std::uint16_t port = 1; port <= 200; ++port)
                services.push_back({"service-" + std::to_string(port), "10.96.0.1", port, {backend(one)}});
              Handle handle = serve(toml(services), pinned());
              for (std::uint16_t port = 1; port <= 200; ++port)
                require(ask("10.96.0.1", port) == answered_by("one"), "port " + std::to_string(port));
              services.resize(100);
              require_ok(handle.load(toml(services)));
              require(ask("10.96.0.1", 101) == refused_by_program(ECONNREFUSED), "a removed service serves");
              require(ask("10.96.0.1", 100) == answered_by("one"), "a kept service does not serve");
              Handle adopter(plugin(), pinned());
              require(adopter.visit().size() == 100, "adopted");
              require_ok(handle.detach());
            }),
            "");
}

TEST_F(Refusal, ProbeTellsWhatWasForbidden) {
  const auto probe_without = [&](const std::vector<Forbidden>& calls, std::uint32_t lost) {
    clusterip_capabilities before{}, after{};
    before.size = after.size = sizeof before;
    EXPECT_EQ(plugin().probe(&before, nullptr), 0);
    EXPECT_STREQ(before.reason, "");
    return in_child([&] {  // what this process has been told is not asked for again
      forbid(calls);
      require(plugin().probe(&after, nullptr) == 0, "probe");
      require((before.can & lost) == lost, "this kernel has it");
      require(after.can == (before.can & ~lost), "what is left: " + std::to_string(after.can));
    });
  };
  EXPECT_EQ(probe_without({{SYS_bpf, BPF_LINK_CREATE, EINVAL}}, CLUSTERIP_CAN_LINK), "");
  EXPECT_EQ(probe_without({{SYS_membarrier, {}, EINVAL}}, CLUSTERIP_CAN_MEMBARRIER), "");
  EXPECT_EQ(probe_without({{SYS_bpf, BPF_MAP_UPDATE_BATCH, EINVAL},
                           {SYS_bpf, BPF_MAP_LOOKUP_BATCH, EINVAL},
                           {SYS_bpf, BPF_MAP_DELETE_BATCH, EINVAL}},
                          CLUSTERIP_CAN_BATCH),
            "");
}

TEST_F(Refusal, PathsOfTheEngineTableAreTaken) {
  const NamedServer server("server");
  const std::string engine = "[engine]\ncgroup = \"" + cgroup().path() + "\"\npin = \"" + pin() + "\"\n";
  Handle handle(plugin(), {{}, {}, CLUSTERIP_ENGINE_TABLE});
  ASSERT_TRUE(ok(handle.load(engine + text(server))));
  ASSERT_TRUE(ok(handle.attach()));
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("server"));
  EXPECT_TRUE(std::filesystem::exists(pin()));
  ASSERT_TRUE(ok(handle.detach()));
  expect_nothing_of_ours();
}

TEST_F(Refusal, OptionsWinOverTheEngineTable) {
  const NamedServer server("server");
  Handle handle(plugin(), {cgroup().path(), pin(), CLUSTERIP_ENGINE_TABLE});
  ASSERT_TRUE(ok(handle.load("[engine]\ncgroup = \"/nonexistent\"\npin = \"/nonexistent\"\n" + text(server))));
  ASSERT_TRUE(ok(handle.attach()));
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("server"));
  ASSERT_TRUE(ok(handle.detach()));
}

TEST_F(Refusal, MissingPathsOfTheEngineTableAreNotFound) {
  const NamedServer server("server");
  for (const std::string& engine :
       {"[engine]\ncgroup = \"" + cgroup().path() + "/missing\"\npin = \"" + pin() + "\"\n",
        "[engine]\ncgroup = \"" + cgroup().path() + "\"\npin = \"" + bpffs + "/missing/pin\"\n"}) {
    Handle handle(plugin(), {{}, {}, CLUSTERIP_ENGINE_TABLE});
    EXPECT_TRUE(fails_with(-ENOENT, handle.load(engine + text(server))));
    expect_nothing_of_ours();
  }
}

TEST_F(Refusal, PathsOfATextThatFailedAreForgotten) {
  const NamedServer server("server");
  const auto engine = [](const std::string& cgroup, const std::string& pin) {
    return "[engine]\ncgroup = \"" + cgroup + "\"\npin = \"" + pin + "\"\n";
  };
  for (const std::string& mistaken : {engine("/nonexistent", pin()), engine("/nonexistent", pin() + "_other"),
                                      engine(cgroup().path(), std::string(bpffs) + "/missing/pin")}) {
    Handle handle(plugin(), {{}, {}, CLUSTERIP_ENGINE_TABLE});
    EXPECT_TRUE(fails_with(-ENOENT, handle.load(mistaken + text(server))));
    ASSERT_TRUE(ok(handle.load(engine(cgroup().path(), pin()) + text(server)))) << mistaken;
    ASSERT_TRUE(ok(handle.attach()));
    EXPECT_EQ(ask("10.96.0.1", 80), answered_by("server"));
    EXPECT_TRUE(std::filesystem::exists(pin()));
    ASSERT_TRUE(ok(handle.detach()));
    expect_nothing_of_ours();
  }
}

}  // namespace
