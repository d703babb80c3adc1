// SPDX-License-Identifier: BSD-2-Clause
//
// A system call of the userspace engine fails: what cannot be done is said, connections that need it may fail, and the
// proxy serves on.
#include <signal.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <filesystem>

#include "tests/faults/fault.h"
#include "tests/proxy/proxied.h"

namespace {

using namespace support;

class ProxyFault : public Proxied, public testing::WithParamInterface<Call> {};

constexpr int most = 6;

TEST_P(ProxyFault, ServesOnOrSaysWhyNot) {
  const Call call = GetParam();
  const NamedServer one("one");
  const TcpListener bulk;
  Userspace userspace;
  userspace.local_vips = true;
  userspace.drain_timeout = "1s";
  FallbackProxy::Files files;
  files.write(
      proxy_toml({{"web", "10.96.0.1", 80, {backend(one)}}, {"bulk", "10.96.0.2", 80, {bulk.backend()}}}, userspace));
  int injected = 0;
  for (int nth = 1; nth <= most; ++nth) {
    SCOPED_TRACE(fmt::format("{} number {}", call.name, nth));
    const Fault fault(call.call, call.command, nth, call.error);
    Process proxy({CLUSTERIP_FALLBACK_PROXY, "--config", files.config()}, nullptr, [&] { fault.prepare(); });
    bool is_serving = true;
    try {
      proxy.wait_for_error("serving ");
    } catch (const std::runtime_error&) {
      is_serving = false;
    }
    if (!is_serving) {
      const Finished finished = proxy.wait();
      EXPECT_TRUE(finished.exit_code == 1 || finished.exit_code == 4) << finished.exit_code;
      EXPECT_EQ(std::ranges::count(finished.err, '\n'), 1) << finished.err;
      ++injected;
      continue;
    }
    const auto pass_bulk = [] {
      try {
        const Fd client = dial("10.96.0.2", 80);
        send_stream(client, 1, 1 << 20);
        send_end(client);
        return end_of(client) == 0;
      } catch (const std::system_error&) {
        return false;
      }
    };
    const auto sink = [&bulk] {
      const Fd connection = bulk.accept();
      while (is_readable(connection.get(), 2000)) {
        char bytes[65536];
        if (::recv(connection.get(), bytes, sizeof bytes, 0) <= 0) break;
      }
    };
    for (int i = 0; i < 4; ++i) ask("10.96.0.1", 80);  // one of them may fail
    if (std::string(call.call) == "splice" || std::string(call.call) == "pipe2") {
      auto sinking = meanwhile(sink);
      pass_bulk();
      sinking.wait();
    }
    if (!fault.was_injected()) {
      ::kill(proxy.pid(), SIGTERM);
      proxy.wait();
      break;
    }
    ++injected;
    // A reload does what could not be done.
    ::kill(proxy.pid(), SIGHUP);
    proxy.wait_for_error("serving ");
    EXPECT_TRUE(eventually([&] { return ask("10.96.0.1", 80) == answered_by("one"); }));
    ::kill(proxy.pid(), SIGTERM);
    const Finished finished = proxy.wait();
    EXPECT_EQ(finished.exit_code, 0) << finished.err;
    run({CLUSTERIP_FALLBACK_PROXY, "--cleanup"});
  }
  EXPECT_GT(injected, 0) << "it never came to this call";
  std::printf("%s: %d injected\n", call.name, injected);
}

INSTANTIATE_TEST_SUITE_P(
    Each, ProxyFault,
    testing::Values(Call{"AcceptEmfile", "accept4", -1, EMFILE}, Call{"AcceptAborted", "accept4", -1, ECONNABORTED},
                    Call{"AcceptEnomem", "accept4", -1, ENOMEM}, Call{"SocketV4", "socket", AF_INET, EMFILE},
                    Call{"SocketNetlink", "socket", AF_NETLINK, ENOMEM}, Call{"SocketUnix", "socket", AF_UNIX, EMFILE},
                    Call{"Netlink", "netlink", -1, ENOBUFS}, Call{"Splice", "splice", -1, ENOMEM},
                    Call{"Pipe", "pipe2", -1, EMFILE}, Call{"EpollWatch", "epoll_ctl", EPOLL_CTL_ADD, ENOSPC}),
    [](const auto& test) { return std::string(test.param.name); });

}  // namespace
