// SPDX-License-Identifier: BSD-2-Clause
#include "tests/bench/proxy/measures.h"

#include <fmt/format.h>
#include <poll.h>
#include <time.h>
#include <unistd.h>

#include <fstream>
#include <functional>
#include <optional>
#include <stdexcept>

#include "tests/bench/proxy/load.h"

namespace bench {
namespace {

constexpr std::chrono::milliseconds warm_up(500);
constexpr std::size_t in_flight = 32;
constexpr std::size_t request_size = 1024;
constexpr std::size_t idle_connections = 9000;
constexpr std::size_t listeners = 9500;

/// CPU seconds of the whole machine so far, what a hypervisor took from it included.
double machine_cpu_seconds() {
  std::ifstream file("/proc/stat");
  std::string word;
  double user = 0;
  double nice = 0;
  double system = 0;
  double idle = 0;
  double iowait = 0;
  double irq = 0;
  double softirq = 0;
  double steal = 0;
  if (!(file >> word >> user >> nice >> system >> idle >> iowait >> irq >> softirq >> steal))
    throw std::runtime_error("/proc/stat cannot be read");
  return (user + nice + system + irq + softirq + steal) / static_cast<double>(::sysconf(_SC_CLK_TCK));
}

double own_cpu_seconds() {
  timespec time{};
  ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) / 1e9;
}

/// How a tally becomes figures: of what is done per second, and of the proxy's CPU seconds for each.
struct Units {
  double rate = 1;
  double cost = 1;
};

Figures under_load(const Peer& peer, const Options& options, Behaviour behaviour, const Units& units,
                   const std::function<Tally(const Endpoint&, const Schedule&)>& client) {
  const Server server(behaviour);
  std::optional<Proxy> proxy;
  if (!peer.is_direct()) proxy.emplace(peer, Task{.vips = peer.vips(1), .threads = options.threads});

  double of_proxy = 0;
  double of_others = 0;
  const auto read = [&](double sign) {
    const double proxy_now = proxy ? proxy->cpu_seconds() : 0;
    of_proxy += sign * proxy_now;
    of_others += sign * (machine_cpu_seconds() - proxy_now - server.cpu_seconds() - own_cpu_seconds());
  };
  const Schedule schedule{
      .warm_up = warm_up, .length = options.seconds, .at_begin = [&] { read(-1); }, .at_end = [&] { read(1); }};
  const Tally tally = client(peer.is_direct() ? backend : Endpoint{peer.vips(1).front(), vip_port}, schedule);

  const auto done = static_cast<double>(tally.done);
  Figures figures{
      .first = done / tally.seconds * units.rate, .bystanders = of_others / tally.seconds, .failures = tally.failures};
  if (proxy && tally.done > 0) figures.second = of_proxy / done * units.cost;
  return figures;
}

template <std::size_t streams>
Figures bulk(const Peer& peer, const Options& options) {
  // from bytes to Gbit and to GB
  return under_load(peer, options, Behaviour::source, {.rate = 8e-9, .cost = 1e9},
                    [](const Endpoint& there, const Schedule& schedule) { return receive(there, streams, schedule); });
}

Figures connections(const Peer& peer, const Options& options) {
  return under_load(peer, options, Behaviour::echo, {.rate = 1, .cost = 1e6},
                    [](const Endpoint& there, const Schedule& schedule) {
                      return connect_again_and_again(there, in_flight, schedule);
                    });
}

Figures requests(const Peer& peer, const Options& options) {
  return under_load(peer, options, Behaviour::echo, {.rate = 1e-3, .cost = 1e6},
                    [](const Endpoint& there, const Schedule& schedule) {
                      return ask_again_and_again(there, in_flight, request_size, schedule);
                    });
}

Figures idle(const Peer& peer, const Options& options) {
  const Server server(Behaviour::echo);
  const Proxy proxy(peer, {.vips = peer.vips(1), .threads = options.threads});
  const Endpoint there{peer.vips(1).front(), vip_port};
  open_idle(there, in_flight);  // what the first connections need is no matter of their number
  const double before = proxy.memory("Rss");
  Idle idle = open_idle(there, idle_connections);
  const double after = proxy.memory("Rss");
  // Whoever closes idle connections need not remember them.
  for (const support::Fd& connection : idle.connections) {
    pollfd ended{connection.get(), POLLIN | POLLRDHUP, 0};
    if (::poll(&ended, 1, 0) != 0) ++idle.failures;
  }
  if (idle.failures > 0)
    fmt::print(stderr, "{}: {} of {} connections stay\n", peer.name, idle.connections.size(), idle_connections);
  return {.first = (after - before) / static_cast<double>(idle.connections.size()), .failures = idle.failures};
}

Figures many_listeners(const Peer& peer, const Options& options) {
  const Server server(Behaviour::echo);
  const Task task{.vips = peer.vips(listeners), .threads = options.threads};
  const Proxy proxy(peer, task);
  Figures figures{.first = proxy.seconds_until_ready(), .second = proxy.memory("Pss") / 1024};
  constexpr std::uint64_t enough = 10;  // a VIP that does not answer takes a second
  for (const std::string& vip : task.vips)
    if (figures.failures < enough && !answers({vip, vip_port})) ++figures.failures;
  return figures;
}

}  // namespace

const std::vector<Measure>& all_measures() {
  static const std::vector<Measure> all = {
      {.name = "bulk1", .title = "bulk, 1 stream", .first = {"Gbit/s", 1}, .second = {"CPU s/GB", 3}, .take = bulk<1>},
      {.name = "bulk8", .title = "bulk, 8 streams", .first = {"Gbit/s", 1}, .second = {"CPU s/GB", 3}, .take = bulk<8>},
      {.name = "short",
       .title = fmt::format("short connections, {} in flight, 1 byte each way", in_flight),
       .first = {"connections/s", 0},
       .second = {"CPU us each", 1},
       .take = connections},
      {.name = "request",
       .title = fmt::format("request and reply of {} bytes on {} connections", request_size, in_flight),
       .first = {"k/s", 1},
       .second = {"CPU us each", 2},
       .take = requests},
      {.name = "idle",
       .title = fmt::format("{} idle connections", idle_connections),
       .first = {"RSS KiB each", 2},
       .second = {},
       .take = idle},
      {.name = "listeners",
       .title = fmt::format("{} VIPs", listeners),
       .first = {"ready after s", 2},
       .second = {"PSS MiB", 1},
       .take = many_listeners},
  };
  return all;
}

}  // namespace bench
