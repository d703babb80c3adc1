// SPDX-License-Identifier: BSD-2-Clause
//
// Kernels that lack a hook or a helper: what the probe says, and what becomes of a configuration that needs it.
#include "tests/support/older_kernel.h"

#include <sys/socket.h>

#include <string>

#include "tests/support/fallback_proxy.h"
#include "tests/support/fixture.h"

namespace {

using namespace support;

const std::string udp = "protocol = \"udp\"";

/// A service that needs what is lacking; it has the VIP and the port of "web", or those of its family, and port 81.
struct Row {
  const char* what;
  Lacking lacking;
  std::uint32_t capability;
  const char* vip;
  const char* backend;
  std::string keys;
  const char* reason;  // a part of it
};

const Row rows[] = {
    {"connect6",
     {.hooks = {BPF_CGROUP_INET6_CONNECT}},
     CLUSTERIP_CAN_CONNECT6,
     "fd00::1",
     "::1",
     "",
     "cgroup/connect6"},
    {"sendmsg4",
     {.hooks = {BPF_CGROUP_UDP4_SENDMSG}},
     CLUSTERIP_CAN_SENDMSG,
     "10.96.0.1",
     "127.0.0.1",
     udp,
     "cgroup/sendmsg"},
    {"sendmsg6", {.hooks = {BPF_CGROUP_UDP6_SENDMSG}}, CLUSTERIP_CAN_SENDMSG, "fd00::1", "::1", udp, "cgroup/sendmsg"},
    {"recvmsg4",
     {.hooks = {BPF_CGROUP_UDP4_RECVMSG}},
     CLUSTERIP_CAN_RECVMSG,
     "10.96.0.1",
     "127.0.0.1",
     udp,
     "cgroup/recvmsg"},
    {"recvmsg6", {.hooks = {BPF_CGROUP_UDP6_RECVMSG}}, CLUSTERIP_CAN_RECVMSG, "fd00::1", "::1", udp, "cgroup/recvmsg"},
    {"sock_release",
     {.hooks = {BPF_CGROUP_INET_SOCK_RELEASE}},
     CLUSTERIP_CAN_RELEASE,
     "10.96.0.1",
     "127.0.0.1",
     "policy = \"least_conn\"",
     "cgroup/sock_release"},
    {"sock_ops",
     {.hooks = {BPF_CGROUP_SOCK_OPS}},
     CLUSTERIP_CAN_SOCK_OPS,
     "10.96.0.1",
     "127.0.0.1",
     "eject = {}",
     "sock_ops"},
    {"setsockopt",
     {.helpers = {BPF_FUNC_setsockopt}},
     CLUSTERIP_CAN_MARK,
     "10.96.0.1",
     "127.0.0.1",
     "mark = 193",
     "bpf_setsockopt()"},
    {"netns cookie",
     {.helpers = {BPF_FUNC_get_netns_cookie}},
     CLUSTERIP_CAN_NETNS_CLIENT,
     "10.96.0.1",
     "127.0.0.1",
     "affinity = \"1h\"\nclient = \"netns\"",
     "network namespace cookies"},
    {"cgroup id",
     {.helpers = {BPF_FUNC_get_current_cgroup_id}},
     CLUSTERIP_CAN_CGROUP_CLIENT,
     "10.96.0.1",
     "127.0.0.1",
     "policy = \"maglev\"",
     "does not tell programs the cgroup"},
};

class OlderKernel : public Integration {
 protected:
  static std::uint32_t probe(const Plugin& plugin) {
    clusterip_capabilities found{};
    found.size = sizeof found;
    require(plugin.probe(&found, nullptr) == 0, "probe");
    return found.can;
  }

  static void require_contains(const std::string& text, const std::string& part) {
    require(text.find(part) != std::string::npos, "no \"" + part + "\" in \"" + text + "\"");
  }

