// SPDX-License-Identifier: BSD-2-Clause
//
// A process that changes the pinned state is killed at any moment: what serves goes on, and the next one repairs.
#include <fmt/format.h>
#include <sys/socket.h>
#include <sys/syscall.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <map>
#include <memory>
#include <set>

#include "tests/support/fixture.h"

namespace {

using namespace support;

class Crash : public Integration {
 protected:
  static void spin_for(std::chrono::microseconds time) {
    const auto end = std::chrono::steady_clock::now() + time;
    while (std::chrono::steady_clock::now() < end) {
    }
  }

  /// Runs `steps` in a child over and over, and kills it after `heard` of its steps and a little more. Each round kills
  /// at another moment.
  void kill_during(const std::function<void(const Channel&)>& steps, int heard, std::chrono::microseconds more) {
    Child child([&](const Channel& parent) {
      for (;;) steps(parent);
    });
    for (int i = 0; i < heard; ++i) child.channel().hear();
    spin_for(more);
    child.kill();
    EXPECT_EQ(child.wait(), "ended by Killed");
  }
};

TEST_F(Crash, KilledWhilePublishingServesOnAndIsRepaired) {
  const NamedServer stable("stable", "127.0.0.1"), one("one", "127.0.0.2"), two("two", "127.0.0.3");
  const Service kept = {"kept", "10.96.0.1", 80, {backend(stable)}};
  const std::string small = toml({kept, {"web", "10.96.0.2", 80, {backend(one)}}}, {8, 16});
  const std::string large = toml({kept,
                                  {"web", "10.96.0.2", 80, {backend(two), backend(one, 3)}},
                                  {"extra", "10.96.0.3", 80, {backend(one)}},
                                  {"more", "10.96.0.4", 80, {backend(two)}}},
                                 {8, 16});
  ASSERT_EQ(in_child([&] { const Handle handle = serve(small, pinned()); }), "");

  Asker asker("10.96.0.1", 80);
  for (int round = 0; round < 15; ++round) {
    std::unique_ptr<Handle> handle;
    kill_during(
        [&](const Channel& parent) {
          if (!handle) handle = std::make_unique<Handle>(plugin(), pinned());
          require_ok(handle->load(large));
          parent.tell('l');
          for (int i = 0; i < 20; ++i) {
            require_ok(handle->set_backends("web", {backend(i % 2 == 0 ? one : two)}));
            parent.tell('s');
          }
          require_ok(handle->load(small));
          parent.tell('l');
        },
        round * 5 + 1, std::chrono::microseconds(round * 431));

    Handle adopter(plugin(), pinned());
    const auto seen = adopter.visit();
    ASSERT_GE(seen.size(), 2u);
    EXPECT_EQ(std::ranges::count(seen, "kept", &SeenService::name), 1);
    EXPECT_EQ(ask("10.96.0.1", 80), answered_by("stable"));
    const Answer web = ask("10.96.0.2", 80);
    EXPECT_TRUE(web == answered_by("one") || web == answered_by("two")) << web;
    ASSERT_TRUE(ok(adopter.load(large)));
    ASSERT_TRUE(ok(adopter.attach()));
    EXPECT_EQ(ask("10.96.0.3", 80), answered_by("one"));
    EXPECT_EQ(ask("10.96.0.4", 80), answered_by("two"));
    EXPECT_EQ(adopter.visit().size(), 4u);
    EXPECT_EQ(connect4_programs(cgroup()).size(), 1u);
    asker.wait_for(5);
  }
  const auto answers = asker.stop();
  EXPECT_EQ(answers.size(), 1u) << testing::PrintToString(answers);
  EXPECT_TRUE(answers.contains("stable")) << testing::PrintToString(answers);
  EXPECT_TRUE(ok(Handle(plugin(), pinned()).detach()));
}

TEST_F(Crash, ServicesAreGoneBeforeTheFirstKeyIsDeleted) {
  const NamedServer one("one");
  const Service web{"web", "10.96.0.1", 80, {backend(one)}};
  const Service gone{"gone", "10.96.0.2", 80, {backend(one)}};
  EXPECT_EQ(in_child([&] {
              Handle handle = serve(toml({web, gone}, {8, 16}), pinned());
              die_at(SYS_bpf, BPF_MAP_DELETE_ELEM);
              handle.load(toml({web}, {8, 16}));
            }),
            "ended by Bad system call");
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("one"));
  EXPECT_EQ(ask("10.96.0.2", 80), refused_with(ENETUNREACH));
  Handle adopter(plugin(), pinned());
  const auto seen = adopter.visit();
  ASSERT_EQ(seen.size(), 1u);
  EXPECT_EQ(seen[0].name, "web");
  ASSERT_TRUE(ok(adopter.load(toml({web}, {8, 16}))));
  EXPECT_EQ(ask("10.96.0.2", 80), refused_with(ENETUNREACH));
  EXPECT_TRUE(ok(adopter.detach()));
}

