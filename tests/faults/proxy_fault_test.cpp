// SPDX-License-Identifier: BSD-2-Clause
//
// A system call of the userspace engine fails: it does not begin, and says why in one line; or it serves, less what it
// says that it does not, and a reload makes that good.
#include <gmock/gmock.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <optional>
#include <sstream>
#include <string>
#include <system_error>

#include "tests/faults/fault.h"
#include "tests/proxy/proxied.h"

namespace {

using namespace support;

using testing::HasSubstr;
using testing::Not;

struct Row {
  Call call;
  const char* told = nullptr;  // what it says of it, at one of the calls at least; null: it is made good without a word
  bool begins = true;          // it serves without what failed
  bool costs_bulk = false;     // a connection that is being relayed
};

std::ostream& operator<<(std::ostream& out, const Row& row) { return out << row.call; }

class ProxyFault : public Proxied, public testing::WithParamInterface<Row> {
 protected:
  ProxyFault() {
    userspace_.local_vips = true;
    userspace_.drain_timeout = "1s";
    files_.write(proxy_toml({{"web", "10.96.0.1", 80, {backend(one_)}}, {"bulk", "10.96.0.2", 80, {bulk_.backend()}}},
                            userspace_));
  }

  /// Blocks until it serves, and returns what it has said; nothing: it has ended.
  static std::optional<std::string> begin(Process& proxy) {
    try {
      return proxy.wait_for_error("serving ");
    } catch (const std::runtime_error&) {
      return {};
    }
  }