  Paths partial(const std::string& pin = {}) const { return {cgroup().path(), pin, CLUSTERIP_ALLOW_PARTIAL}; }
};

/// A service that any kernel carries, and one that this row's does not.
std::string toml_of(const Row& row, const NamedServer& server) {
  return toml(
      {{"web", "10.96.0.1", 80, {backend(server)}}, {"needy", row.vip, 81, {{row.backend, 7000}}, "refuse", row.keys}});
}

TEST_F(OlderKernel, ProbeFindsExactlyWhatIsMissing) {
  const std::uint32_t all = probe(plugin());
  for (const Row& row : rows) {
    SCOPED_TRACE(row.what);
    EXPECT_EQ(in_child_without(row.lacking,
                               [&] {
                                 const std::uint32_t found = probe(plugin());
                                 // Events tell the caller's cgroup.
                                 const std::uint32_t more =
                                     row.capability == CLUSTERIP_CAN_CGROUP_CLIENT ? CLUSTERIP_CAN_EVENTS : 0;
                                 require((all & row.capability) != 0, "this kernel has it");
                                 require(found == (all & ~(row.capability | more)), std::to_string(found));
                               }),
              "");
  }
}

TEST_F(OlderKernel, ServiceThatNeedsMoreIsRefusedByName) {
  const NamedServer server("server");
  for (const Row& row : rows) {
    SCOPED_TRACE(row.what);
    const std::string text = toml_of(row, server);
    EXPECT_EQ(in_child_without(row.lacking,
                               [&] {
                                 Handle handle(plugin(), unpinned());
                                 const Outcome outcome = handle.load(text);
                                 require(outcome.code == -EOPNOTSUPP, std::to_string(outcome.code));
                                 require_contains(outcome.message, "service \"needy\": ");
                                 require_contains(outcome.message, row.reason);
                                 require_contains(
                                     outcome.message,
                                     "the userspace engine can carry it (clusterip run, by mode = \"auto\")");
                                 require_ok(handle.attach());
                                 require(ask("10.96.0.1", 80) == refused_with(ENETUNREACH), "a part of it is served");
                               }),
              "");
  }
}

TEST_F(OlderKernel, WhereAPartIsAllowedTheOthersAreServed) {
  const NamedServer server("server");
  for (const Row& row : rows) {
    SCOPED_TRACE(row.what);
    const std::string text = toml_of(row, server);
    EXPECT_EQ(
        in_child_without(
            row.lacking,
            [&] {
              Handle handle = serve(text, partial());
              require(ask("10.96.0.1", 80) == answered_by("server"), "the other service is not served");
              require(ask("10.96.0.1", 82) == refused_by_program(ECONNREFUSED),
                      "a port that no service has is not refused");
              const bool is_udp = row.keys == udp;
              const int family = Endpoint(row.vip, 81).family();
              const Fd fd = is_udp ? udp_socket(family) : tcp_socket(0, family);
              require(connect_errno(fd.get(), row.vip, 81) == ENETUNREACH, "what is left out does not pass untouched");

              const auto seen = handle.visit();
              require(seen.size() == 2 && seen[0].name == "needy" && seen[1].name == "web", "not the two services");
              require(seen[0].engine == CLUSTERIP_ENGINE_USERSPACE, "another engine");
              require_contains(seen[0].reason, row.reason);
              require(seen[0].backends.size() == 1 && seen[0].no_backend == "refuse", "not as it was loaded");
              require(seen[1].engine == CLUSTERIP_ENGINE_BPF && seen[1].connects == 1, "not the fast path");
              const Outcome set = handle.set_backends("needy", {{row.backend, 7001}});
              require(set.code == -EOPNOTSUPP, "backends of what it does not carry");
              require_contains(set.message, row.reason);
              clusterip_resolution found;
              require_ok(handle.resolve(row.vip, 81, found, is_udp ? IPPROTO_UDP : IPPROTO_TCP));
              require(found.verdict == CLUSTERIP_VERDICT_PASS && found.engine == CLUSTERIP_ENGINE_USERSPACE &&
                          found.service == std::string("needy"),
                      "resolve tells something else");
            }),
        "");
  }
}

TEST_F(OlderKernel, WhatIsLeftOutReachesTheUserspaceEngineBesideTheOthers) {
  const NamedServer server("server");
  const NamedUdpServer dns("dns");
  const Service left_out{"dns", "127.0.1.1", 53, {backend(dns)}, "refuse", udp};
  const FallbackProxy proxy(proxy_toml({left_out}));
  EXPECT_EQ(in_child_without({.hooks = {BPF_CGROUP_UDP4_RECVMSG}},
                             [&] {
                               const Handle handle =
                                   serve(toml({{"web", "127.0.1.1", 80, {backend(server)}}, left_out}), partial());
                               require(ask("127.0.1.1", 80) == answered_by("server"), "the fast path");
                               const std::string answer = exchange(udp_socket().get(), "127.0.1.1", 53);
                               require(answer == "dns from 127.0.1.1:53", answer);
                             }),
            "");
}

TEST_F(OlderKernel, WhatAsksForTheEngineThatCannotIsRefused) {
  const NamedServer server("server");
  EXPECT_EQ(in_child_without(
                {.helpers = {BPF_FUNC_setsockopt}},
                [&] {
                  Handle handle =
                      serve(toml({{"any", "10.96.0.1", 80, {backend(server)}, "refuse", "mark = 1"},
                                  {"bpf", "10.96.0.1", 81, {backend(server)}, "refuse", "mark = 1\nengine = \"bpf\""}}),
                            partial());
                  require(ask("10.96.0.1", 80).error == ENETUNREACH, "what may be carried elsewhere does not pass");
                  require(ask("10.96.0.1", 81) == refused_by_program(ECONNREFUSED),
                          "what nobody carries is not refused");
                  require_contains(handle.visit().at(1).reason, "bpf_setsockopt()");
                }),
            "");
}

TEST_F(OlderKernel, ANewerKernelTakesUpWhatWasLeftOut) {
  const NamedServer server("server");
  const NamedUdpServer dns("dns");
  const std::string text =
      toml({{"dns", "10.96.0.1", 53, {backend(dns)}, "refuse", udp}, {"web", "10.96.0.1", 80, {backend(server)}}});
  EXPECT_EQ(in_child_without({.hooks = {BPF_CGROUP_UDP4_RECVMSG}},
                             [&] { const Handle handle = serve(text, partial(pin())); }),
            "");
  Handle handle(plugin(), pinned());
  auto seen = handle.visit();
  ASSERT_EQ(seen.size(), 2u);
  EXPECT_EQ(seen[0].engine, CLUSTERIP_ENGINE_USERSPACE);
  EXPECT_NE(seen[0].reason, "");
  EXPECT_EQ(exchange(udp_socket().get(), "10.96.0.1", 53), "ENETUNREACH");

  ASSERT_TRUE(ok(handle.load(text)));
  EXPECT_EQ(exchange(udp_socket().get(), "10.96.0.1", 53), "dns from 10.96.0.1:53");
  EXPECT_EQ(handle.visit().at(0).engine, CLUSTERIP_ENGINE_BPF);
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("server"));
  ASSERT_TRUE(ok(handle.detach()));
}

