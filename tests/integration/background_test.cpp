// SPDX-License-Identifier: BSD-2-Clause
//
// CLUSTERIP_BACKGROUND: the library's own thread checks backends, and the kernel's choices follow.
#include <signal.h>

#include <algorithm>
#include <filesystem>
#include <iterator>
#include <memory>
#include <optional>

#include "tests/support/fixture.h"

namespace {

using namespace support;

constexpr const char* vip = "10.96.0.1";
constexpr const char* often = "health = { interval = \"20ms\", timeout = \"1s\", rise = 2, fall = 2 }\n";

Service web(std::vector<Backend> backends, const std::string& more = often) {
  return {"web", vip, 80, std::move(backends), "refuse", more};
}

std::size_t threads() {
  return static_cast<std::size_t>(
      std::distance(std::filesystem::directory_iterator("/proc/self/task"), std::filesystem::directory_iterator()));
}

/// /proc/self/task/... of the library's thread; empty when there is none.
std::string checking_thread() {
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
    const std::string path = task.path().string();
    if (read_text(path + "/comm") == "clusterip-check\n") return path;
  }
  return {};
}

/// Servers that come and go. At ports below those that the kernel gives to clients, such as to checks.
class Mortal {
 public:
  Mortal(std::string name, std::string address, std::uint16_t port)
      : name_(std::move(name)), address_(std::move(address)), port_(port) {}
  void stop() { server_.reset(); }
  void start() {
    if (!server_) server_.emplace(name_, address_, NamedServer::Speaks::name, port_);
  }
  Backend backend() const { return {address_, port_}; }
  std::uint16_t port() const { return port_; }
  std::uint64_t accepted() const { return server_->accepted(); }

 private:
  std::string name_;
  std::string address_;
  std::uint16_t port_;
  std::optional<NamedServer> server_;
};

class Background : public Integration {
 protected:
  Paths in_background() const { return {cgroup().path(), {}, CLUSTERIP_BACKGROUND}; }
  Paths pinned_in_background() const { return {cgroup().path(), pin(), CLUSTERIP_BACKGROUND}; }

  static std::uint32_t state_of(Handle& handle, const Mortal& server) {
    const SeenService service = handle.visit().at(0);
    for (const SeenBackend& backend : service.backends)
      if (backend.port == server.port()) return backend.state;
    return ~0U;
  }
  static bool becomes(Handle& handle, const Mortal& server, std::uint32_t state) {
    return eventually([&] { return state_of(handle, server) == state; });
  }

  void SetUp() override {
    Integration::SetUp();
    one_.start();
    two_.start();
  }
  void TearDown() override {
    // What a server has open counts neither at the beginning nor at the end.
    one_.stop();
    two_.stop();
    Integration::TearDown();
  }

  Mortal one_{"one", "127.0.0.1", 7001};
  Mortal two_{"two", "127.0.0.2", 7002};
};

TEST_F(Background, ABackendThatStopsListeningGetsNoConnectAndIsBackWhenItAnswers) {
  Handle handle = serve(toml({web({one_.backend(), two_.backend()})}), in_background());
  EXPECT_EQ(state_of(handle, one_), CLUSTERIP_ACTIVE);
  one_.stop();
  ASSERT_TRUE(becomes(handle, one_, CLUSTERIP_DOWN));
  for (int i = 0; i < 100; ++i) EXPECT_EQ(ask(vip, 80), answered_by("two"));
  one_.start();
  ASSERT_TRUE(becomes(handle, one_, CLUSTERIP_ACTIVE));
  EXPECT_TRUE(eventually([] { return ask(vip, 80) == answered_by("one"); }));
}

TEST_F(Background, WithAllDownItRefusesAndWithOneBackItServes) {
  Handle handle = serve(toml({web({one_.backend()})}), in_background());
  EXPECT_EQ(ask(vip, 80), answered_by("one"));
  one_.stop();
  ASSERT_TRUE(becomes(handle, one_, CLUSTERIP_DOWN));
  EXPECT_EQ(ask(vip, 80), refused_by_program(ECONNREFUSED));
  EXPECT_EQ(handle.visit().at(0).refused, 1U) << "not by the backend's kernel, which refuses as well";
  one_.start();
  EXPECT_TRUE(eventually([] { return ask(vip, 80) == answered_by("one"); }));
}

