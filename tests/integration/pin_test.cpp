// SPDX-License-Identifier: BSD-2-Clause
//
// The fast path outlives the process that made it.
#include <arpa/inet.h>
#include <bpf/bpf.h>
#include <fmt/format.h>
#include <linux/membarrier.h>
#include <poll.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <memory>
#include <set>

#include "bpf/map_layout.h"
#include "tests/support/fixture.h"

namespace {

using namespace support;

class Pin : public Integration {
 protected:
  /// Another process makes the fast path live and ends.
  void pin_from_another_process(const std::string& text) {
    ASSERT_EQ(in_child([&] { const Handle handle = serve(text, pinned()); }), "");
  }

  /// The index in Record_Map of the service of this name.
  static std::uint32_t record_of(const Fd& records, const std::string& name) {
    for (std::uint32_t record = 0;; ++record)  // ends, with an exception, behind the last one
      if (const auto value = read_element<service_record>(records, record); value.word != 0 && value.name == name)
        return record;
  }

  /// The backends that 1,000 resolutions give for 10.96.0.1:80.
  static std::set<std::string> resolved_backends(Handle& handle) {
    std::set<std::string> addresses;
    for (int i = 0; i < 1'000; ++i) {
      clusterip_resolution seen;
      require_ok(handle.resolve("10.96.0.1", 80, seen));
      sockaddr_in backend{};
      std::memcpy(&backend, &seen.backend, sizeof backend);
      addresses.insert(::inet_ntoa(backend.sin_addr));
    }
    return addresses;
  }

  /// What the key of 10.96.0.1 and this port leads to in Service_Map.
  static constexpr std::uint32_t nothing = 0xffffffff;
  std::uint32_t record_at(std::uint16_t port) const {
    std::uint32_t record = nothing;
    return element_of_keys(BPF_MAP_LOOKUP_ELEM, port, record) == 0 ? record : nothing;
  }
  void lead(std::uint16_t port, std::uint32_t record) const {
    checked(element_of_keys(BPF_MAP_UPDATE_ELEM, port, record), "BPF_MAP_UPDATE_ELEM");
  }
  int element_of_keys(bpf_cmd command, std::uint16_t port, std::uint32_t& record) const {
    const Fd map = pinned_map(pin(), "Service_Map");
    service_key key{};
    key.address[2] = htonl(0xffff);
    key.address[3] = htonl(0x0a600001);
    key.port = htons(port);
    key.protocol = IPPROTO_TCP;
    bpf_attr attr{};
    attr.map_fd = static_cast<std::uint32_t>(map.get());
    attr.key = reinterpret_cast<std::uint64_t>(&key);
    attr.value = reinterpret_cast<std::uint64_t>(&record);
    return bpf(command, attr);
  }

  void remove_all_of_ours() { EXPECT_TRUE(ok(Handle(plugin(), pinned()).detach())); }
};

TEST_F(Pin, ServesAfterItsProcessEnded) {
  const NamedServer server("server");
  pin_from_another_process(toml({{"web", "10.96.0.1", 80, {backend(server)}}}));
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("server"));
  remove_all_of_ours();
}

TEST_F(Pin, ServesAfterItsProcessEndedWithoutClosing) {
  const NamedServer server("server");
  EXPECT_EQ(in_child([&] { new Handle(serve(toml({{"web", "10.96.0.1", 80, {backend(server)}}}), pinned())); }), "");
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("server"));
  remove_all_of_ours();
}

TEST_F(Pin, SecondOpenSeesWhatIsServed) {
  const NamedServer one("one", "127.0.0.1"), two("two", "127.0.0.2");
  pin_from_another_process(toml({{"first", "10.96.0.1", 80, {backend(one, 7), backend(two, 9, "drain")}},
                                 {"second", "10.96.0.2", 443, {}, "unreachable"}}));
  for (int i = 0; i < 4; ++i) ASSERT_EQ(ask("10.96.0.1", 80), answered_by("one"));
  EXPECT_EQ(ask("10.96.0.2", 443), refused_by_program(EHOSTUNREACH));

  Handle handle(plugin(), pinned());
  const auto seen = handle.visit();
  ASSERT_EQ(seen.size(), 2u);
  EXPECT_EQ(seen[0].name, "first");
  EXPECT_EQ(seen[0].vip, "10.96.0.1");
  EXPECT_EQ(seen[0].port, 80);
  EXPECT_EQ(seen[0].protocol, IPPROTO_TCP);
  EXPECT_EQ(seen[0].policy, "random");
  EXPECT_EQ(seen[0].no_backend, "refuse");
  EXPECT_EQ(seen[0].engine, CLUSTERIP_ENGINE_BPF);
  EXPECT_EQ(seen[0].reason, "");
  EXPECT_EQ(seen[0].connects, 4u);
  ASSERT_EQ(seen[0].backends.size(), 2u);
  const auto active = std::ranges::find(seen[0].backends, "127.0.0.1", &SeenBackend::address);
  const auto draining = std::ranges::find(seen[0].backends, "127.0.0.2", &SeenBackend::address);
  ASSERT_NE(active, seen[0].backends.end());
  ASSERT_NE(draining, seen[0].backends.end());
  EXPECT_EQ(active->port, one.port());
  EXPECT_EQ(active->weight, 7u);
  EXPECT_EQ(active->state, CLUSTERIP_ACTIVE);
  EXPECT_EQ(active->connects, 4u);
  EXPECT_EQ(draining->weight, 9u);
  EXPECT_EQ(draining->state, CLUSTERIP_DRAIN);
  EXPECT_EQ(seen[1].name, "second");
  EXPECT_EQ(seen[1].no_backend, "unreachable");
  EXPECT_EQ(seen[1].refused, 1u);

  clusterip_resolution resolution;
  EXPECT_TRUE(ok(handle.resolve("10.96.0.1", 80, resolution)));
  EXPECT_STREQ(resolution.service, "first");
  EXPECT_TRUE(ok(handle.canary()));
  EXPECT_TRUE(ok(handle.detach()));
}