TEST_F(Crash, KilledWhileReplacingTheMapsServesOnAndIsRepaired) {
  const NamedServer stable("stable", "127.0.0.1"), other("other", "127.0.0.2");
  const auto text = [&](std::uint32_t count) {
    std::vector<Service> services = more_services(count, backend(other));
    services.push_back({"stable", "10.96.0.1", 80, {backend(stable)}});
    return toml(services, {20'000, 20'000});
  };
  constexpr std::uint32_t steps = 7, per_step = 8;
  for (std::uint32_t cycle = 0; cycle < per_step; ++cycle) {
    ASSERT_EQ(in_child([&] { const Handle handle = serve(text(1), pinned()); }), "");
    Asker asker("10.96.0.1", 80);
    for (std::uint32_t step = 0; step < steps; ++step) {
      const std::string larger = text(70u << step);  // outgrows what the step before made
      kill_during(
          [&](const Channel& parent) {
            Handle handle(plugin(), pinned());
            parent.tell('b');
            require_ok(handle.load(larger));
            parent.tell('a');
          },
          1, std::chrono::microseconds((step * per_step + cycle) * 149));
      EXPECT_EQ(ask("10.96.0.1", 80), answered_by("stable"));
      Handle adopter(plugin(), pinned());
      const auto seen = adopter.visit();
      EXPECT_EQ(std::ranges::count(seen, "stable", &SeenService::name), 1);
      ASSERT_TRUE(ok(adopter.load(larger)));
      EXPECT_EQ(ask("10.98.0.70", 80), answered_by("other"));
      EXPECT_EQ(connect4_programs(cgroup()).size(), 1u);
    }
    asker.wait_for(5);
    const auto answers = asker.stop();
    EXPECT_EQ(answers.size(), 1u) << testing::PrintToString(answers);
    EXPECT_TRUE(answers.contains("stable")) << testing::PrintToString(answers);
    const BpfObjects ours = objects_of(cgroup());
    ASSERT_TRUE(ok(Handle(plugin(), pinned()).detach()));
    EXPECT_TRUE(eventually([&] { return still_there(ours) == 0; }));
  }
}

