// SPDX-License-Identifier: BSD-2-Clause
//
// What the plugin tells: canary, resolve and visit.
#include <arpa/inet.h>
#include <bpf/bpf.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>

#include "tests/support/fixture.h"

namespace {

using namespace support;

std::string address_of(const clusterip_resolution& resolution) {
  sockaddr_in backend{};
  std::memcpy(&backend, &resolution.backend, sizeof backend);
  char text[INET_ADDRSTRLEN];
  return std::string(::inet_ntop(AF_INET, &backend.sin_addr, text, sizeof text)) + ":" +
         std::to_string(ntohs(backend.sin_port));
}

std::string address_of(const NamedServer& server) { return server.address() + ":" + std::to_string(server.port()); }

class Report : public Integration {};

TEST_F(Report, CanarySeesRewriteAndRefusal) {
  const NamedServer server("server");
  Handle handle = serve(toml({{"web", "10.96.0.1", 80, {backend(server)}}}));
  clusterip_canary_result seen{};
  seen.size = sizeof seen;
  EXPECT_TRUE(ok(handle.canary(&seen)));
  EXPECT_EQ(seen.rewrite_errno, 0);
  EXPECT_EQ(seen.refuse_errno, refusal(ECONNREFUSED));
  EXPECT_FALSE(has_children());
}

TEST_F(Report, CanaryNeedsNoService) {
  Handle handle = serve(toml({}));
  EXPECT_TRUE(ok(handle.canary()));
}

TEST_F(Report, CanaryWorksWhereItsBackendIsAVip) {
  const NamedServer server("server");
  Handle handle = serve(toml({{"web", "127.0.0.1", 80, {backend(server)}}}));
  EXPECT_TRUE(ok(handle.canary()));
}

TEST_F(Report, CanaryIsNoServiceAndCountsNowhere) {
  const NamedServer server("server");
  Handle handle = serve(toml({{"web", "10.96.0.1", 80, {backend(server)}}}));
  ASSERT_TRUE(ok(handle.canary()));
  const auto seen = handle.visit();
  ASSERT_EQ(seen.size(), 1u);
  EXPECT_EQ(seen[0].connects, 0u);
  EXPECT_EQ(seen[0].refused, 0u);
}

TEST_F(Report, CanaryOnHandleThatIsNotAttachedFails) {
  const NamedServer server("server");
  Handle handle(plugin(), unpinned());
  EXPECT_TRUE(fails_with(-ENOTCONN, handle.canary()));
  ASSERT_TRUE(ok(handle.load(toml({{"web", "10.96.0.1", 80, {backend(server)}}}))));
  EXPECT_TRUE(fails_with(-ENOTCONN, handle.canary()));
  ASSERT_TRUE(ok(handle.attach()));
  EXPECT_TRUE(ok(handle.canary()));
  ASSERT_TRUE(ok(handle.detach()));
  EXPECT_TRUE(fails_with(-ENOTCONN, handle.canary()));
  EXPECT_FALSE(has_children());
}

TEST_F(Report, CanarySeesThatSomebodyDetachedIt) {
  Handle handle = serve(toml({}), pinned());
  for (const std::uint32_t id : objects_of(cgroup()).links) detach_link(id);
  ASSERT_TRUE(connect4_programs(cgroup()).empty());
  clusterip_canary_result seen{};
  seen.size = sizeof seen;
  EXPECT_TRUE(fails_with(-ENOTCONN, handle.canary(&seen)));
  EXPECT_NE(seen.rewrite_errno, 0);
  EXPECT_TRUE(ok(handle.detach()));
}

TEST_F(Report, AttachMendsWhatSomebodyDetached) {
  const NamedServer server("server");
  for (const Paths& paths : {unpinned(), pinned()}) {
    Handle handle = serve(toml({{"web", "10.96.0.1", 80, {backend(server)}}}), paths);
    for (const std::uint32_t id : objects_of(cgroup()).links) detach_link(id);
    EXPECT_TRUE(fails_with(-ENOTCONN, handle.canary()));
    EXPECT_TRUE(ok(handle.attach()));
    EXPECT_TRUE(ok(handle.canary()));
    EXPECT_EQ(ask("10.96.0.1", 80), answered_by("server"));
    EXPECT_TRUE(ok(handle.detach()));
  }
}

TEST_F(Report, CanarySeesWhichProgramIsNotAttached) {
  const NamedServer server("server");
  const std::string text = toml({{"web", "10.96.0.1", 80, {backend(server)}}});
  for (const char* program : {"sock6_connect", "sock4_sendmsg", "sock4_getpeer", "sock_release", "sock_ops"}) {
    {
      Handle handle = serve(text, pinned());
      ASSERT_TRUE(ok(handle.canary()));
    }
    ASSERT_EQ(::unlink((pin() + "/" + program + "_link").c_str()), 0);
    Outcome outcome;
    const bool has_failed = eventually([&] {
      outcome = Handle(plugin(), pinned()).canary();
      return outcome.code != 0;
    });
    EXPECT_TRUE(has_failed && fails_with(-ENOTCONN, outcome));
    EXPECT_EQ(outcome.message, std::string(program) + " is not attached: load again");
  }
  EXPECT_TRUE(ok(Handle(plugin(), pinned()).detach()));
}

std::uint32_t link_id(const std::string& pinned) {
  const Fd link(::bpf_obj_get(pinned.c_str()));
  bpf_link_info info{};
  std::uint32_t length = sizeof info;
  EXPECT_EQ(::bpf_obj_get_info_by_fd(link.get(), &info, &length), 0) << pinned;
  return info.id;
}

TEST_F(Report, CanarySeesALinkThatSomebodyDetachedAndALoadMendsIt) {
  const NamedServer server("server");
  const std::string text = toml({{"web", "10.96.0.1", 80, {backend(server)}}});
  Handle handle = serve(text, pinned());
  for (const char* program : {"sock6_connect", "sock4_sendmsg", "sock4_getpeer", "sock_release", "sock_ops"}) {
    detach_link(link_id(pin() + "/" + program + "_link"));
    const Outcome outcome = handle.canary();
    EXPECT_TRUE(fails_with(-ENOTCONN, outcome));
    EXPECT_EQ(outcome.message, std::string(program) + " is not attached: load again");
    ASSERT_TRUE(ok(handle.load(text)));
    EXPECT_TRUE(ok(handle.canary()));
  }
  EXPECT_TRUE(ok(handle.detach()));
}

TEST_F(Report, CanarySeesThatItsPinsAreGone) {
  const NamedServer server("server");
  Handle handle = serve(toml({{"web", "10.96.0.1", 80, {backend(server)}}}), pinned());
  std::filesystem::remove_all(pin());
  EXPECT_TRUE(fails_with(-ESTALE, handle.canary()));
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("server")) << "it serves as long as the handle is open";
}