TEST_F(Pin, AdoptedStateCanBeChanged) {
  const NamedServer one("one"), two("two"), three("three");
  pin_from_another_process(toml({{"web", "10.96.0.1", 80, {backend(one)}}}));
  Handle handle(plugin(), pinned());
  ASSERT_TRUE(ok(handle.set_backends("web", {backend(two)})));
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("two"));
  ASSERT_TRUE(ok(handle.load(toml({{"web", "10.96.0.1", 80, {backend(three)}}}))));
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("three")) << "live when the call returns";
  ASSERT_TRUE(ok(handle.attach()));
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("three"));
  EXPECT_EQ(connect4_programs(cgroup()).size(), 1u);
  EXPECT_TRUE(ok(handle.detach()));
}

TEST_F(Pin, AdoptedStateKnowsItsCgroup) {
  const NamedServer one("one");
  pin_from_another_process(toml({{"web", "10.96.0.1", 80, {backend(one)}}}));
  Handle handle(plugin(), {{}, pin()});
  EXPECT_TRUE(ok(handle.canary()));
  EXPECT_TRUE(ok(handle.detach()));
  EXPECT_TRUE(connect4_programs(cgroup()).empty());
}

TEST_F(Pin, BadInputOnAdoptedStateChangesNothing) {
  const NamedServer one("one");
  pin_from_another_process(toml({{"web", "10.96.0.1", 80, {backend(one)}}}));
  Handle handle(plugin(), pinned());
  EXPECT_TRUE(fails_with(-EBADMSG, handle.load("[[service]]\nname = 1\n")));
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("one"));
  EXPECT_EQ(handle.visit().at(0).name, "web");
  EXPECT_TRUE(ok(handle.detach()));
}

TEST_F(Pin, ReloadsByOtherProcessesHaveNoGap) {
  const NamedServer one("one", "127.0.0.1"), two("two", "127.0.0.2"), other("other", "127.0.0.3");
  const auto text = [&](int round) {
    // Every third time so many more that the maps are outgrown.
    std::vector<Service> services = more_services(65u << round / 3, backend(other));
    services.push_back({"web", "10.96.0.1", 80, {backend(round % 2 == 0 ? one : two)}});
    return toml(services, {2'000, 2'000});
  };
  pin_from_another_process(text(0));
  Asker first("10.96.0.1", 80), second("10.96.0.1", 80);
  for (int round = 1; round < 12; ++round) {
    pin_from_another_process(text(round));
    EXPECT_EQ(ask("10.96.0.1", 80), answered_by(round % 2 == 0 ? "one" : "two"));
    EXPECT_EQ(connect4_programs(cgroup()).size(), 1u);
    first.wait_for(10);
  }
  for (Asker* asker : {&first, &second}) {
    const auto answers = asker->stop();
    EXPECT_EQ(answers.size(), 2u) << testing::PrintToString(answers);
    EXPECT_TRUE(answers.contains("one") && answers.contains("two")) << testing::PrintToString(answers);
  }
  remove_all_of_ours();
}

TEST_F(Pin, LooksDuringReplacementsSeeOneConfigurationOrTheOther) {
  const NamedServer one("one");
  const auto text = [&](std::uint32_t count) { return toml(more_services(count, backend(one)), {20'000, 20'000}); };
  pin_from_another_process(text(10));
  Child changer([&](const Channel& parent) {
    Handle handle(plugin(), pinned());
    for (std::uint32_t count = 70; count < 10'000; count *= 2) {  // each outgrows the maps
      require_ok(handle.load(text(count)));
      require_ok(handle.load(text(10)));
    }
    parent.tell('e');
  });
  int looks = 0;
  std::set<std::size_t> seen;
  pollfd ended{changer.channel().get(), POLLIN, 0};
  for (; ::poll(&ended, 1, 0) == 0; ++looks) {
    Handle handle(plugin(), pinned());
    seen.insert(handle.visit().size());
    clusterip_resolution resolution;
    ASSERT_TRUE(ok(handle.resolve("10.98.0.1", 80, resolution)));
    ASSERT_EQ(resolution.verdict, CLUSTERIP_VERDICT_REWRITTEN);
    ASSERT_STREQ(resolution.service, "more-0");
  }
  EXPECT_EQ(changer.wait(), "");
  EXPECT_GT(looks, 10);
  for (const std::size_t count : seen) EXPECT_TRUE(count == 10 || count % 70 == 0) << count;
  remove_all_of_ours();
}

