// SPDX-License-Identifier: BSD-2-Clause
//
// fallback_proxy over a long time, in two ways:
//   --gib N           so much in both directions at once over each of 4 connections together, every byte compared
//   --connections N   so many short connections, one in --reset-every of which is reset by one of its sides at some
//                     moment; nothing may go wrong for the others, and neither descriptors nor memory may be lost
// Prints figures; the exit code says whether all was well.
#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <boost/program_options.hpp>
#include <chrono>
#include <exception>
#include <future>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "tests/support/fallback_proxy.h"
#include "tests/support/observe.h"
#include "tests/support/program.h"
#include "tests/support/stream.h"
#include "tests/support/tcp.h"

namespace {

using namespace support;
namespace po = boost::program_options;

constexpr const char* vip = "127.0.1.1";
constexpr std::uint16_t port = 80;

std::string configuration(const TcpListener& backend) {
  return proxy_toml({{"relay", vip, port, {backend.backend()}}});
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// Every byte of `gib` GiB arrives, each way.
void transfer(double gib) {
  constexpr int connections = 4;
  const auto size = static_cast<std::uint64_t>(gib * (1 << 30) / connections);
  const TcpListener backend;
  FallbackProxy proxy(configuration(backend));
  const auto start = std::chrono::steady_clock::now();
  std::vector<Fd> ends;
  std::vector<std::future<void>> work;
  const auto add = [&](auto function) { work.push_back(std::async(std::launch::async, function)); };
  ends.reserve(std::size_t{2} * connections);
  for (std::uint64_t i = 0; i < connections; ++i) {
    const Fd& client = ends.emplace_back(dial(vip, port));
    const Fd& server = ends.emplace_back(backend.accept());
    // One in two changes between large and small messages, so that the relay changes its way.
    const Chunks chunks = i % 2 == 0 ? Chunks::large : Chunks::mixed;
    add([&client, size, chunks, i] { send_stream(client, 2 * i, size, chunks); });
    add([&server, size, chunks, i] { send_stream(server, 2 * i + 1, size, chunks); });
    add([&server, size, i] { receive_stream(server, 2 * i, size); });
    add([&client, size, i] { receive_stream(client, 2 * i + 1, size); });
  }
  for (auto& one : work) one.get();
  const double seconds = seconds_since(start);
  fmt::print(
      "{} GiB each way, every byte compared: {:.1f} s, {:.1f} Gbit/s both ways together, proxy {:.3f} CPU s/GB\n", gib,
      seconds, 2 * gib * (1 << 30) * 8 / seconds / 1e9,
      std::chrono::duration<double>(proxy.cpu_time()).count() / (2 * gib * (1 << 30) / 1e9));
}

/// What a connection is about to do, so that both its sides know: the client sends this as its first bytes.
struct Plan {
  enum Ending : std::uint8_t { orderly, client_resets, backend_resets };

  std::uint32_t request;  // bytes
  std::uint32_t reply;
  Ending ending;
};

void send_message(const Fd& fd, std::uint32_t size) { send_all(fd, std::string(size, 'm')); }

void serve_one(Fd connection) {
  try {
    const std::string first = receive(connection, sizeof(Plan));
    Plan plan{};
    std::copy(first.begin(), first.end(), reinterpret_cast<char*>(&plan));
    if (plan.ending == Plan::backend_resets) {
      receive(connection, plan.request / 2);
      return reset(std::move(connection));
    }
    receive(connection, plan.request);
    send_message(connection, plan.reply);
    send_end(connection);
    end_of(connection);
  } catch (const std::exception&) {
    return;  // a client that has reset; what went wrong for one that has not is seen by that client
  }
}

/// Throws when an orderly connection fails.
void ask_one(const Plan& plan) {
  Fd client = dial(vip, port);
  try {
    send_all(client, {reinterpret_cast<const char*>(&plan), sizeof plan});
    if (plan.ending == Plan::client_resets) {
      send_message(client, plan.request / 2);
      return reset(std::move(client));
    }
    send_message(client, plan.request);
    send_end(client);
    if (receive_all(client).size() != plan.reply) throw std::runtime_error("a reply is not whole");
    // The backend's end has come before: no TIME_WAIT of ours uses up the ports.
    reset(std::move(client));
  } catch (const std::system_error&) {
    if (plan.ending == Plan::orderly) throw;
  }
}

void resets(std::uint64_t connections, std::uint64_t reset_every) {
  constexpr int threads = 4;
  const TcpListener backend;
  FallbackProxy proxy(configuration(backend));
  std::atomic<bool> is_over = false;
  std::mutex accepting;
  std::vector<std::future<void>> servers;
  for (int i = 0; i < threads; ++i) {
    servers.push_back(std::async(std::launch::async, [&] {
      while (!is_over) {
        std::unique_lock turn(accepting);  // what one has seen, another must not take
        if (!is_readable(backend.get(), 100)) continue;
        Fd connection = backend.accept();
        turn.unlock();
        serve_one(std::move(connection));
      }
    }));
  }
  std::atomic<std::uint64_t> broken = 0;
  const auto run = [&](std::uint64_t count) {
    std::vector<std::future<void>> clients;
    for (int thread = 0; thread < threads; ++thread) {
      clients.push_back(std::async(std::launch::async, [&, thread, count] {
        std::mt19937_64 random(static_cast<std::uint64_t>(thread) + count);
        for (std::uint64_t i = 0; i < count / threads; ++i) {
          // Most are small; one in 64 is large enough to be spliced.
          const std::uint32_t most = random() % 64 == 0 ? 1 << 20 : 4096;
          Plan plan{static_cast<std::uint32_t>(random() % most), static_cast<std::uint32_t>(random() % most),
                    Plan::orderly};
          if (random() % reset_every == 0) {
            plan.ending = random() % 2 == 0 ? Plan::client_resets : Plan::backend_resets;
            ++broken;
          }
          ask_one(plan);
        }
      }));
    }
    for (auto& client : clients) client.get();
  };
  const auto wait_until_idle = [&](std::size_t files) {
    if (!eventually([&] { return proxy.open_files() <= files; }, std::chrono::seconds(30)))
      throw std::runtime_error(fmt::format("{} files are open, {} before", proxy.open_files(), files));
  };

  // What it keeps for later, it has afterwards: pipes above all.
  const std::size_t at_first = proxy.open_files();
  constexpr std::size_t kept_pipes = std::size_t{2} * 2 * 16;
  run(std::max<std::uint64_t>(connections / 10, 1000));
  wait_until_idle(at_first + kept_pipes);
  const std::size_t memory = proxy.resident_bytes();
  broken = 0;
  const auto start = std::chrono::steady_clock::now();
  run(connections);
  const double seconds = seconds_since(start);
  wait_until_idle(at_first + kept_pipes);
  const std::size_t memory_after = proxy.resident_bytes();
  is_over = true;
  for (auto& server : servers) server.get();
  fmt::print("{} connections, {} reset: {:.1f} s; files {} -> {} (idle pipes included), RSS {} -> {} KiB\n",
             connections, broken.load(), seconds, at_first, proxy.open_files(), memory / 1024, memory_after / 1024);
  if (memory_after > memory + (2 << 20)) throw std::runtime_error("it grew by more than 2 MiB");
  const Finished finished = proxy.terminate();
  if (finished.exit_code != 0)
    throw std::runtime_error(fmt::format("it ended with {}: {}", finished.exit_code, finished.err));
}

int torture(const po::variables_map& given) {
  if (given.contains("gib")) transfer(given["gib"].as<double>());
  if (given.contains("connections"))
    resets(given["connections"].as<std::uint64_t>(), given["reset-every"].as<std::uint64_t>());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  po::options_description options("torture_relay: the userspace engine over a long time");
  auto add = options.add_options();
  add("gib", po::value<double>(), "GiB to pass each way");
  add("connections", po::value<std::uint64_t>(), "short connections to make");
  add("reset-every", po::value<std::uint64_t>()->default_value(1000), "one in so many is reset");
  return support::run_program("torture_relay", options, argc, argv, torture);
}