  /// Whether a stream that is spliced comes to its end.
  bool pass_bulk() const {
    auto sinking = meanwhile([this] {
      const Fd connection = bulk_.accept();
      for (char bytes[65536];;) {
        const bool goes_on = is_readable(connection.get(), 10'000);
        EXPECT_TRUE(goes_on) << "the backend is told of no end";
        if (!goes_on || ::recv(connection.get(), bytes, sizeof bytes, 0) <= 0) return;
      }
    });
    bool has_passed = false;
    try {
      const Fd client = dial("10.96.0.2", 80);
      send_stream(client, 1, 1 << 20);
      send_end(client);
      has_passed = end_of(client) == 0;
    } catch (const std::system_error&) {
      has_passed = false;  // it was reset
    }
    sinking.wait();
    return has_passed;
  }

  /// What it has said of a shortage.
  static std::string warnings(const std::string& log) {
    std::istringstream lines(log);
    std::string found;
    for (std::string line; std::getline(lines, line);) {
      if (!line.contains(" info: ") && !line.contains(" warning: serving ")) found += line + "\n";
    }
    return found;
  }

  /// True: it has told of the fault.
  bool serves_on_or_says_why_not(const Fault& fault, bool is_to_fail) {
    const Row& row = GetParam();
    Process proxy({CLUSTERIP_FALLBACK_PROXY, "--config", files_.config()}, nullptr, [&] { fault.prepare(); });
    const auto begun = begin(proxy);
    if (!begun) {
      const Finished finished = proxy.wait();
      EXPECT_TRUE(is_to_fail && fault.was_injected() && !row.begins) << "it ended for another reason";
      EXPECT_EQ(finished.exit_code, 1);
      EXPECT_EQ(std::ranges::count(finished.err, '\n'), 1) << finished.err;
      EXPECT_THAT(finished.err, HasSubstr(row.told == nullptr ? "nothing" : row.told));
      EXPECT_THAT(finished.err, Not(HasSubstr("/usr/"))) << "a place in somebody's source";
      return true;
    }
    // Each service that it does not name answers each time.
    const bool is_served = !begun->contains("service web: ");
    for (int i = 0; i < 4; ++i) EXPECT_EQ(ask("10.96.0.1", 80) == answered_by("one"), is_served) << *begun;
    if (!begun->contains("service bulk: ")) {
      const bool has_passed = pass_bulk();
      EXPECT_TRUE(has_passed || (is_to_fail && row.costs_bulk));
    }
    const bool is_injected = is_to_fail && fault.was_injected();
    const std::string told = warnings(*begun);
    EXPECT_TRUE(row.begins || !is_injected) << "it serves, but what?";
    if (is_injected && row.told != nullptr && !told.empty())
      EXPECT_THAT(told, HasSubstr(row.told));
    else
      EXPECT_EQ(told, "");
    EXPECT_EQ(begun->contains("serving 2 services"), is_served && !begun->contains("service bulk: "));
    // A reload does what could not be done.
    ::kill(proxy.pid(), SIGHUP);
    EXPECT_THAT(proxy.wait_for_error("serving "), HasSubstr("serving 2 services"));
    EXPECT_EQ(ask("10.96.0.1", 80), answered_by("one"));
    EXPECT_TRUE(pass_bulk());
    ::kill(proxy.pid(), SIGTERM);
    const Finished finished = proxy.wait();
    EXPECT_EQ(finished.exit_code, 0) << finished.err;
    const Finished cleaned = run({CLUSTERIP_FALLBACK_PROXY, "--cleanup"});  // the next one makes its VIPs local itself
    EXPECT_EQ(cleaned.exit_code, 0) << cleaned.err;
    return !told.empty();
  }

 private:
  const NamedServer one_{"one"};
  const TcpListener bulk_;
  Userspace userspace_;
  FallbackProxy::Files files_;
};

TEST_P(ProxyFault, ServesOnOrSaysWhyNot) {
  constexpr int most = 6;
  const Row& row = GetParam();
  int calls = 0;
  {
    SCOPED_TRACE("nothing fails");
    const Fault none = Fault::none(row.call);
    EXPECT_FALSE(serves_on_or_says_why_not(none, false));
    calls = none.counted();
  }
  ASSERT_GT(calls, 0) << "it never comes to this call";
  int injected = 0;
  int told = 0;
  for (int nth = 1; nth <= std::min(calls, most); ++nth) {
    SCOPED_TRACE(fmt::format("{} number {} of {}", row.call.name, nth, calls));
    const Fault fault(row.call, nth);
    told += serves_on_or_says_why_not(fault, true) ? 1 : 0;
    injected += fault.was_injected() ? 1 : 0;
  }
  // Not all: how often it accepts, splices and is told of routes is a matter of time.
  EXPECT_GE(2 * injected, std::min(calls, most));
  EXPECT_EQ(told > 0, row.told != nullptr);
  EXPECT_TRUE(row.begins || told == injected);
  std::printf("%s: %d injected, %d told\n", row.call.name, injected, told);
}

constexpr const char* no_descriptor = "socket: Too many open files (LimitNOFILE=";

INSTANTIATE_TEST_SUITE_P(
    Each, ProxyFault,
    testing::Values(
        Row{{"AcceptEmfile", "accept4", -1, EMFILE}}, Row{{"AcceptAborted", "accept4", -1, ECONNABORTED}},
        Row{{"AcceptEnomem", "accept4", -1, ENOMEM}}, Row{{"SocketV4", "socket", AF_INET, EMFILE}, no_descriptor},
        Row{{"SocketNetlink", "socket", AF_NETLINK, ENOMEM}, "rtnetlink socket: Cannot allocate memory"},
        Row{{"SocketUnix", "socket", AF_UNIX, EMFILE}, no_descriptor}, Row{{"Netlink", "netlink", -1, ENOBUFS}},
        Row{{"NetlinkEnomem", "netlink", -1, ENOMEM}, "Cannot allocate memory"},
        Row{{"NetlinkReceive", "netlink-receive", -1, ENOBUFS}},
        Row{{"NetlinkNoAnswer", "netlink-receive", -1, EAGAIN}, "rtnetlink: Resource temporarily unavailable"},
        Row{{"NetlinkCut", "netlink-cut", -1, ENOSPC}, "rtnetlink: No space left on device"},
        Row{{"NetlinkNews", "netlink-news", -1, ENOBUFS}}, Row{{"Splice", "splice", -1, ENOMEM}, nullptr, true, true},
        Row{{"Pipe", "pipe2", -1, EMFILE}},
        Row{{"EpollWatch", "epoll_ctl", EPOLL_CTL_ADD, ENOSPC}, "No space left on device", false}),
    [](const auto& test) { return std::string(test.param.call.name); });

}  // namespace