TEST_F(Pin, CountersSurviveTheProcess) {
  const NamedServer one("one");
  const std::string text = toml({{"web", "10.96.0.1", 80, {backend(one)}}});
  pin_from_another_process(text);
  for (int i = 0; i < 3; ++i) ASSERT_EQ(ask("10.96.0.1", 80), answered_by("one"));
  pin_from_another_process(text);
  ASSERT_EQ(ask("10.96.0.1", 80), answered_by("one"));
  Handle handle(plugin(), pinned());
  EXPECT_EQ(handle.visit().at(0).connects, 4u);
  EXPECT_TRUE(ok(handle.detach()));
}

TEST_F(Pin, CountsAreCarriedToNewMapsByTheNextProcessIfNeedBe) {
  const NamedServer one("one");
  const auto text = [&](std::uint32_t more) {
    std::vector<Service> services = more_services(more, backend(one));
    services.push_back({"web", "10.96.0.1", 80, {backend(one)}});
    return toml(services);
  };
  // A process that ends before it has moved its pins up: behind the carrying of the counts, and in front of it.
  std::vector<Forbidden> forbidden = {{SYS_renameat2, {}, EIO}, {SYS_renameat, {}, EIO}};
#ifdef SYS_rename
  forbidden.push_back({SYS_rename, {}, EIO});
#endif
  for (const bool is_carried : {true, false}) {
    if (!is_carried) forbidden.push_back({SYS_membarrier, MEMBARRIER_CMD_GLOBAL, EPERM});
    pin_from_another_process(text(0));
    Fd open = tcp_socket();
    ASSERT_EQ(connect_errno(open.get(), "10.96.0.1", 80), 0);
    ASSERT_EQ(ask("10.96.0.1", 80), answered_by("one"));
    EXPECT_EQ(in_child([&] {
                Handle handle(plugin(), pinned());
                require_ok(handle.load(text(0)));  // adopts what is pinned, which takes a grace period
                forbid(forbidden);
                require_ok(handle.load(text(200)));
                require(std::filesystem::exists(pin() + "/next"), "the pins have been moved up");
              }),
              "");
    EXPECT_EQ(ask("10.98.0.1", 80), answered_by("one")) << "it had made the new maps live";
    ASSERT_EQ(ask("10.96.0.1", 80), answered_by("one"));

    Handle handle(plugin(), pinned());
    const auto web = [&] {
      const auto seen = handle.visit();
      return *std::ranges::find(seen, "web", &SeenService::name);
    };
    EXPECT_EQ(web().connects, 3u);
    EXPECT_EQ(web().backends.at(0).connects, 3u);
    EXPECT_EQ(web().live, 1u);
    open.reset();
    EXPECT_EQ(web().live, 0u);
    const Fd next = tcp_socket();
    ASSERT_EQ(connect_errno(next.get(), "10.96.0.1", 80), 0);
    EXPECT_EQ(web().live, 1u) << "it was not below 0 before";
    EXPECT_TRUE(ok(handle.detach()));
  }
}

TEST_F(Pin, DetachLeavesNothing) {
  const NamedServer server("server");
  pin_from_another_process(toml({{"web", "10.96.0.1", 80, {backend(server)}}}));
  const BpfObjects ours = objects_of(cgroup());
  EXPECT_EQ(ours.programs.size(), 1u);
  EXPECT_GE(ours.maps.size(), 2u);
  remove_all_of_ours();
  EXPECT_TRUE(connect4_programs(cgroup()).empty());
  EXPECT_FALSE(std::filesystem::exists(pin()));
  EXPECT_TRUE(eventually([&] { return still_there(ours) == 0; })) << still_there(ours);
  EXPECT_EQ(ask("10.96.0.1", 80), refused_with(ENETUNREACH));
}

TEST_F(Pin, DetachOfNothingIsFine) {
  EXPECT_TRUE(ok(Handle(plugin(), pinned()).detach()));
  EXPECT_FALSE(std::filesystem::exists(pin()));
}

TEST_F(Pin, OpenAloneLeavesNothing) {
  {
    const Handle handle(plugin(), pinned());
  }
  EXPECT_FALSE(std::filesystem::exists(pin()));
}