TEST_F(Report, CanarySeesAnotherFastPathOfItsCgroup) {
  const NamedServer one("one"), two("two");
  Handle first = serve(toml({{"web", "10.96.0.1", 80, {backend(one)}}}), pinned());
  const Paths beside{cgroup().path(), pin() + "2", 0};
  Handle second = serve(toml({{"web", "10.96.0.1", 80, {backend(two)}}}), beside);
  const Outcome outcome = second.canary();
  EXPECT_TRUE(fails_with(-EEXIST, outcome));
  EXPECT_NE(outcome.message.find("`clusterip unload --pin " + pin() + "`"), std::string::npos) << outcome.message;
  EXPECT_TRUE(fails_with(-EEXIST, first.canary()));
  EXPECT_TRUE(ok(first.detach()));
  EXPECT_TRUE(ok(second.canary()));
  EXPECT_TRUE(ok(second.detach()));
}

TEST_F(Report, CanaryTakesNoLinkAndNoDirectoryOfOthersForAnotherFastPath) {
  const NamedServer server("server");
  Handle handle = serve(toml({{"web", "10.96.0.1", 80, {backend(server)}}}), pinned());
  const std::string link = pin() + "-link";
  ASSERT_EQ(::symlink(pin().c_str(), link.c_str()), 0);
  EXPECT_TRUE(ok(handle.canary()));
  ASSERT_EQ(::unlink(link.c_str()), 0);
  const Paths beside{cgroup().path(), pin() + "2", 0};
  Handle second = serve(toml({{"web", "10.96.0.1", 80, {backend(server)}}}), beside);
  ASSERT_TRUE(fails_with(-EEXIST, handle.canary()));
  constexpr uid_t nobody = 65534;
  ASSERT_EQ(::chown(beside.pin.c_str(), nobody, nobody), 0);
  EXPECT_TRUE(ok(handle.canary()));
  ASSERT_EQ(::chown(beside.pin.c_str(), 0, 0), 0);
  EXPECT_TRUE(ok(second.detach()));
  EXPECT_TRUE(ok(handle.detach()));
}

