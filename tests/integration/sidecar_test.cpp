// SPDX-License-Identifier: BSD-2-Clause
//
// A sidecar catches what applications send, by a redirect rule, as those of service meshes do. `mark` lets a service's
// connections pass it.
#include <fmt/format.h>
#include <gmock/gmock.h>

#include <algorithm>
#include <optional>
#include <string>

#include "tests/support/fixture.h"
#include "tests/support/other_host.h"

namespace {

using namespace support;
using testing::HasSubstr;

/// Redirects each TCP connection that this network namespace begins to a port of its own, but for those with `mark`.
class Redirect {
 public:
  Redirect(std::uint16_t port, std::uint32_t mark) {
    shell(
        fmt::format("nft add table inet sidecar;"
                    "nft 'add chain inet sidecar output {{ type nat hook output priority -100; }}';"
                    "nft add rule inet sidecar output meta mark {} return;"
                    "nft add rule inet sidecar output meta l4proto tcp redirect to :{}",
                    mark, port));
  }
  ~Redirect() { run({"nft", "delete", "table", "inet", "sidecar"}); }
  Redirect(const Redirect&) = delete;
  Redirect& operator=(const Redirect&) = delete;
};

class Sidecar : public Integration, public testing::WithParamInterface<const char*> {
 protected:
  static bool v6() { return GetParam() == std::string("V6"); }
};

TEST_P(Sidecar, CatchesServicesButThoseWithItsMark) {
  const OtherHost host;
  std::optional<OtherHost::Stay> there(host);
  const NamedServer server("backend", v6() ? OtherHost::v6 : OtherHost::v4);
  const NamedServer plain("plain", v6() ? OtherHost::more_v6 : OtherHost::more_v4);
  there.reset();
  const NamedServer sidecar("sidecar", v6() ? "::1" : "127.0.0.1");
  const std::string vip = v6() ? "fd00:96::1" : "10.96.0.1", other = v6() ? "fd00:96::2" : "10.96.0.2";
  const auto services = [&](const std::string& more) {
    return toml({{"service", vip, 80, {backend(server)}, "refuse", more}, {"other", other, 80, {backend(server)}}});
  };
  Handle handle = serve(services(""));
  ASSERT_EQ(ask(vip, 80), answered_by("backend")) << "there is no sidecar yet";
  ASSERT_EQ(ask(plain.address(), plain.port()), answered_by("plain"));

  const Redirect redirect(sidecar.port(), 0xc1);
  EXPECT_EQ(ask(vip, 80), answered_by("sidecar"));
  ASSERT_TRUE(ok(handle.load(services("mark = 0xc1"))));
  EXPECT_EQ(ask(vip, 80), answered_by("backend"));
  EXPECT_EQ(ask(other, 80), answered_by("sidecar")) << "another service with the same backend";
  EXPECT_EQ(ask(plain.address(), plain.port()), answered_by("sidecar"));
  EXPECT_EQ(ask(server.address(), server.port()), answered_by("sidecar")) << "the backend by its own address";
  ASSERT_TRUE(ok(handle.load(services("mark = 0xc2"))));
  EXPECT_EQ(ask(vip, 80), answered_by("sidecar")) << "a mark that no rule knows";
  ASSERT_TRUE(ok(handle.load(services(""))));
  EXPECT_EQ(ask(vip, 80), answered_by("sidecar"));
}

TEST_P(Sidecar, CatchesASocketThatConnectsElsewhereNext) {
  const OtherHost host;
  std::optional<OtherHost::Stay> there(host);
  const NamedServer plain("plain", v6() ? OtherHost::more_v6 : OtherHost::more_v4);
  there.reset();
  const NamedServer sidecar("sidecar", v6() ? "::1" : "127.0.0.1");
  const std::string vip = v6() ? "fd00:96::1" : "10.96.0.1";
  const Handle handle =
      serve(toml({{"dead", vip, 80, {{v6() ? OtherHost::v6 : OtherHost::v4, 1}}, "refuse", "mark = 0xc1"}}));
  const Redirect redirect(sidecar.port(), 0xc1);
  const Fd fd = tcp_socket(0, v6() ? AF_INET6 : AF_INET);
  EXPECT_EQ(connect_errno(fd.get(), vip, 80), ECONNREFUSED) << "by the other host, where nobody listens";
  ASSERT_EQ(connect_errno(fd.get(), plain.address(), plain.port()), 0);
  EXPECT_EQ(read_answer(fd.get()), answered_by("sidecar"));
}

INSTANTIATE_TEST_SUITE_P(Mark, Sidecar, testing::Values("V4", "V6"),
                         [](const auto& param) { return std::string(param.param); });

class SidecarCheck : public Integration {
 protected:
  static Finished check(const std::string& text) {
    const TemporaryDirectory directory;
    return run({CLUSTERIP_COMMAND, "--plugin", CLUSTERIP_PLUGIN_PATH, "check", directory.write("mesh.toml", text)});
  }
};

TEST_F(SidecarCheck, WarnsOfWhatIsBypassedToo) {
  const Service plain{"plain", "10.96.0.1", 80, {{"127.0.0.1", 80}}};
  const Service marked{"marked", "10.96.0.2", 80, {{"127.0.0.1", 80}}, "refuse", "mark = 193"};
  EXPECT_EQ(check(toml({plain})).err, "");
  const Finished seen = check(toml({plain, marked}));
  EXPECT_EQ(seen.exit_code, 0) << "it is valid";
  EXPECT_EQ(std::ranges::count(seen.err, '\n'), 1) << seen.err;
  for (const char* word : {"mesh.toml:", "warning", "\"marked\"", "mark", "mTLS", "authorization", "telemetry"})
    EXPECT_THAT(seen.err, HasSubstr(word));
}

}  // namespace