TEST_F(Pin, LoadWithoutAttachLeavesNothing) {
  const NamedServer server("server");
  {
    Handle handle(plugin(), pinned());
    ASSERT_TRUE(ok(handle.load(toml({{"web", "10.96.0.1", 80, {backend(server)}}}))));
  }
  EXPECT_TRUE(connect4_programs(cgroup()).empty());
  EXPECT_FALSE(std::filesystem::exists(pin()));
}

TEST_F(Pin, DetachedStateCanBeAttachedAgain) {
  const NamedServer server("server");
  Handle handle = serve(toml({{"web", "10.96.0.1", 80, {backend(server)}}}), pinned());
  ASSERT_TRUE(ok(handle.detach()));
  EXPECT_EQ(ask("10.96.0.1", 80), refused_with(ENETUNREACH));
  ASSERT_TRUE(ok(handle.load(toml({{"web", "10.96.0.1", 80, {backend(server)}}}))));
  ASSERT_TRUE(ok(handle.attach()));
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("server"));
  EXPECT_TRUE(ok(handle.detach()));
  EXPECT_FALSE(std::filesystem::exists(pin()));
}

TEST_F(Pin, ForeignProgramsSurviveAndGoOnRunning) {
  const NamedServer server("server");
  constexpr std::uint16_t before_port = 7771, after_port = 7772;
  const ForeignProgram before(cgroup(), before_port);
  pin_from_another_process(toml({{"web", "10.96.0.1", 80, {backend(server)}}}));
  const ForeignProgram after(cgroup(), after_port);
  const auto foreign_run = [&] {
    return ask("127.0.0.1", before_port) == refused_with(EPERM) && ask("127.0.0.1", after_port) == refused_with(EPERM);
  };
  EXPECT_TRUE(foreign_run());
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("server"));

  pin_from_another_process(toml({{"web", "10.96.0.2", 80, {backend(server)}}}));
  EXPECT_TRUE(foreign_run());
  EXPECT_EQ(ask("10.96.0.2", 80), answered_by("server"));
  EXPECT_EQ(connect4_programs(cgroup()).size(), 3u);

  remove_all_of_ours();
  EXPECT_EQ(connect4_programs(cgroup()), (std::vector{before.id(), after.id()}));
  EXPECT_TRUE(foreign_run());
}

TEST_F(Pin, ForeignProgramsOfOtherHooksGoOnRunning) {
  const NamedServer server("server", "::1");
  const NamedUdpServer udp("udp");
  constexpr std::uint16_t before_port = 7771, after_port = 7772;
  const std::string text = toml({{"tcp", "fd00::1", 80, {backend(server)}},
                                 {"udp", "10.96.0.1", 53, {backend(udp)}, "refuse", "protocol = \"udp\""}});
  const ForeignProgram before6(cgroup(), before_port, BPF_CGROUP_INET6_CONNECT);
  const ForeignProgram before_udp(cgroup(), before_port, BPF_CGROUP_UDP4_SENDMSG);
  pin_from_another_process(text);
  const ForeignProgram after6(cgroup(), after_port, BPF_CGROUP_INET6_CONNECT);
  const ForeignProgram after_udp(cgroup(), after_port, BPF_CGROUP_UDP4_SENDMSG);
  const auto expect_foreign_run = [&] {
    for (const std::uint16_t port : {before_port, after_port}) {
      EXPECT_EQ(ask("::1", port), refused_with(EPERM));
      EXPECT_EQ(exchange(udp_socket().get(), "127.0.0.1", port), "EPERM");
    }
  };
  const auto expect_ours_run = [] {
    EXPECT_EQ(ask("fd00::1", 80), answered_by("server"));
    EXPECT_EQ(exchange(udp_socket().get(), "10.96.0.1", 53), "udp from 10.96.0.1:53");
  };
  expect_foreign_run();
  expect_ours_run();
  {  // so many more that all programs are exchanged
    std::vector<Service> more = more_services(200, backend(udp));
    pin_from_another_process(text + toml(more).substr(toml({}).size()));
  }
  expect_foreign_run();
  expect_ours_run();
  remove_all_of_ours();
  EXPECT_EQ(programs_at(cgroup(), BPF_CGROUP_INET6_CONNECT), (std::vector{before6.id(), after6.id()}));
  EXPECT_EQ(programs_at(cgroup(), BPF_CGROUP_UDP4_SENDMSG), (std::vector{before_udp.id(), after_udp.id()}));
  expect_foreign_run();
}