TEST_F(Background, ReloadsAndFeedsLeaveDownWhatIsDown) {
  Handle handle = serve(toml({web({one_.backend(), two_.backend()})}), in_background());
  one_.stop();
  ASSERT_TRUE(becomes(handle, one_, CLUSTERIP_DOWN));
  for (int i = 0; i < 20; ++i) {
    ASSERT_TRUE(ok(handle.load(toml({web({one_.backend(), two_.backend()})}))));
    EXPECT_EQ(state_of(handle, one_), CLUSTERIP_DOWN);
    EXPECT_EQ(ask(vip, 80), answered_by("two"));
    ASSERT_TRUE(ok(handle.set_backends("web", {one_.backend(), two_.backend()})));
    EXPECT_EQ(state_of(handle, one_), CLUSTERIP_DOWN);
    EXPECT_EQ(ask(vip, 80), answered_by("two"));
    ASSERT_TRUE(ok(handle.set_backend_state("web", "127.0.0.1", one_.port(), CLUSTERIP_ACTIVE)));
    EXPECT_EQ(state_of(handle, one_), CLUSTERIP_DOWN) << "the checks do not agree";
  }
  one_.start();
  EXPECT_TRUE(becomes(handle, one_, CLUSTERIP_ACTIVE));
}

TEST_F(Background, WhatTheHostSaysIsDownStaysDownAlthoughItAnswers) {
  Handle handle = serve(toml({web({one_.backend(), two_.backend()})}), in_background());
  ASSERT_TRUE(ok(handle.set_backend_state("web", "127.0.0.1", one_.port(), CLUSTERIP_DOWN)));
  two_.stop();
  ASSERT_TRUE(becomes(handle, two_, CLUSTERIP_DOWN));
  two_.start();
  ASSERT_TRUE(becomes(handle, two_, CLUSTERIP_ACTIVE));
  EXPECT_EQ(state_of(handle, one_), CLUSTERIP_DOWN);
  ASSERT_TRUE(ok(handle.set_backend_state("web", "127.0.0.1", one_.port(), CLUSTERIP_ACTIVE)));
  EXPECT_EQ(state_of(handle, one_), CLUSTERIP_ACTIVE);
}

TEST_F(Background, ALoadWithoutHealthLetsGoOfWhatWasDown) {
  Handle handle = serve(toml({web({one_.backend(), two_.backend()})}), in_background());
  one_.stop();
  ASSERT_TRUE(becomes(handle, one_, CLUSTERIP_DOWN));
  ASSERT_TRUE(ok(handle.load(toml({web({one_.backend(), two_.backend()}, "")}))));
  EXPECT_EQ(state_of(handle, one_), CLUSTERIP_ACTIVE);
}

TEST_F(Background, ALoadThatFailsChangesNoChecks) {
  Handle handle = serve(toml({web({one_.backend(), two_.backend()})}), in_background());
  EXPECT_TRUE(fails_with(-EBADMSG, handle.load("nonsense")));
  one_.stop();
  ASSERT_TRUE(becomes(handle, one_, CLUSTERIP_DOWN));
  EXPECT_EQ(ask(vip, 80), answered_by("two"));
}

TEST_F(Background, AServiceThatComesLaterSharesWhatIsKnown) {
  Handle handle = serve(toml({web({one_.backend(), two_.backend()})}), in_background());
  one_.stop();
  ASSERT_TRUE(becomes(handle, one_, CLUSTERIP_DOWN));
  ASSERT_TRUE(ok(handle.load(toml({web({one_.backend(), two_.backend()}),
                                   {"xtra", "10.96.0.2", 80, {one_.backend(), two_.backend()}, "refuse", often}}))));
  ASSERT_TRUE(eventually([&] {
    const auto seen = handle.visit();
    return std::ranges::any_of(seen.at(1).backends, [](const auto& each) { return each.state == CLUSTERIP_DOWN; });
  }));
  for (int i = 0; i < 50; ++i) EXPECT_EQ(ask("10.96.0.2", 80), answered_by("two"));
}

TEST_F(Background, AdoptedStateBeginsWithWhatWasDown) {
  const std::string text = toml({web({one_.backend(), two_.backend()})});
  // Without a thread in this process: what adopts finds a backend down that answers.
  {
    Handle before(plugin(), pinned());
    ASSERT_TRUE(ok(before.load(text)));
    ASSERT_TRUE(ok(before.attach()));
    ASSERT_TRUE(ok(before.set_backend_state("web", "127.0.0.1", one_.port(), CLUSTERIP_DOWN)));
  }
  one_.stop();
  Handle handle(plugin(), pinned_in_background());
  ASSERT_TRUE(ok(handle.load(text)));
  EXPECT_EQ(state_of(handle, one_), CLUSTERIP_DOWN);
  ASSERT_TRUE(ok(handle.attach()));
  EXPECT_EQ(ask(vip, 80), answered_by("two"));
  one_.start();
  EXPECT_TRUE(becomes(handle, one_, CLUSTERIP_ACTIVE)) << "the checks have found it";
  EXPECT_TRUE(ok(handle.detach()));
}

