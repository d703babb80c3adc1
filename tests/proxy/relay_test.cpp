// SPDX-License-Identifier: BSD-2-Clause
//
// What two ends of a proxied connection see of each other: all bytes, and how each of them ended.
#include <fmt/format.h>
#include <poll.h>
#include <sys/syscall.h>

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <sstream>

#include "tests/proxy/proxied.h"

namespace {

using namespace support;

constexpr std::size_t mebi = std::size_t{1024} * 1024;

/// Nothing moves any more: whoever sends here waits for room.
bool is_blocked(const std::vector<int>& senders) {
  std::vector<pollfd> files;
  for (const int fd : senders) files.push_back({fd, POLLOUT, 0});
  return ::poll(files.data(), files.size(), 300) == 0;
}

/// So that little fits into them: how large they may become differs from system to system.
void bound_kernel_buffers() { std::ofstream("/proc/sys/net/ipv4/tcp_rmem") << "4096 131072 4194304"; }

class Relay : public Proxied {};

TEST_F(Relay, PassesTheWholeReplyAfterTheClientsHalfClose) {
  const TcpListener backend;
  FallbackProxy proxy(proxy_toml({web({backend.backend()})}));
  const auto [client, server] = connect_through(backend);
  send_all(client, "question");
  send_end(client);
  EXPECT_EQ(receive_all(server), "question");

  auto replying = meanwhile([&server] {
    send_stream(server, 1, 8 * mebi);
    send_end(server);
  });
  receive_stream(client, 1, 8 * mebi);
  EXPECT_EQ(end_of(client), 0);
  replying.get();
}

TEST_F(Relay, PassesTheWholeRequestAfterTheBackendsHalfClose) {
  const TcpListener backend;
  FallbackProxy proxy(proxy_toml({web({backend.backend()})}));
  const auto [client, server] = connect_through(backend);
  send_all(server, "welcome");
  send_end(server);
  EXPECT_EQ(receive_all(client), "welcome");

  auto asking = meanwhile([&client] {
    send_stream(client, 2, 8 * mebi);
    send_end(client);
  });
  receive_stream(server, 2, 8 * mebi);
  EXPECT_EQ(end_of(server), 0);
  asking.get();
}

TEST_F(Relay, PassesOnWhatFollowsUrgentData) {
  const TcpListener backend;
  FallbackProxy proxy(proxy_toml({web({backend.backend()})}));
  const auto [client, server] = connect_through(backend);
  auto asking = std::async(std::launch::async, [&client] {
    send_stream(client, 1, 8 * mebi);
    checked(::send(client.get(), "!", 1, MSG_OOB), "send");
    send_all(client, "what follows");
    send_end(client);
  });
  receive_stream(server, 1, 8 * mebi);
  EXPECT_EQ(receive_all(server), "what follows");
  asking.get();
}

TEST_F(Relay, LetsTheBackendSpeakFirst) {
  const TcpListener backend;
  FallbackProxy proxy(proxy_toml({web({backend.backend()})}));
  const auto [client, server] = connect_through(backend);
  send_all(server, "220 ready");
  EXPECT_EQ(receive(client, 9), "220 ready");
  send_all(client, "EHLO");
  EXPECT_EQ(receive(server, 4), "EHLO");
}

TEST_F(Relay, TellsTheBackendThatTheClientHasReset) {
  const TcpListener backend;
  FallbackProxy proxy(proxy_toml({web({backend.backend()})}));
  auto [client, server] = connect_through(backend);
  reset(std::move(client));
  EXPECT_EQ(end_of(server), ECONNRESET);
}

TEST_F(Relay, TellsTheClientThatTheBackendHasReset) {
  const TcpListener backend;
  FallbackProxy proxy(proxy_toml({web({backend.backend()})}));
  auto [client, server] = connect_through(backend);
  reset(std::move(server));
  EXPECT_EQ(end_of(client), ECONNRESET);
}

TEST_F(Relay, TellsTheBackendThatAHalfClosedClientHasReset) {
  const TcpListener backend;
  FallbackProxy proxy(proxy_toml({web({backend.backend()})}));
  auto [client, server] = connect_through(backend);
  send_all(client, "question");
  send_end(client);
  EXPECT_EQ(receive_all(server), "question");
  // Nobody reads from this client any more, and there is nothing to write to it yet.
  reset(std::move(client));
  pollfd hung_up{server.get(), 0, 0};
  EXPECT_EQ(::poll(&hung_up, 1, 10'000), 1);
}

TEST_F(Relay, TellsTheClientThatAHalfClosedBackendHasReset) {
  const TcpListener backend;
  FallbackProxy proxy(proxy_toml({web({backend.backend()})}));
  auto [client, server] = connect_through(backend);
  send_all(server, "welcome");
  send_end(server);
  EXPECT_EQ(receive_all(client), "welcome");
  reset(std::move(server));
  pollfd hung_up{client.get(), 0, 0};
  EXPECT_EQ(::poll(&hung_up, 1, 10'000), 1);
}

TEST_F(Relay, TellsAWritingClientThatTheBackendHasReset) {
  const TcpListener backend;
  FallbackProxy proxy(proxy_toml({web({backend.backend()})}));
  auto [client, server] = connect_through(backend);
  auto writing = meanwhile([&client] { send_stream(client, 1, 1024 * mebi); });
  receive_stream(server, 1, mebi);
  reset(std::move(server));
  EXPECT_THROW(writing.get(), std::system_error);
}

TEST_F(Relay, PassesOnAllThatCameBeforeABackendsReset) {
  const TcpListener backend;
  FallbackProxy proxy(proxy_toml({web({backend.backend()})}));
  auto [client, server] = connect_through(backend);
  auto receiving = meanwhile([&client] { receive_stream(client, 1, 8 * mebi); });
  send_stream(server, 1, 8 * mebi);
  // A reset throws away what is still on its way to the proxy.
  ASSERT_TRUE(eventually([&server] { return is_delivered(server); }));
  reset(std::move(server));
  receiving.get();
  EXPECT_EQ(end_of(client), ECONNRESET);
}

TEST_F(Relay, PassesOnAllThatCameBeforeAResetToAClientThatReadsLate) {
  const TcpListener backend;
  FallbackProxy proxy(proxy_toml({web({backend.backend()})}));
  auto [client, server] = connect_through(backend);
  send_stream(server, 1, std::uint64_t{64} * 1024);
  ASSERT_TRUE(eventually([&server] { return is_delivered(server); }));
  reset(std::move(server));
  // The client's kernel knows of the reset before the client reads.
  pollfd hung_up{client.get(), 0, 0};
  ASSERT_EQ(::poll(&hung_up, 1, 10'000), 1);
  receive_stream(client, 1, std::uint64_t{64} * 1024);
  EXPECT_EQ(end_of(client), ECONNRESET);
}

TEST_F(Relay, DoesNotResetAConnectionThatHasEndedInOrder) {
  const TcpListener backend;
  FallbackProxy proxy(proxy_toml({web({backend.backend()})}));
  for (int i = 0; i < 100; ++i) {
    auto [client, server] = connect_through(backend);
    send_all(server, "all");
    server.reset();  // as servers do: everything said, so close
    EXPECT_EQ(receive_all(client), "all");
  }
}

TEST_F(Relay, DoesNotSpinWhileOneSideIsSilent) {
  bound_kernel_buffers();
  const TcpListener backend;
  FallbackProxy proxy(proxy_toml({web({backend.backend()})}));
  const Connected half_closed = connect_through(backend);
  send_end(half_closed.client);
  EXPECT_EQ(receive_all(half_closed.backend), "");
  const Connected other_half_closed = connect_through(backend);
  send_end(other_half_closed.backend);
  EXPECT_EQ(receive_all(other_half_closed.client), "");
  const Connected blocked = connect_through(backend);
  auto sending = meanwhile([&] { send_stream(blocked.backend, 1, 32 * mebi); });
  EXPECT_TRUE(eventually([&] { return is_blocked({blocked.backend.get()}); }, std::chrono::seconds(30)));
  EXPECT_LT(load(proxy, std::chrono::milliseconds(500)), no_spin);
  receive_stream(blocked.client, 1, 32 * mebi);
  sending.get();
}

TEST_F(Relay, AsksOnBothSidesWhetherASilentPeerIsStillThere) {
  const TcpListener backend;
  FallbackProxy proxy(proxy_toml({web({backend.backend()})}));
  const Connected connection = connect_through(backend);
  // proc_net_tcp: local address, remote address, state 01 (established), queues, and the timer, 02 for keepalive.
  const auto count_kept_alive = [&] {
    const auto place = [](std::uint32_t address, std::uint16_t port) {
      return fmt::format("{:08X}:{:04X}", address, port);
    };
    std::istringstream sockets(read_text("/proc/net/tcp"));
    int count = 0;
    for (std::string line; std::getline(sockets, line);) {
      const bool is_client_leg = line.find(": " + place(0x0101007f, vip_port) + " ") != std::string::npos;
      const bool is_backend_leg = line.find(" " + place(0x0100007f, backend.port()) + " 01 ") != std::string::npos;
      count += (is_client_leg || is_backend_leg) && line.find(" 01 00000000:00000000 02:") != std::string::npos;
    }
    return count;
  };
  EXPECT_TRUE(eventually([&] { return count_kept_alive() == 2; }));
}

TEST_F(Relay, HoldsLittleForAClientThatDoesNotRead) {
  bound_kernel_buffers();
  const TcpListener backend;
  FallbackProxy proxy(proxy_toml({web({backend.backend()})}));
  constexpr std::size_t count = 8;
  constexpr std::uint64_t size = 32 * mebi;
  std::vector<Connected> connections;
  for (std::size_t i = 0; i < count; ++i) connections.push_back(connect_through(backend));
  const std::size_t before = proxy.resident_bytes();
  std::vector<std::future<void>> sending;
  for (const auto& connection : connections)
    sending.push_back(meanwhile([&server = connection.backend] { send_stream(server, 3, size); }));

  std::vector<int> servers;
  for (const auto& connection : connections) servers.push_back(connection.backend.get());
  EXPECT_TRUE(eventually([&] { return is_blocked(servers); }, std::chrono::seconds(30)));
  // Of 256 MiB that are to come.
  EXPECT_LT(proxy.resident_bytes(), before + 16 * mebi);

  std::vector<std::future<void>> receiving;
  for (const auto& connection : connections)
    receiving.push_back(meanwhile([&client = connection.client] { receive_stream(client, 3, size); }));
  for (auto& receiver : receiving) receiver.get();
  for (auto& sender : sending) sender.get();
}

/// So many bytes each way at once, in pieces of all sizes.
void exchange(const Connected& connection, std::uint64_t size) {
  auto up = meanwhile([&] { send_stream(connection.client, 1, size, Chunks::mixed); });
  auto down = meanwhile([&] { send_stream(connection.backend, 2, size, Chunks::mixed); });
  auto received = meanwhile([&] { receive_stream(connection.backend, 1, size); });
  receive_stream(connection.client, 2, size);
  received.get();
  up.get();
  down.get();
}

TEST_F(Relay, CopiesWhereSocketsCannotBeSpliced) {
  const TcpListener backend;
  FallbackProxy proxy(proxy_toml({web({backend.backend()})}), [] { forbid({{SYS_splice, {}, EINVAL}}); });
  exchange(connect_through(backend), 32 * mebi);
}

TEST_F(Relay, CopiesWhenThereAreNoPipes) {
  const TcpListener backend;
  FallbackProxy proxy(proxy_toml({web({backend.backend()})}));
  const Connected connection = connect_through(backend);
  proxy.leave_descriptors(0);
  exchange(connection, 16 * mebi);
}

TEST_F(Relay, GivesItsPipesBack) {
  const TcpListener backend;
  FallbackProxy proxy(proxy_toml({web({backend.backend()})}));
  const std::size_t before = proxy.open_files();
  std::size_t most = 0;
  for (int i = 0; i < 40; ++i) {
    auto [client, server] = connect_through(backend);
    auto sending = meanwhile([&server] { send_stream(server, 1, 4 * mebi); });
    receive_stream(client, 1, 4 * mebi);
    most = std::max(most, proxy.open_files());
    sending.get();
    // Some end in the middle of a transfer, with bytes in the pipe.
    if (i % 2 == 0) {
      auto cut = meanwhile([&server] { EXPECT_THROW(send_stream(server, 1, 1024 * mebi), std::system_error); });
      receive_stream(client, 1, mebi);
      reset(std::move(client));
      cut.get();
    }
  }
  EXPECT_GT(most, before + 2) << "nothing was spliced";
  // What is kept for the next ones: a few pipes of each thread.
  EXPECT_TRUE(eventually([&] { return proxy.open_files() <= before + std::size_t{2} * 2 * 16; }));
}

}  // namespace