TEST_F(Pin, BesideAProgramThatAllowsNoOtherNothingIsAttached) {
  const NamedServer server("server");
  Handle handle(plugin(), pinned());
  ASSERT_TRUE(ok(handle.load(toml({{"web", "10.96.0.1", 80, {backend(server)}}}))));
  for (const bpf_attach_type hook : {BPF_CGROUP_INET4_CONNECT, BPF_CGROUP_UDP6_SENDMSG}) {
    const ForeignProgram exclusive(cgroup(), 7771, hook, 0);
    const Outcome attached = handle.attach();
    EXPECT_TRUE(fails_with(-EPERM, attached));
    EXPECT_NE(attached.message.find("BPF_F_ALLOW_MULTI"), std::string::npos) << attached;
    EXPECT_EQ(programs_at(cgroup(), hook), std::vector{exclusive.id()});
    EXPECT_EQ(ask("10.96.0.1", 80), refused_with(ENETUNREACH));
    EXPECT_TRUE(std::filesystem::is_empty(pin())) << "but for the lock";
  }
  ASSERT_TRUE(ok(handle.attach())) << "it has gone";
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("server"));
  EXPECT_TRUE(ok(handle.detach()));
}

TEST_F(Pin, ForeignFilesInTheSameDirectoryAreNotTouched) {
  const NamedServer server("server");
  const std::string neighbour = std::string(bpffs) + "/neighbour";
  std::filesystem::create_directory(neighbour);
  pin_from_another_process(toml({{"web", "10.96.0.1", 80, {backend(server)}}}));
  remove_all_of_ours();
  EXPECT_TRUE(std::filesystem::remove(neighbour));
}

TEST_F(Pin, SecondProcessThatWantsToChangeIsBusy) {
  const NamedServer one("one"), two("two");
  auto handle = std::make_unique<Handle>(serve(toml({{"web", "10.96.0.1", 80, {backend(one)}}}), pinned()));
  const auto change = [&](int expected) {
    return in_child([&] {
      Handle second(plugin(), pinned());
      require(second.visit().size() == 1, "looking is allowed");
      const Outcome loaded = second.load(toml({{"web", "10.96.0.1", 80, {backend(two)}}}));
      require(loaded.code == expected, "load: " + std::to_string(loaded.code) + " " + loaded.message);
      const Outcome set = second.set_backends("web", {backend(two)});
      require(set.code == expected, "set_backends: " + std::to_string(set.code) + " " + set.message);
      const Outcome attached = second.attach();
      require(attached.code == expected, "attach: " + std::to_string(attached.code) + " " + attached.message);
    });
  };
  EXPECT_EQ(change(-EBUSY), "");
  EXPECT_EQ(in_child([&] { require(Handle(plugin(), pinned()).detach().code == -EBUSY, "detach of a busy one"); }), "");
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("one"));
  handle.reset();
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("one"));
  EXPECT_EQ(change(0), "");
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("two"));
  remove_all_of_ours();
}

TEST_F(Pin, AttachToAnotherCgroupIsRefused) {
  const NamedServer one("one"), two("two");
  const Cgroup other;
  pin_from_another_process(toml({{"web", "10.96.0.1", 80, {backend(one)}}}));
  {
    Handle handle(plugin(), {other.path(), pin()});
    const Outcome outcome = handle.attach();
    EXPECT_LT(outcome.code, 0);
    EXPECT_NE(outcome.message.find(cgroup().path()), std::string::npos) << outcome;
  }
  EXPECT_TRUE(connect4_programs(other).empty());
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("one"));
  remove_all_of_ours();
}

TEST_F(Pin, LoadForAnotherCgroupChangesNothing) {
  const NamedServer one("one"), two("two");
  const Cgroup other;
  pin_from_another_process(toml({{"web", "10.96.0.1", 80, {backend(one)}}}));
  {
    Handle handle(plugin(), {other.path(), pin()});
    const Outcome outcome = handle.load(toml({{"web", "10.96.0.1", 80, {backend(two)}}}));
    EXPECT_EQ(outcome.code, -EEXIST) << outcome;
  }
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("one"));
  remove_all_of_ours();
}

TEST_F(Pin, StateOfAnotherLayoutIsRefusedServesOnAndCanBeRemoved) {
  const NamedServer server("server");
  const std::string text = toml({{"web", "10.96.0.1", 80, {backend(server)}}});
  pin_from_another_process(text);
  {
    const Fd map = pinned_map(pin(), "Meta_Map");
    auto meta = read_element<meta_record>(map, 0);
    ASSERT_EQ(meta.version, std::uint32_t{LAYOUT_VERSION});
    ++meta.version;
    write_element(map, 0, meta);
  }
  Handle handle(plugin(), pinned());
  const Outcome outcome = handle.load(text);
  EXPECT_LT(outcome.code, 0);
  EXPECT_NE(outcome.message.find("version"), std::string::npos) << outcome;
  EXPECT_THROW(handle.visit(), std::runtime_error);
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("server"));
  EXPECT_TRUE(ok(handle.detach()));
  EXPECT_TRUE(connect4_programs(cgroup()).empty());
  EXPECT_FALSE(std::filesystem::exists(pin()));
}

