// SPDX-License-Identifier: BSD-2-Clause
//
// Nothing of what is refused leaves the host: a counter at the cable to the next host stays as it is.
#include <fmt/format.h>
#include <sys/socket.h>

#include <string>
#include <tuple>

#include "tests/support/fixture.h"
#include "tests/support/other_host.h"

namespace {

using namespace support;

/// Counts the packets for VIPs that are sent over the cable.
class CableCounter {
 public:
  CableCounter() {
    shell(
        "nft add table inet leak; nft 'add counter inet leak sent';"
        "nft 'add chain inet leak output { type filter hook output priority 0; }';"
        "nft add rule inet leak output oifname cable0 ip daddr 10.96.0.0/16 counter name sent;"
        "nft add rule inet leak output oifname cable0 ip6 daddr fd00:96::/64 counter name sent");
  }
  ~CableCounter() { run({"nft", "delete", "table", "inet", "leak"}); }
  CableCounter(const CableCounter&) = delete;
  CableCounter& operator=(const CableCounter&) = delete;

  int packets() const {
    const Finished list = run({"nft", "--json", "list", "counter", "inet", "leak", "sent"});
    return std::stoi(jq(".nftables[].counter // empty | .packets", list.out));
  }
};

enum class Way { tcp, tcp_fast_open, udp_connected, udp_unconnected };

struct Family {
  int socket;        // the family of the application's socket
  const char* vips;  // what all VIPs begin with
  const char* name;
};
constexpr Family families[] = {
    {AF_INET, "10.96.0.", "V4"}, {AF_INET6, "fd00:96::", "V6"}, {AF_INET6, "::ffff:10.96.0.", "Mapped"}};

class Leak : public Integration, public testing::WithParamInterface<std::tuple<Way, Family>> {
 protected:
  /// VIPs that end on 1: a service without backend, refused. 2: unreachable. 3: passed. 4: has a draining backend
  /// alone.
  static std::string services() {
    std::vector<Service> services;
    for (const bool v6 : {false, true}) {
      const std::string prefix = v6 ? "fd00:96::" : "10.96.0.";
      for (const char* protocol : {"tcp", "udp"}) {
        const auto add = [&](int last, const std::string& no_backend, const std::vector<Backend>& backends) {
          services.push_back({fmt::format("{}-{}-{}", protocol, v6 ? 6 : 4, last), prefix + std::to_string(last), 80,
                              backends, no_backend, fmt::format("protocol = \"{}\"", protocol)});
        };
        add(1, "refuse", {});
        add(2, "unreachable", {});
        add(3, "pass", {});
        add(4, "refuse", {{v6 ? OtherHost::v6 : OtherHost::v4, 80, 1, "drain"}});
      }
    }
    return toml(services);
  }

  /// The errno that the application is given by its connect() or by its datagram; 0 when there is none, or none yet.
  static int try_to_reach(int last, std::uint16_t port) {
    const auto& [way, family] = GetParam();
    const Endpoint to(family.vips + std::to_string(last), port);
    const bool tcp = way == Way::tcp || way == Way::tcp_fast_open;
    const Fd fd = tcp ? tcp_socket(SOCK_NONBLOCK, family.socket) : udp_socket(family.socket);
    const auto send_to = [&](int flags) {
      return ::sendto(fd.get(), "x", 1, flags, to.address(), to.length()) < 0 ? errno : 0;
    };
    int error = 0;
    if (way == Way::tcp_fast_open) {
      error = send_to(MSG_FASTOPEN);
    } else if (way == Way::udp_unconnected) {
      error = send_to(0);
    } else {
      error = ::connect(fd.get(), to.address(), to.length()) < 0 ? errno : 0;
      // A refused socket is connected to nothing: what it sends has nowhere to go, either.
      if (way == Way::udp_connected && ::send(fd.get(), "x", 1, 0) < 0 && error == 0) error = errno;
    }
    return error == EINPROGRESS ? 0 : error;
  }
};

TEST_P(Leak, NothingOfWhatIsRefusedLeavesTheHost) {
  const OtherHost host;
  const CableCounter counter;
  const Handle handle = serve(services());
  EXPECT_EQ(try_to_reach(1, 80), refusal(ECONNREFUSED));
  EXPECT_EQ(try_to_reach(2, 80), refusal(EHOSTUNREACH));
  EXPECT_EQ(try_to_reach(4, 80), refusal(ECONNREFUSED)) << "its backend takes no new connections";
  EXPECT_EQ(try_to_reach(1, 81), refusal(ECONNREFUSED)) << "a port that no service has";
  EXPECT_EQ(try_to_reach(3, 81), refusal(ECONNREFUSED));
  EXPECT_EQ(counter.packets(), 0);
  EXPECT_EQ(try_to_reach(3, 80), 0);
  EXPECT_GE(counter.packets(), 1) << "what passes is seen";
}

std::string name_of(const testing::TestParamInfo<std::tuple<Way, Family>>& param) {
  constexpr const char* ways[] = {"Tcp", "TcpFastOpen", "UdpConnected", "UdpUnconnected"};
  const auto& [way, family] = param.param;
  return std::string(ways[static_cast<int>(way)]) + family.name;
}

INSTANTIATE_TEST_SUITE_P(Refused, Leak,
                         testing::Combine(testing::Values(Way::tcp, Way::tcp_fast_open, Way::udp_connected,
                                                          Way::udp_unconnected),
                                          testing::ValuesIn(families)),
                         name_of);

}  // namespace