TEST_F(OlderKernel, WithoutSocketStorageThereIsNoFastPath) {
  EXPECT_EQ(in_child_without({.helpers = {BPF_FUNC_sk_storage_get}},
                             [&] {
                               const Outcome outcome = open_outcome(plugin(), unpinned());
                               require(outcome.code == -EOPNOTSUPP, std::to_string(outcome.code));
                               require_contains(outcome.message, "no socket storage");
                             }),
            "");
}

/// What is not probed, since every kernel with the hooks has it, is no reason to fall back: that would hide a bug.
TEST_F(OlderKernel, ProgramThatTheVerifierRefusesIsABug) {
  EXPECT_EQ(in_child_without({.helpers = {BPF_FUNC_get_smp_processor_id}},
                             [&] {
                               // libbpf tells its part there, and where it writes is the host's choice.
                               const StderrCapture of_libbpf;
                               Handle handle(plugin(), unpinned());
                               const Outcome outcome = handle.attach();
                               require(outcome.code == -ENOTRECOVERABLE, std::to_string(outcome.code));
                               require_contains(outcome.message, "a bug of clusterip: ");
                               require_contains(outcome.message, "func");
                             }),
            "");
  EXPECT_TRUE(connect4_programs(cgroup()).empty());
}

TEST_F(OlderKernel, WithoutGetpeernameThePeerIsTheBackendAndTheReasonSaysSo) {
  const NamedServer server("server");
  EXPECT_EQ(in_child_without({.hooks = {BPF_CGROUP_INET4_GETPEERNAME}},
                             [&] {
                               Handle handle = serve(toml({{"web", "10.96.0.1", 80, {backend(server)}}}));
                               const Fd fd = tcp_socket();
                               require(connect_errno(fd.get(), "10.96.0.1", 80) == 0, "not served");
                               require(peer_of(fd.get()) == server.address() + ":" + std::to_string(server.port()),
                                       peer_of(fd.get()));
                               const auto seen = handle.visit();
                               require(seen.at(0).engine == CLUSTERIP_ENGINE_BPF, "another engine");
                               require_contains(seen.at(0).reason, "cgroup/getpeername");
                             }),
            "");
}

TEST_F(OlderKernel, WithoutSetRetvalARefusalIsNotPermitted) {
  EXPECT_EQ(in_child_without({.helpers = {BPF_FUNC_set_retval}},
                             [&] {
                               Handle handle = serve(toml({{"empty", "10.96.0.1", 80, {}}}));
                               require(ask("10.96.0.1", 80) == refused_with(EPERM), "another errno");
                               require(ask("10.96.0.1", 81) == refused_with(EPERM), "another errno");
                               clusterip_canary_result seen{};
                               seen.size = sizeof seen;
                               require_ok(handle.canary(&seen));
                               require(seen.refuse_errno == EPERM, "the canary tells the errno");
                             }),
            "");
}

TEST_F(OlderKernel, WithoutRingBuffersThereAreNoEvents) {
  const NamedServer server("server");
  EXPECT_EQ(in_child_without({.maps = {BPF_MAP_TYPE_RINGBUF}},
                             [&] {
                               const Handle handle = serve(toml({{"web", "10.96.0.1", 80, {backend(server)}}}));
                               require(ask("10.96.0.1", 80) == answered_by("server"), "not served");
                               require(plugin().event_fd(handle.get(), 60, nullptr) == -EOPNOTSUPP, "events");
                             }),
            "");
}

TEST_F(OlderKernel, WithoutSockOpsAFailedConnectCountsUntilItsSocketIsClosed) {
  EXPECT_EQ(in_child_without({.hooks = {BPF_CGROUP_SOCK_OPS}},
                             [&] {
                               Handle handle = serve(toml({{"web", "10.96.0.1", 80, {{"127.0.0.1", 1}}}}));
                               Fd fd = tcp_socket();
                               require(connect_errno(fd.get(), "10.96.0.1", 80) == ECONNREFUSED, "somebody listens");
                               require(handle.visit().at(0).live == 1, "it does not count");
                               fd.reset();
                               require(handle.visit().at(0).live == 0, "it counts on");
                             }),
            "");
}

}  // namespace