TEST_F(Pin, DamagedWordIsSkippedAndTheNextLoadHealsIt) {
  const NamedServer one("one"), other("other");
  const std::string text =
      toml({{"web", "10.96.0.1", 80, {backend(one)}}, {"other", "10.96.0.2", 80, {backend(other)}}});
  for (const std::uint64_t word :
       {std::uint64_t{0xffffffff'00000001}, std::uint64_t{0x00000001'00000000}, std::uint64_t{0x00000001'ffffffff},
        std::uint64_t{0x00000001'00ffffff}, std::uint64_t{0xffffffff'ffffffff}}) {
    SCOPED_TRACE(fmt::format("{:#x}", word));
    pin_from_another_process(text);
    const auto damage = [&] {
      const Fd records = pinned_map(pin(), "Record_Map");
      const std::uint32_t record = record_of(records, "web");
      auto value = read_element<service_record>(records, record);
      value.word = word;
      write_element(records, record, value);
    };
    damage();
    EXPECT_EQ(in_child([&] {
                Handle handle(plugin(), pinned());
                const auto seen = handle.visit();
                require(seen.size() == 1 && seen[0].name == "other", "visit");
                clusterip_resolution resolution;
                const Outcome resolved = handle.resolve("10.96.0.1", 80, resolution);
                require(resolved.code == -EPROTO && !resolved.message.empty(), "resolve: " + resolved.message);
                require_ok(handle.load(text));
                require(ask("10.96.0.1", 80) == answered_by("one"), "the damaged service does not serve again");
                require(ask("10.96.0.2", 80) == answered_by("other"), "the other service does not serve");
              }),
              "");
    damage();
    remove_all_of_ours();
    EXPECT_TRUE(connect4_programs(cgroup()).empty());
    EXPECT_FALSE(std::filesystem::exists(pin()));
  }
}

TEST_F(Pin, DamagedHeaderIsForgottenByTheNextLoad) {
  const NamedServer one("one"), other("other");
  const std::string text =
      toml({{"web", "10.96.0.1", 80, {backend(one)}}, {"other", "10.96.0.2", 80, {backend(other)}}});
  pin_from_another_process(text);
  {
    const Fd records = pinned_map(pin(), "Record_Map"), slots = pinned_map(pin(), "Slot_Map");
    const auto header =
        static_cast<std::uint32_t>(read_element<service_record>(records, record_of(records, "web")).word);
    auto damaged = read_element<block_header>(slots, header);
    damaged.flags = BLOCK_EJECT;  // what is to follow then does not follow
    write_element(slots, header, damaged);
  }
  // The record that had led there must not, when something else stands there again.
  for (int process = 0; process < 2; ++process) {
    EXPECT_EQ(in_child([&] {
                Handle handle(plugin(), pinned());
                require_ok(handle.load(text));
                require(handle.visit().size() == 2, "there are others than the two");
                require(ask("10.96.0.1", 80) == answered_by("one"), "the damaged service does not serve again");
              }),
              "")
        << process;
  }
  remove_all_of_ours();
}

TEST_F(Pin, KeyThatLeadsToAnotherServicesRecordIsNotFollowed) {
  // What a reader sees when the kernel uses a hash element again under it.
  const NamedServer one("one"), two("two");
  Handle handle =
      serve(toml({{"a", "10.96.0.1", 80, {backend(one)}}, {"b", "10.96.0.1", 81, {backend(two)}}}), pinned());
  lead(80, record_at(81));
  EXPECT_EQ(ask("10.96.0.1", 80), refused_by_program(ECONNREFUSED));
  EXPECT_EQ(ask("10.96.0.1", 81), answered_by("two"));
  clusterip_resolution resolution;
  EXPECT_EQ(handle.resolve("10.96.0.1", 80, resolution).code, -EPROTO);
  EXPECT_TRUE(ok(handle.detach()));
}

TEST_F(Pin, KeysThatAreNoServicesGoWithTheNextLoad) {
  const NamedServer one("one");
  const std::string text = toml({{"a", "10.96.0.1", 80, {backend(one)}}});
  pin_from_another_process(text);
  const std::uint32_t record = record_at(80);
  lead(81, record);       // to the record of another
  lead(82, record + 30);  // two to one that is nobody's
  lead(83, record + 30);
  EXPECT_EQ(in_child([&] {
              Handle handle(plugin(), pinned());
              require_ok(handle.load(text));
              require(ask("10.96.0.1", 80) == answered_by("one"), "the service does not serve");
            }),
            "");
  EXPECT_EQ(record_at(80), record);
  for (std::uint16_t port = 81; port <= 83; ++port) EXPECT_EQ(record_at(port), nothing) << port;
  remove_all_of_ours();
}

TEST_F(Pin, PolicyThatDoesNotExistIsDamageAndWhatIsRefusedStays) {
  const NamedServer one("one"), other("other");
  const std::string text =
      toml({{"web", "10.96.0.1", 80, {backend(one)}}, {"other", "10.96.0.2", 80, {backend(other)}}});
  pin_from_another_process(text);
  const Fd records = pinned_map(pin(), "Record_Map"), slots = pinned_map(pin(), "Slot_Map");
  const auto damage = [&](const char* name, auto change) {
    const auto header =
        static_cast<std::uint32_t>(read_element<service_record>(records, record_of(records, name)).word);
    auto damaged = read_element<block_header>(slots, header);
    change(damaged);
    write_element(slots, header, damaged);
  };
  damage("web", [](block_header& header) { header.policy = 9; });
  damage("other", [](block_header& header) { header.flags = BLOCK_EJECT; });  // would be taken away by an adoption
  const auto word = [&](const char* name) {
    return read_element<service_record>(records, record_of(records, name)).word;
  };
  const auto web_before = word("web"), other_before = word("other");
  EXPECT_EQ(in_child([&] {
              Handle handle(plugin(), pinned());
              const Outcome outcome = handle.load(text);
              require(outcome.code == -EPROTO, "adopted: " + outcome.message);
            }),
            "");
  EXPECT_EQ(word("web"), web_before);
  EXPECT_EQ(word("other"), other_before);
  remove_all_of_ours();
}

TEST_F(Pin, SlotThatLeadsToAForeignBackendIsHealedByTheNextLoad) {
  const NamedServer one("one", "127.0.0.1"), two("two", "127.0.0.2"), foreign("foreign", "127.0.0.3");
  // Unequal weights, so that both the column and its alias are drawn.
  const std::string text = toml(
      {{"web", "10.96.0.1", 80, {backend(one, 1), backend(two, 3)}}, {"other", "10.96.0.2", 80, {backend(foreign)}}});
  pin_from_another_process(text);
  {
    const Fd records = pinned_map(pin(), "Record_Map"), slots = pinned_map(pin(), "Slot_Map");
    const auto word_of = [&](const std::string& name) {
      return read_element<service_record>(records, record_of(records, name)).word;
    };
    const auto header = static_cast<std::uint32_t>(word_of("web"));
    ASSERT_EQ(word_of("web") >> 32, 2u);
    const auto theirs = read_element<slot>(slots, static_cast<std::uint32_t>(word_of("other")) + 1);
    for (const std::uint32_t index : {header + 1, header + 2}) {
      auto changed = read_element<slot>(slots, index);
      changed.alias = theirs.backend;
      write_element(slots, index, changed);
    }
  }
  Handle handle(plugin(), pinned());
  ASSERT_TRUE(resolved_backends(handle).contains("127.0.0.3")) << "the damage does not show";
  ASSERT_TRUE(ok(handle.load(text)));
  EXPECT_EQ(resolved_backends(handle), (std::set<std::string>{"127.0.0.1", "127.0.0.2"}));
  for (int i = 0; i < 100; ++i) ASSERT_NE(ask("10.96.0.1", 80), answered_by("foreign"));
  EXPECT_TRUE(ok(handle.detach()));
}

TEST_F(Pin, WeightThatNoBackendCanHaveIsDamage) {
  const NamedServer server("server");
  const std::string text = toml({{"web", "10.96.0.1", 80, {backend(server, 5)}}});
  for (const std::uint32_t weight : {0u, 65536u}) {
    pin_from_another_process(text);
    {
      const Fd map = pinned_map(pin(), "Backend_Map");
      std::uint32_t index = 0;
      while (read_element<backend_record>(map, index).weight != 5) ++index;
      auto damaged = read_element<backend_record>(map, index);
      damaged.weight = weight;
      write_element(map, index, damaged);
    }
    EXPECT_EQ(in_child([&] {
                Handle handle(plugin(), pinned());
                require(handle.visit().size() == 1, "it cannot be looked at");
                const Outcome outcome = handle.load(text);
                require(outcome.code == -EPROTO, "adopted: " + outcome.message);
                require_ok(handle.detach());
              }),
              "");
  }
}

TEST_F(Pin, NameThatNoServiceCanHaveIsDamage) {
  const NamedServer server("server");
  const std::string text = toml({{"web", "10.96.0.1", 80, {backend(server)}}});
  for (const char letter : {'x', '\0', '\n'}) {
    pin_from_another_process(text);
    {
      const Fd map = pinned_map(pin(), "Record_Map");
      const std::uint32_t record = record_of(map, "web");
      auto damaged = read_element<service_record>(map, record);
      if (letter == '\n')
        damaged.name[1] = letter;
      else
        std::ranges::fill(damaged.name, letter);
      write_element(map, record, damaged);
    }
    EXPECT_EQ(in_child([&] {
                Handle handle(plugin(), pinned());
                const auto seen = handle.visit();
                require(seen.size() == 1 && seen[0].name.size() <= 159, "it cannot be looked at");
                const Outcome outcome = handle.load(text);
                require(outcome.code == -EPROTO, "adopted: " + outcome.message);
                require_ok(handle.detach());
              }),
              "");
  }
}

TEST_F(Pin, LoadThatRanOutOfFilesCanBeRepeatedOnTheSameHandle) {
  const NamedServer one("one"), two("two");
  const auto text = [](const NamedServer& server) { return toml({{"web", "10.96.0.1", 80, {backend(server)}}}); };
  pin_from_another_process(text(one));
  EXPECT_EQ(in_child([&] {
              unsigned failed = 0;
              for (unsigned files = 0; files < 64; ++files) {
                Handle handle(plugin(), pinned());
                Outcome outcome;
                {
                  const FewFiles few(files);
                  outcome = handle.load(text(two));
                }
                if (outcome.code != 0) {
                  ++failed;
                  require(outcome.code == -EMFILE && !outcome.message.empty(),
                          std::to_string(outcome.code) + " " + outcome.message);
                  require(ask("10.96.0.1", 80) == answered_by("one"), "a failed load changed what serves");
                  require_ok(handle.load(text(two)));
                }
                require(ask("10.96.0.1", 80) == answered_by("two"), "what was loaded is not served");
                require_ok(handle.load(text(one)));
              }
              require(failed > 2 && failed < 64, std::to_string(failed) + " loads failed");
            }),
            "");
  remove_all_of_ours();
}

TEST_F(Pin, LoadThatMissedAPinCanBeRepeatedOnTheSameHandle) {
  const NamedServer one("one"), two("two");
  pin_from_another_process(toml({{"web", "10.96.0.1", 80, {backend(one)}}}));
  const std::string changed = toml({{"web", "10.96.0.1", 80, {backend(two)}}});
  const std::string pinned_there = pin() + "/Slot_Map", aside = std::string(bpffs) + "/aside";
  std::filesystem::rename(pinned_there, aside);
  Handle handle(plugin(), pinned());
  EXPECT_TRUE(fails_with(-EPROTO, handle.load(changed)));
  EXPECT_TRUE(fails_with(-EPROTO, handle.attach()));
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("one"));
  std::filesystem::rename(aside, pinned_there);
  ASSERT_TRUE(ok(handle.load(changed)));
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("two"));
  EXPECT_TRUE(ok(handle.detach()));
}