// All hooks at once: some are new to the first step, then each step exchanges the programs of all of them.
TEST_F(Crash, KilledWhileReplacingTheMapsOfAllHooksServesOnAndIsRepaired) {
  const NamedServer tcp4("tcp", "127.0.0.1"), tcp6("tcp", "::1"), other("other", "127.0.0.2");
  const NamedUdpServer udp4("udp", "127.0.0.1"), udp6("udp", "::1");
  const std::string vip4 = "10.96.0.1", vip6 = "fd00::1";
  const auto text = [&](std::uint32_t count, bool all_hooks) {
    std::vector<Service> services = more_services(count, backend(other));
    services.push_back({"tcp4", vip4, 80, {backend(tcp4)}});
    services.push_back({"tcp6", vip6, 80, {backend(tcp6)}});
    if (all_hooks) {
      services.push_back({"udp4", vip4, 53, {backend(udp4)}, "refuse", "protocol = \"udp\""});
      services.push_back({"udp6", vip6, 53, {backend(udp6)}, "refuse", "protocol = \"udp\""});
    }
    return fmt::format("[engine]\npeer_names = {}\n", all_hooks) + toml(services, {20'000, 20'000});
  };
  const auto ask_udp = [](const Fd& fd, const std::string& vip, bool connected) {
    if (!connected) return exchange(fd.get(), vip, 53);
    if (connect_errno(fd.get(), vip, 53) != 0 || ::send(fd.get(), "x", 1, 0) != 1) return std::string("not sent");
    return receive(fd.get()) + " as " + peer_of(fd.get());
  };
  const std::string from4 = "udp from 10.96.0.1:53", from6 = "udp from [fd00::1]:53";
  const auto expect_all_served = [&] {
    EXPECT_EQ(ask(vip4, 80), answered_by("tcp"));
    EXPECT_EQ(ask(vip6, 80), answered_by("tcp"));
    EXPECT_EQ(ask_udp(udp_socket(), vip4, false), from4);
    EXPECT_EQ(ask_udp(udp_socket(), vip4, true), from4 + " as 10.96.0.1:53");
    EXPECT_EQ(ask_udp(udp_socket(AF_INET6), vip6, false), from6);
    EXPECT_EQ(ask_udp(udp_socket(AF_INET6), vip6, true), from6 + " as [fd00::1]:53");
  };
  /// Each hook runs one program, and all of them use the same maps.
  const auto expect_one_world = [&] {
    std::map<std::string, std::set<std::uint32_t>> maps;
    for (const bpf_attach_type hook :
         {BPF_CGROUP_INET4_CONNECT, BPF_CGROUP_INET6_CONNECT, BPF_CGROUP_UDP4_SENDMSG, BPF_CGROUP_UDP6_SENDMSG,
          BPF_CGROUP_UDP4_RECVMSG, BPF_CGROUP_UDP6_RECVMSG, BPF_CGROUP_INET4_GETPEERNAME, BPF_CGROUP_INET6_GETPEERNAME,
          BPF_CGROUP_INET_SOCK_RELEASE, BPF_CGROUP_SOCK_OPS}) {
      const auto programs = programs_at(cgroup(), hook);
      ASSERT_EQ(programs.size(), 1u) << "hook " << hook;
      for (const std::uint32_t map : maps_of(programs[0])) maps[map_name(map)].insert(map);
    }
    EXPECT_TRUE(maps.contains("Service_Map") && maps.contains("Session_Map"));
    for (const auto& [name, ids] : maps) EXPECT_EQ(ids.size(), 1u) << name;
  };

  constexpr std::uint32_t steps = 3, cycles = 4;
  std::array<std::chrono::microseconds, steps> takes{};
  double moment = 0;
  for (std::uint32_t cycle = 0; cycle <= cycles; ++cycle) {
    ASSERT_EQ(in_child([&] { const Handle handle = serve(text(1, false), pinned()); }), "");
    EXPECT_TRUE(programs_at(cgroup(), BPF_CGROUP_UDP4_RECVMSG).empty());
    Asker asker4(vip4, 80), asker6(vip6, 80);
    const Fd flow = udp_socket(), connection = tcp_socket();
    for (std::uint32_t step = 0; step < steps; ++step) {
      const std::string larger = text(70u << step, true);  // outgrows what the step before made
      if (cycle > 0) {
        // Each time at another moment of what the first cycle has measured: the multiples of the golden ratio.
        moment += 0.618034;
        moment -= std::floor(moment);
        kill_during(
            [&](const Channel& parent) {
              Handle handle(plugin(), pinned());
              parent.tell('b');
              require_ok(handle.load(larger));
              parent.tell('a');
            },
            1, std::chrono::duration_cast<std::chrono::microseconds>(moment * takes[step]));
      }
      EXPECT_EQ(ask(vip4, 80), answered_by("tcp"));
      EXPECT_EQ(ask(vip6, 80), answered_by("tcp"));
      if (step > 0) {
        expect_all_served();
        EXPECT_EQ(peer_of(connection.get()), "10.96.0.1:80");
      }
      Handle adopter(plugin(), pinned());
      const auto begin = std::chrono::steady_clock::now();
      ASSERT_TRUE(ok(adopter.load(larger)));
      if (cycle == 0)
        takes[step] = std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now() - begin);
      expect_one_world();
      expect_all_served();
      EXPECT_EQ(ask("10.98.0.70", 80), answered_by("other"));
      if (step == 0) {
        ASSERT_EQ(connect_errno(connection.get(), vip4, 80), 0);
      }
      EXPECT_EQ(ask_udp(flow, vip4, false), from4);
      const auto seen = adopter.visit();
      const auto udp = std::ranges::find(seen, "udp4", &SeenService::name);
      const auto tcp = std::ranges::find(seen, "tcp4", &SeenService::name);
      ASSERT_TRUE(udp != seen.end() && tcp != seen.end());
      EXPECT_EQ(udp->live, 0u) << "sockets that have been closed";
      EXPECT_GE(tcp->live, 1u) << "the connection of the first step";
    }
    for (Asker* asker : {&asker4, &asker6}) {
      asker->wait_for(5);
      const auto answers = asker->stop();
      EXPECT_EQ(answers.size(), 1u) << testing::PrintToString(answers);
      EXPECT_TRUE(answers.contains("tcp")) << testing::PrintToString(answers);
    }
    const BpfObjects ours = objects_of(cgroup());
    ASSERT_TRUE(ok(Handle(plugin(), pinned()).detach()));
    EXPECT_TRUE(eventually([&] { return still_there(ours) == 0; }));
  }
}

