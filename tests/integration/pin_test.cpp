// SPDX-License-Identifier: BSD-2-Clause
//
// The fast path outlives the process that made it.
#include <fmt/format.h>
#include <poll.h>

#include <algorithm>
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
  EXPECT_EQ(ask("10.96.0.2", 443), refused_with(EHOSTUNREACH));

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
    meta_record meta{};
    const std::uint32_t first = 0;
    bpf_attr attr{};
    attr.map_fd = static_cast<std::uint32_t>(map.get());
    attr.key = reinterpret_cast<std::uint64_t>(&first);
    attr.value = reinterpret_cast<std::uint64_t>(&meta);
    ASSERT_EQ(bpf(BPF_MAP_LOOKUP_ELEM, attr), 0);
    ASSERT_EQ(meta.version, std::uint32_t{LAYOUT_VERSION});
    ++meta.version;
    ASSERT_EQ(bpf(BPF_MAP_UPDATE_ELEM, attr), 0);
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

}  // namespace