TEST_F(Pin, HandleWhosePinsWereRemovedTouchesNobodyElses) {
  const NamedServer one("one"), two("two");
  {
    Handle stale = serve(toml({{"web", "10.96.0.1", 80, {backend(one)}}}), pinned());
    std::filesystem::remove_all(pin());
    pin_from_another_process(toml({{"web", "10.96.0.1", 80, {backend(two)}}}));
    EXPECT_TRUE(fails_with(-ESTALE, stale.attach()));
    EXPECT_TRUE(fails_with(-ESTALE, stale.detach()));
    Handle current(plugin(), pinned());
    EXPECT_EQ(current.visit().size(), 1u);
  }
  EXPECT_TRUE(eventually([&] { return connect4_programs(cgroup()).size() == 1; }));
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("two"));
  remove_all_of_ours();
  EXPECT_TRUE(connect4_programs(cgroup()).empty());
}

TEST_F(Pin, RemovedLinkIsMadeAgain) {
  const NamedServer one("one");
  const std::string text = toml({{"web", "10.96.0.1", 80, {backend(one)}}});
  pin_from_another_process(text);
  const std::string link = pin() + "/sock4_connect_link";
  const std::size_t links = objects_of(cgroup()).links.size();
  ASSERT_TRUE(std::filesystem::remove(link));
  ASSERT_TRUE(eventually([&] { return connect4_programs(cgroup()).empty(); }));
  pin_from_another_process(text);
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("one")) << "it outlives its process";
  EXPECT_TRUE(std::filesystem::exists(link));
  EXPECT_TRUE(eventually([&] { return objects_of(cgroup()).links.size() == links; }))
      << "the others go with their pins";
  remove_all_of_ours();
  EXPECT_TRUE(connect4_programs(cgroup()).empty());
  EXPECT_FALSE(std::filesystem::exists(pin()));
}

TEST_F(Pin, MapOfSomebodyElseIsToldAtOnceAndStays) {
  ASSERT_EQ(::mkdir(pin().c_str(), 0700), 0);
  const Fd map(bpf_map_create(BPF_MAP_TYPE_ARRAY, "x", 4, 8, 1, nullptr));
  const std::string path = pin() + "/Meta_Map";
  ASSERT_EQ(bpf_obj_pin(map.get(), path.c_str()), 0);
  Handle handle(plugin(), pinned());
  for (const Outcome& outcome : {handle.load(toml({})), handle.detach()}) {
    EXPECT_TRUE(fails_with(-EPROTO, outcome));
    EXPECT_NE(outcome.message.find("is not clusterip's: use another pin path"), std::string::npos) << outcome.message;
  }
  ASSERT_EQ(::unlink(path.c_str()), 0);
}

}  // namespace