TEST_F(Report, CanarySeesThatItsCgroupIsGone) {
  auto separate = std::make_unique<Cgroup>();
  const std::string path = separate->path();
  Handle handle = serve(toml({}), {path, {}, 0});
  EXPECT_TRUE(ok(handle.canary()));
  separate.reset();
  const Outcome outcome = handle.canary();
  EXPECT_TRUE(fails_with(-ENOTCONN, outcome));
  EXPECT_EQ(outcome.message, "opening the cgroup " + path + ": No such file or directory");
  EXPECT_TRUE(fails_with(-ENOENT, handle.attach())) << "no cgroup to attach to";
  ASSERT_EQ(::mkdir(path.c_str(), 0755), 0);
  EXPECT_TRUE(fails_with(-ENOTCONN, handle.canary())) << "another one of that name";
  // The kernel ends links some moments after their cgroup.
  EXPECT_TRUE(eventually([&] { return bool(ok(handle.attach())); }));
  EXPECT_TRUE(ok(handle.canary()));
  EXPECT_TRUE(ok(handle.detach()));
  EXPECT_TRUE(eventually([&] { return ::rmdir(path.c_str()) == 0; }));
}

TEST_F(Report, CanaryWorksFromOutsideTheCgroup) {
  Handle handle = serve(toml({}));
  Cgroup::leave();
  EXPECT_TRUE(ok(handle.canary()));
  EXPECT_FALSE(has_children());
}

TEST_F(Report, ResolveTellsWhatAConnectMeets) {
  const NamedServer one("one", "127.0.0.1"), two("two", "127.0.0.2");
  Handle handle = serve(toml({{"web", "10.96.0.1", 80, {backend(one), backend(two), {"127.0.0.9", 9, 1, "drain"}}},
                              {"empty", "10.96.0.2", 80, {}}}));
  clusterip_resolution seen;
  std::map<std::string, int> chosen;
  for (int i = 0; i < 200; ++i) {
    ASSERT_TRUE(ok(handle.resolve("10.96.0.1", 80, seen)));
    ASSERT_EQ(seen.verdict, CLUSTERIP_VERDICT_REWRITTEN);
    ++chosen[address_of(seen)];
  }
  EXPECT_STREQ(seen.service, "web");
  EXPECT_EQ(seen.engine, CLUSTERIP_ENGINE_BPF);
  EXPECT_EQ(seen.backends, 2u) << "active ones";
  EXPECT_EQ(chosen.size(), 2u);
  EXPECT_TRUE(chosen.contains(address_of(one)) && chosen.contains(address_of(two)));

  ASSERT_TRUE(ok(handle.resolve("10.96.0.2", 80, seen)));
  EXPECT_EQ(seen.verdict, CLUSTERIP_VERDICT_NO_BACKEND);
  EXPECT_STREQ(seen.service, "empty");
  EXPECT_EQ(seen.backends, 0u);

  ASSERT_TRUE(ok(handle.resolve("10.96.0.1", 81, seen)));
  EXPECT_EQ(seen.verdict, CLUSTERIP_VERDICT_NO_SERVICE);
  EXPECT_STREQ(seen.service, "");
  EXPECT_EQ(seen.engine, 0u);

  ASSERT_TRUE(ok(handle.resolve("10.96.0.1", 80, seen, IPPROTO_UDP)));
  EXPECT_EQ(seen.verdict, CLUSTERIP_VERDICT_NO_SERVICE);

  ASSERT_TRUE(ok(handle.resolve("10.96.0.3", 80, seen)));
  EXPECT_EQ(seen.verdict, CLUSTERIP_VERDICT_PASS);
  EXPECT_STREQ(seen.service, "");

  EXPECT_EQ(handle.visit()[1].connects, 0u) << "resolving is not connecting";
  EXPECT_EQ(one.accepted() + two.accepted(), 0u);
}

TEST_F(Report, ResolveDrawsByWeight) {
  Handle handle = serve(toml({{"web", "10.96.0.1", 80, {{"127.0.0.1", 1, 1}, {"127.0.0.2", 1, 3}}}}));
  constexpr int draws = 20'000;
  int light = 0;
  for (int i = 0; i < draws; ++i) {
    clusterip_resolution seen;
    ASSERT_TRUE(ok(handle.resolve("10.96.0.1", 80, seen)));
    light += address_of(seen) == "127.0.0.1:1";
  }
  EXPECT_NEAR(light, draws / 4.0, 300) << "within almost 5 standard deviations";
}

TEST_F(Report, ResolveBeforeAnyLoadIsNotFound) {
  Handle handle(plugin(), unpinned());
  clusterip_resolution seen;
  EXPECT_TRUE(fails_with(-ENOENT, handle.resolve("10.96.0.1", 80, seen)));
}

TEST_F(Report, ResolveOfAnotherFamilyIsRefused) {
  Handle handle = serve(toml({}));
  sockaddr address{};
  address.sa_family = AF_UNIX;
  clusterip_resolution seen{};
  seen.size = sizeof seen;
  EXPECT_EQ(plugin().resolve(handle.get(), &address, sizeof address, IPPROTO_TCP, &seen, nullptr), -EAFNOSUPPORT);
}