TEST_F(Background, TheThreadBeginsWithHealthAndEndsWithDetachAndClose) {
  const std::size_t before = threads();
  {
    Handle handle(plugin(), in_background());
    ASSERT_TRUE(ok(handle.load(toml({web({one_.backend()}, "")}))));
    EXPECT_EQ(threads(), before) << "nothing is to be checked";
    ASSERT_TRUE(ok(handle.load(toml({web({one_.backend()})}))));
    EXPECT_EQ(threads(), before + 1);
    const std::string status = read_text(checking_thread() + "/status");
    const std::string_view key = "SigBlk:\t";
    const std::uint64_t blocked = std::stoull(status.substr(status.find(key) + key.size()), nullptr, 16);
    EXPECT_EQ(blocked | 1U << (SIGKILL - 1) | 1U << (SIGSTOP - 1), blocked | 0x7fffffffU) << status;
    ASSERT_TRUE(ok(handle.attach()));
    ASSERT_TRUE(ok(handle.detach()));
    EXPECT_EQ(threads(), before);
    ASSERT_TRUE(ok(handle.attach()));
    EXPECT_EQ(threads(), before + 1) << "attached again, it checks again";
    one_.stop();
    EXPECT_TRUE(becomes(handle, one_, CLUSTERIP_DOWN));
    one_.start();  // its thread counts as well
    EXPECT_EQ(threads(), before + 1);
  }
  EXPECT_EQ(threads(), before);
}

TEST_F(Background, WithoutTheFlagHealthIsTheHosts) {
  const std::size_t before = threads();
  Handle handle = serve(toml({web({one_.backend()})}));
  EXPECT_EQ(threads(), before);
  EXPECT_EQ(one_.accepted(), 0U);
  EXPECT_EQ(ask(vip, 80), answered_by("one"));
  EXPECT_EQ(one_.accepted(), 1U);
}

TEST_F(Background, ManyCallsMeetManyChanges) {
  constexpr const char* always = "health = { interval = \"1ms\", timeout = \"1s\", rise = 1, fall = 1 }\n";
  std::vector<Backend> backends{one_.backend()};
  // One server on all addresses; it comes and goes, and with it all of these at once.
  constexpr std::uint16_t port = 7003;
  std::optional<NamedServer> many(std::in_place, "many", "0.0.0.0", NamedServer::Speaks::name, port);
  for (int i = 0; i < 50; ++i) backends.push_back({"127.0.3." + std::to_string(i + 1), port});
  const std::string text = toml({web(backends, always)});
  Handle handle = serve(text, in_background());
  for (int i = 0; i < 20; ++i) {
    many.reset();
    ASSERT_TRUE(ok(handle.load(text)));
    EXPECT_EQ(handle.visit().at(0).backends.size(), 51U);
    many.emplace("many", "0.0.0.0", NamedServer::Speaks::name, port);
    ASSERT_TRUE(ok(handle.set_backends("web", backends)));
    ASSERT_TRUE(ok(handle.canary()));
  }
  const auto down = [&] {
    const auto seen = handle.visit().at(0).backends;
    return std::ranges::count(seen, CLUSTERIP_DOWN, &SeenBackend::state);
  };
  // What is down is so from before, as long as the thread has not had its turn.
  ASSERT_TRUE(eventually([&] { return down() == 0; }));
  many.reset();
  ASSERT_TRUE(eventually([&] { return down() == 50; }));
  for (int i = 0; i < 20; ++i) EXPECT_EQ(ask(vip, 80), answered_by("one"));
}

TEST_F(Background, ComesAndGoes100TimesAndUnloadsForReal) {
  unload_plugin();
  const std::string text = toml({web({one_.backend(), two_.backend()})});
  std::size_t files = 0, resident = 0;
  const std::size_t before = threads();
  for (int cycle = 0; cycle < 100; ++cycle) {
    if (cycle == 10) {
      files = open_files();
      resident = resident_bytes();
    }
    {
      const Plugin plugin;
      const std::uint64_t seen = one_.accepted();
      Handle handle(plugin, in_background());
      ASSERT_TRUE(ok(handle.load(text)));
      ASSERT_TRUE(ok(handle.attach()));
      // Sometimes with a check under way, sometimes before the first.
      if (cycle % 5 == 0) {
        ASSERT_TRUE(eventually([&] { return one_.accepted() > seen; }));
      }
      if (cycle % 2 == 0) {
        ASSERT_TRUE(ok(handle.detach()));
      }
    }
    ASSERT_FALSE(is_mapped("libclusterip"));
    ASSERT_EQ(threads(), before);
  }
  EXPECT_EQ(open_files(), files);
  EXPECT_LT(resident_bytes(), resident + 1'000'000);
}

}  // namespace