TEST_F(Crash, RoomIsNotLostToKilledProcesses) {
  const NamedServer one("one", "127.0.0.1"), two("two", "127.0.0.2");
  // As full as the limits allow, so that a leaked record, block or backend would soon be missed.
  const std::string full =
      toml({{"a", "10.96.0.1", 80, {backend(one)}}, {"b", "10.96.0.2", 80, {backend(two)}}}, {2, 2});
  const std::string other =
      toml({{"c", "10.96.0.3", 80, {backend(two)}}, {"d", "10.96.0.4", 80, {backend(one)}}}, {2, 2});
  ASSERT_EQ(in_child([&] { const Handle handle = serve(full, pinned()); }), "");
  for (int round = 0; round < 10; ++round) {
    std::unique_ptr<Handle> handle;
    kill_during(
        [&](const Channel& parent) {
          if (!handle) handle = std::make_unique<Handle>(plugin(), pinned());
          for (const std::string* text : {&other, &full}) {
            require_ok(handle->load(*text));
            parent.tell('l');
          }
        },
        round / 3 + 1, std::chrono::microseconds(round * 977));
    ASSERT_TRUE(ok(Handle(plugin(), pinned()).load(full)));
    EXPECT_EQ(ask("10.96.0.1", 80), answered_by("one"));
    EXPECT_EQ(ask("10.96.0.2", 80), answered_by("two"));
    EXPECT_EQ(ask("10.96.0.3", 80), refused_with(ENETUNREACH));
  }
  EXPECT_TRUE(ok(Handle(plugin(), pinned()).detach()));
}

TEST_F(Crash, KilledWhileAttachingOrDetachingIsRepaired) {
  const NamedServer server("server");
  const std::string text = toml({{"web", "10.96.0.1", 80, {backend(server)}}}, {8, 8});
  for (int round = 0; round < 25; ++round) {
    kill_during(
        [&](const Channel& parent) {
          parent.tell('b');
          Handle handle(plugin(), pinned());
          require_ok(handle.load(text));
          require_ok(handle.attach());
          parent.tell('a');
          require_ok(handle.detach());
        },
        round % 4 + 1, std::chrono::microseconds(round * 613));
    EXPECT_LE(connect4_programs(cgroup()).size(), 1u);
    {
      const Handle handle = serve(text, pinned());
      EXPECT_EQ(ask("10.96.0.1", 80), answered_by("server"));
      EXPECT_EQ(connect4_programs(cgroup()).size(), 1u);
    }
    ASSERT_TRUE(ok(Handle(plugin(), pinned()).detach()));
    EXPECT_TRUE(connect4_programs(cgroup()).empty());
    EXPECT_FALSE(std::filesystem::exists(pin()));
  }
}

}  // namespace