TEST_F(Report, VisitShowsTheLoadedFile) {
  Handle handle(plugin(), unpinned());
  ASSERT_TRUE(ok(
      handle.load(toml({{"a", "10.96.0.1", 80, {{"127.0.0.1", 8080, 3}, {"127.0.0.2", 8081, 65535, "drain"}}, "refuse"},
                        {"b", "10.96.0.1", 65535, {}, "unreachable"},
                        {"c", "10.96.0.3", 1, {{"127.0.0.3", 1}}, "pass"}}))));
  const auto seen = handle.visit();
  ASSERT_EQ(seen.size(), 3u);
  const char* const no_backend[] = {"refuse", "unreachable", "pass"};
  for (std::size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(seen[i].name, std::string(1, static_cast<char>('a' + i)));
    EXPECT_EQ(seen[i].no_backend, no_backend[i]);
    EXPECT_EQ(seen[i].policy, "random");
    EXPECT_EQ(seen[i].protocol, IPPROTO_TCP);
    EXPECT_EQ(seen[i].engine, CLUSTERIP_ENGINE_BPF);
    EXPECT_EQ(seen[i].reason, "");
  }
  EXPECT_EQ(seen[1].vip, "10.96.0.1");
  EXPECT_EQ(seen[1].port, 65535);
  auto backends = seen[0].backends;
  ASSERT_EQ(backends.size(), 2u);
  std::ranges::sort(backends, {}, &SeenBackend::address);
  EXPECT_EQ(backends[0].address, "127.0.0.1");
  EXPECT_EQ(backends[0].port, 8080);
  EXPECT_EQ(backends[0].weight, 3u);
  EXPECT_EQ(backends[0].state, CLUSTERIP_ACTIVE);
  EXPECT_EQ(backends[1].weight, 65535u);
  EXPECT_EQ(backends[1].state, CLUSTERIP_DRAIN);
  EXPECT_TRUE(seen[1].backends.empty());
  EXPECT_EQ(seen[2].backends.size(), 1u);
}

TEST_F(Report, VisitEndsWhenTheVisitorSaysSo) {
  Handle handle = serve(toml({{"a", "10.96.0.1", 80, {{"127.0.0.1", 1}}}, {"b", "10.96.0.2", 80, {{"127.0.0.1", 1}}}}));
  int visits = 0;
  const auto end_at_second = [](const clusterip_service_info*, const clusterip_backend_info*, void* user) {
    return ++*static_cast<int*>(user) == 2 ? 42 : 0;
  };
  EXPECT_EQ(plugin().visit_services(handle.get(), end_at_second, &visits, nullptr), 42);
  EXPECT_EQ(visits, 2);
}

TEST_F(Report, VisitSaysHowManyBackendsFollow) {
  Handle handle =
      serve(toml({{"a", "10.96.0.1", 80, {{"127.0.0.1", 1}, {"127.0.0.2", 1}, {"127.0.0.3", 1, 1, "drain"}}}}));
  std::pair<std::uint32_t, std::uint32_t> announced_and_seen;
  const auto count = [](const clusterip_service_info* service, const clusterip_backend_info* backend, void* user) {
    auto& [announced, seen] = *static_cast<std::pair<std::uint32_t, std::uint32_t>*>(user);
    if (backend == nullptr)
      announced = service->backends;
    else
      ++seen;
    return 0;
  };
  EXPECT_EQ(plugin().visit_services(handle.get(), count, &announced_and_seen, nullptr), 0);
  EXPECT_EQ(announced_and_seen, (std::pair{3u, 3u}));
}

TEST_F(Report, RefusedConnectsAreCountedPerService) {
  Handle handle = serve(toml(
      {{"a", "10.96.0.1", 80, {}}, {"b", "10.96.0.2", 80, {}, "unreachable"}, {"c", "10.96.0.3", 80, {}, "pass"}}));
  for (int i = 0; i < 3; ++i) EXPECT_EQ(ask("10.96.0.1", 80), refused_by_program(ECONNREFUSED));
  for (int i = 0; i < 2; ++i) EXPECT_EQ(ask("10.96.0.2", 80), refused_by_program(EHOSTUNREACH));
  EXPECT_EQ(ask("10.96.0.3", 80), refused_with(ENETUNREACH));
  const auto seen = handle.visit();
  EXPECT_EQ(seen[0].refused, 3u);
  EXPECT_EQ(seen[1].refused, 2u);
  EXPECT_EQ(seen[2].refused, 0u) << "passed, not refused";
  for (const SeenService& service : seen) EXPECT_EQ(service.connects, 0u);
}

}  // namespace
