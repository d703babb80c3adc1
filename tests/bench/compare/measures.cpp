// SPDX-License-Identifier: BSD-2-Clause
#include "tests/bench/compare/measures.h"

#include <fmt/format.h>
#include <poll.h>
#include <sched.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <memory>
#include <random>
#include <stdexcept>
#include <utility>

#include "tests/bench/compare/load.h"

namespace bench {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t in_flight = 32;
constexpr std::size_t idle_connections = 9000;
constexpr std::uint32_t listeners = 10000;

double microseconds_since(Clock::time_point begin) {
  return std::chrono::duration<double, std::micro>(Clock::now() - begin).count();
}

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

/// Of this process and of all that it has started and awaited.
double cpu_microseconds_with_children() {
  const auto of = [](int who) {
    rusage usage{};
    ::getrusage(who, &usage);
    const auto microseconds = [](const timeval& time) {
      return static_cast<double>(time.tv_sec) * 1e6 + static_cast<double>(time.tv_usec);
    };
    return microseconds(usage.ru_utime) + microseconds(usage.ru_stime);
  };
  return of(RUSAGE_SELF) + of(RUSAGE_CHILDREN);
}

double quantile(std::vector<double>& values, double share) {
  if (values.empty()) return not_measured;
  const auto at = values.begin() + static_cast<std::ptrdiff_t>(share * static_cast<double>(values.size() - 1));
  std::ranges::nth_element(values, at);
  return *at;
}

/// For clients of one thread: CPUs may differ for seconds, as a hypervisor likes. Only for the calling thread, so that
/// proxies that were started before run where they like.
void stay_on_one_cpu() {
  cpu_set_t all;
  cpu_set_t one;
  CPU_ZERO(&one);
  support::checked(::sched_getaffinity(0, sizeof all, &all), "sched_getaffinity");
  int last = CPU_SETSIZE - 1;
  while (CPU_ISSET(last, &all) == 0) --last;
  CPU_SET(last, &one);
  support::checked(::sched_setaffinity(0, sizeof one, &one), "sched_setaffinity");
}

/// A peer at work on a stage, and who is behind it: either a server, or a listener that the client itself serves.
struct Scene {
  std::unique_ptr<Server> server;
  std::unique_ptr<support::Fd> listener;
  std::unique_ptr<MemoryAccount> memory;  // of all but the server, where it was asked for
  std::unique_ptr<Running> running;       // null: the clients connect to the backends
};

std::shared_ptr<Scene> make_scene(const Peer& peer, const Place& place, Task task, const Behaviour* behaviour,
                                  bool with_account = false) {
  auto scene = std::make_shared<Scene>();
  place.at_the_backends([&] {
    if (behaviour != nullptr)
      scene->server = std::make_unique<Server>(*behaviour, backend_endpoint(0));
    else
      scene->listener = std::make_unique<support::Fd>(listen_at(backend_port));
  });
  place.cgroup().enter();
  if (with_account) scene->memory = std::make_unique<MemoryAccount>(place.cgroup());
  task.answered = [&scene](const sockaddr_in& there) {
    return scene->listener ? connect_in_turn(*scene->listener, 1, [&] { return there; }).failures == 0 : answers(there);
  };
  if (behaviour != nullptr && *behaviour == Behaviour::datagrams)
    task.answered = [](const sockaddr_in& there) { return exchange_datagrams(there, 1, 1).failures == 0; };
  if (!peer.is_direct()) scene->running = peer.start(place, task);
  return scene;
}

// --- connections, one after the other -------------------------------------------------------------------------------

enum class Towards { services, bystanders };

/// To services at random, or past them.
Stage::Turn connections(const Peer& peer, const Options& options, const Place& place, const Task& task,
                        Towards towards) {
  const auto scene = make_scene(peer, place, task, nullptr);
  stay_on_one_cpu();
  const std::size_t calls = options.quick ? 100 : 250;
  const bool to_backends = peer.is_direct() || towards == Towards::bystanders;
  const std::uint32_t all_backends = task.services * task.backends;
  auto random = std::make_shared<std::mt19937>(1);  // the same services for everybody
  // What a process touches for the first time may take microseconds of page faults, most of all in a virtual machine:
  // that is the cost of beginning, not of many services.
  std::uint32_t service = 0;
  connect_in_turn(*scene->listener, task.services, [&] {
    const std::uint32_t one = service++;
    return to_backends ? backend_endpoint(one * task.backends) : vip_endpoint(one);
  });
  return [=] {
    const auto next = [&] {
      const auto number = static_cast<std::uint32_t>((*random)() % all_backends);
      return to_backends ? backend_endpoint(number) : vip_endpoint(number / task.backends);
    };
    connect_in_turn(*scene->listener, 20, next);  // what others' turns have driven out of the caches
    Latencies latencies = connect_in_turn(*scene->listener, calls, next);
    Figures figures;
    figures.values = {quantile(latencies.connect, 0), quantile(latencies.connect, 0.5),
                      quantile(latencies.connect, 0.99), quantile(latencies.answered, 0.5)};
    figures.failures = latencies.failures;
    return figures;
  };
}

// --- loads ----------------------------------------------------------------------------------------------------------

/// How a tally becomes figures: of what is done per second, and of CPU seconds for each.
struct Units {
  double rate = 1;
  double cost = 1;
};

using Client = std::function<Tally(const sockaddr_in&, const Schedule&)>;

Stage::Turn under_load(const Peer& peer, const Options& options, const Place& place, Behaviour behaviour,
                       const Units& units, const Client& client) {
  const auto scene = make_scene(peer, place, {.threads = options.threads}, &behaviour);
  const bool direct = peer.is_direct();
  return [=] {
    double of_proxy = 0;
    double of_all = 0;
    double of_others = 0;
    const auto read = [&](double sign) {
      const double proxy = scene->running ? scene->running->cpu_seconds() : not_measured;
      const double all = scene->server->cpu_seconds() + own_cpu_seconds() + (proxy > 0 ? proxy : 0);
      of_proxy += sign * proxy;
      of_all += sign * all;
      of_others += sign * (machine_cpu_seconds() - all);
    };
    const Schedule schedule{.warm_up = options.seconds / 4,
                            .length = options.seconds,
                            .at_begin = [&] { read(-1); },
                            .at_end = [&] { read(1); }};
    const Tally tally = client(direct ? backend_endpoint(0) : vip_endpoint(0), schedule);
    const auto done = static_cast<double>(tally.done);
    Figures figures;
    figures.values[0] = done / tally.seconds * units.rate;
    figures.values[1] = of_all / done * units.cost;
    figures.values[2] = of_proxy / done * units.cost;
    figures.others = of_others / tally.seconds;
    figures.failures = tally.failures;
    return figures;
  };
}

Measure bulk(std::size_t streams) {
  return {.name = fmt::format("bulk{}", streams),
          .title = fmt::format("bulk, {} stream{}", streams, streams > 1 ? "s" : ""),
          .columns = {{"Gbit/s", 1}, {"CPU s/GB, of all", 3}, {"CPU s/GB, of the proxy", 3}},
          .turns = Turns::some,
          .set_up = [streams](const Peer& peer, const Options& options, const Place& place) {
            // from bytes to Gbit and to GB
            return under_load(peer, options, place, Behaviour::source, {.rate = 8e-9, .cost = 1e9},
                              [streams](const sockaddr_in& there, const Schedule& schedule) {
                                return receive(there, streams, schedule);
                              });
          }};
}

Measure requests(std::size_t size) {
  return {
      .name = fmt::format("request{}", size),
      .title = fmt::format("request and reply of {} byte{} on {} connections", size, size > 1 ? "s" : "", in_flight),
      .columns = {{"k/s", 1}, {"CPU us, of all", 2}, {"CPU us, of the proxy", 2}},
      .turns = Turns::some,
      .set_up = [size](const Peer& peer, const Options& options, const Place& place) {
        return under_load(peer, options, place, Behaviour::echo, {.rate = 1e-3, .cost = 1e6},
                          [size](const sockaddr_in& there, const Schedule& schedule) {
                            return ask_again_and_again(there, in_flight, size, schedule);
                          });
      }};
}

Measure short_connections() {
  return {.name = "rate",
          .title = fmt::format("connections, {} in flight, 1 byte each way", in_flight),
          .columns = {{"connections/s", 0}, {"CPU us, of all", 1}, {"CPU us, of the proxy", 1}},
          .turns = Turns::some,
          .set_up = [](const Peer& peer, const Options& options, const Place& place) {
            return under_load(peer, options, place, Behaviour::echo, {.rate = 1, .cost = 1e6},
                              [](const sockaddr_in& there, const Schedule& schedule) {
                                return connect_again_and_again(there, in_flight, schedule);
                              });
          }};
}

// --- datagrams ------------------------------------------------------------------------------------------------------

Stage::Turn datagrams(const Peer& peer, const Options& options, const Place& place, Towards towards) {
  const Behaviour behaviour = Behaviour::datagrams;
  const auto scene = make_scene(peer, place, {.udp = true, .threads = options.threads}, &behaviour);
  stay_on_one_cpu();
  const bool to_backend = peer.is_direct() || towards == Towards::bystanders;
  return [scene, to_backend] {
    constexpr std::size_t batch = 16;  // fits into any receive buffer
    Datagrams seen = exchange_datagrams(to_backend ? backend_endpoint(0) : vip_endpoint(0), 40, batch);
    Figures figures;
    figures.values = {quantile(seen.send, 0), quantile(seen.send, 0.5), quantile(seen.receive, 0),
                      quantile(seen.receive, 0.5)};
    figures.failures = seen.failures;
    return figures;
  };
}

// --- memory and start -----------------------------------------------------------------------------------------------

/// Connections that the kernel tracks in this network namespace.
double tracked_connections() {
  std::ifstream file("/proc/sys/net/netfilter/nf_conntrack_count");
  double count = 0;
  file >> count;
  return count;
}

Stage::Turn idle(const Peer& peer, const Options& options, const Place& place) {
  const Behaviour behaviour = Behaviour::echo;
  const auto scene = make_scene(peer, place, {.threads = options.threads}, &behaviour, true);
  const sockaddr_in there = peer.is_direct() ? backend_endpoint(0) : vip_endpoint(0);
  return [=] {
    open_idle(there, in_flight);  // what the first connections need is no matter of their number
    const auto memory = [&] { return scene->running ? scene->running->memory("Rss") : not_measured; };
    const double before = memory();
    const double charged_before = scene->memory->kib();
    const double tracked_before = tracked_connections();
    Idle idle = open_idle(there, idle_connections);
    const double after = memory();
    const double charged = scene->memory->kib() - charged_before;
    const double tracked = tracked_connections() - tracked_before;
    // Whoever closes idle connections need not remember them.
    for (const support::Fd& connection : idle.connections) {
      pollfd ended{connection.get(), POLLIN | POLLRDHUP, 0};
      if (::poll(&ended, 1, 0) != 0) ++idle.failures;
    }
    const auto count = static_cast<double>(idle.connections.size());
    Figures figures;
    figures.values[0] = (after - before) / count;
    figures.values[1] = tracked / count;
    figures.values[2] = charged / count;
    figures.failures = idle.failures;
    return figures;
  };
}

Stage::Turn many_listeners(const Peer& peer, const Options& options, const Place& place) {
  const Behaviour behaviour = Behaviour::echo;
  const Task task{.services = listeners, .threads = options.threads};
  const auto scene = make_scene(peer, place, task, &behaviour);
  return [=] {
    Figures figures;
    figures.values[0] = scene->running->seconds_until_ready();
    figures.values[1] = scene->running->memory("Pss") / 1024;
    constexpr std::uint64_t enough = 10;  // a VIP that does not answer takes a second
    for (std::uint32_t i = 0; i < listeners && figures.failures < enough; ++i)
      if (!answers(vip_endpoint(i))) ++figures.failures;
    return figures;
  };
}

Stage::Turn start_up(const Peer& peer, const Place& place, const Task& task) {
  return [&peer, &place, task] {
    const Job job = peer.start_up(place, task);
    Figures figures;
    figures.values = {job.seconds, job.peak_mib, job.cpu_seconds, job.maps_mib};
    return figures;
  };
}

// --- changes --------------------------------------------------------------------------------------------------------

/// One backend of one service is exchanged, and a connection is made at once, and again until the new one accepts it.
Stage::Turn updates(const Peer& peer, const Options& options, const Place& place, const Task& task) {
  const auto scene = make_scene(peer, place, task, nullptr);
  auto random = std::make_shared<std::mt19937>(1);
  auto fresh = std::make_shared<std::uint32_t>(task.services);  // numbers that no service has had
  const std::size_t few = 5;
  const std::size_t changes = options.quick ? few : 20;
  return [=] {
    std::vector<double> call;
    std::vector<double> used;
    std::vector<double> cpu;
    Figures figures;
    const auto first = Clock::now();
    // Where each takes a good part of a second, a few say it as well.
    for (std::size_t i = 0; i < changes && (i < few || microseconds_since(first) < 2e6); ++i) {
      const auto service = static_cast<std::uint32_t>((*random)() % task.services);
      const std::uint32_t number = (*fresh)++;
      const double cpu_before = cpu_microseconds_with_children();
      const auto begin = Clock::now();
      scene->running->replace_backend(service, number);
      call.push_back(microseconds_since(begin));
      cpu.push_back(cpu_microseconds_with_children() - cpu_before);
      constexpr std::uint64_t enough = 100;
      while (accepted_at(*scene->listener, vip_endpoint(service)) != backend(number))
        if (++figures.failures >= enough) throw std::runtime_error("the new backend is not used");
      used.push_back(microseconds_since(begin));
    }
    figures.values = {quantile(call, 0.5), quantile(used, 0.5), quantile(used, 1), quantile(cpu, 0.5)};
    return figures;
  };
}

/// All services are loaded again while they are served, with one backend of one of them exchanged.
Stage::Turn reloads(const Peer& peer, const Place& place, const Task& task) {
  const auto scene = make_scene(peer, place, task, nullptr);
  return [=] {
    const std::uint32_t service = task.services / 2;
    const std::uint32_t number = task.services * task.backends;  // that no service has had
    const Job job = scene->running->reload(service, number);
    // The new one is one of `backends` at random.
    bool seen = false;
    for (std::uint32_t i = 0; i < task.backends * 100 && !seen; ++i)
      seen = accepted_at(*scene->listener, vip_endpoint(service)) == backend(number);
    if (!seen) throw std::runtime_error("the new backend is not used");
    Figures figures;
    figures.values = {job.seconds, job.cpu_seconds, not_measured, not_measured};
    return figures;
  };
}

// --- all of them ----------------------------------------------------------------------------------------------------

std::vector<Column> latency_columns() {
  return {{"connect() min, us", 2, true}, {"connect() p50, us", 2}, {"connect() p99, us", 1}, {"answered p50, us", 1}};
}

Measure connecting(const std::string& name, const std::string& title, const Task& task,
                   Towards towards = Towards::services) {
  return {.name = name,
          .title = title,
          .columns = latency_columns(),
          .turns = Turns::many,
          .possible =
              [task, towards](const Peer& peer) {
                return task.services <= peer.most_services && task.services * task.backends <= peer.most_backends &&
                       (towards == Towards::services || !peer.proxy);
              },
          .set_up =
              [task, towards](const Peer& peer, const Options& options, const Place& place) {
                Task with_threads = task;
                with_threads.threads = options.threads;
                return connections(peer, options, place, with_threads, towards);
              }};
}

std::string thousands(std::uint32_t number) {
  return number < 1000 ? std::to_string(number) : fmt::format("{},{:03}", number / 1000, number % 1000);
}

std::vector<Measure> make_measures() {
  std::vector<Measure> all;
  all.push_back(connecting("connect", "a connection to a service, of 1 with 1 backend", {}));
  all.push_back(connecting("miss", "a connection to an address that is no VIP, beside 1,000 services",
                           {.services = 1000}, Towards::bystanders));
  all.push_back(short_connections());
  all.push_back(requests(1));
  all.push_back(requests(1024));
  all.push_back(bulk(1));
  all.push_back(bulk(8));
  for (const std::uint32_t services : {1U, 1000U, 10000U, 50000U}) {
    all.push_back(connecting(fmt::format("services-{}", services),
                             fmt::format("a connection to one of {} services at random", thousands(services)),
                             {.services = services}));
    all.back().for_quick = false;  // iptables-restore alone takes seconds each time
  }
  for (const std::uint32_t backends : {1U, 10U, 100U, 1000U}) {
    all.push_back(connecting(fmt::format("backends-{}", backends),
                             fmt::format("a connection to a service of {} backends", thousands(backends)),
                             {.backends = backends}));
    all.back().for_quick = backends == 100;
  }
  for (const auto& [name, title, towards] :
       {std::tuple{"udp", "datagrams to a service and its answers", Towards::services},
        std::tuple{"udpmiss", "datagrams to an address that is no VIP, beside a UDP service", Towards::bystanders}}) {
    all.push_back(
        {.name = name,
         .title = title,
         .columns = {{"sendto() min, ns", 0, true},
                     {"sendto() p50, ns", 0},
                     {"recvfrom() min, ns", 0, true},
                     {"recvfrom() p50, ns", 0}},
         .turns = Turns::many,
         .possible = [towards](const Peer& peer) { return peer.udp && (towards == Towards::services || !peer.proxy); },
         .set_up = [towards](const Peer& peer, const Options& options,
                             const Place& place) { return datagrams(peer, options, place, towards); }});
  }
  all.push_back({.name = "idle",
                 .title = fmt::format("{} idle connections, what each leaves", idle_connections),
                 .columns = {{"RSS of the proxy, KiB", 2}, {"entries of conntrack", 2}, {"charged, KiB", 2}},
                 .turns = Turns::one,
                 .for_quick = false,
                 .set_up = idle});
  all.push_back({.name = "listeners",
                 .title = fmt::format("{} VIPs", thousands(listeners)),
                 .columns = {{"ready after, s", 2}, {"PSS, MiB", 1}},
                 .turns = Turns::one,
                 .for_quick = false,
                 .possible = [](const Peer& peer) { return peer.proxy; },
                 .set_up = many_listeners});
  for (const std::uint32_t services : {10U, 10000U, 50000U}) {
    all.push_back(
        {.name = fmt::format("update-{}", services),
         .title = fmt::format("one of {} services gets another backend", thousands(services)),
         .columns = {{"call p50, us", 0}, {"in use p50, us", 0}, {"in use max, us", 0}, {"CPU us", 0}},
         .turns = Turns::one,
         .for_quick = services == 10,
         .possible = [services](const Peer& peer) { return peer.replaces && services <= peer.most_services; },
         .set_up = [services](const Peer& peer, const Options& options,
                              const Place& place) { return updates(peer, options, place, {.services = services}); }});
  }
  const Task reloaded{.services = 50000, .backends = 10};
  all.push_back({.name = fmt::format("reload-{}", reloaded.services),
                 .title = fmt::format("all of {} services of 10 backends again, one backend changed",
                                      thousands(reloaded.services)),
                 .columns = {{"s", 2}, {"CPU s", 2}},
                 .turns = Turns::one,
                 .for_quick = false,
                 .possible = [](const Peer& peer) { return peer.reloads; },
                 .set_up = [reloaded](const Peer& peer, const Options&,
                                      const Place& place) { return reloads(peer, place, reloaded); }});
  for (const std::uint32_t services : {1000U, 50000U}) {
    const Task task{.services = services, .backends = 10};
    all.push_back(
        {.name = fmt::format("start-{}", services),
         .title = fmt::format("start with {} services of 10 backends", thousands(services)),
         .columns = {{"s", 2}, {"peak RSS, MiB", 0}, {"CPU s", 2}, {"maps, MiB", 1}},
         .turns = Turns::one,
         .for_quick = false,
         .possible =
             [task](const Peer& peer) { return peer.start_up && task.services * task.backends <= peer.most_backends; },
         .set_up = [task](const Peer& peer, const Options&,
                          const Place& place) { return start_up(peer, place, task); }});
  }
  return all;
}

}  // namespace

bool Measure::has(const Peer& peer) const {
  return possible(peer) && (peer.measures.empty() || std::ranges::find(peer.measures, name) != peer.measures.end());
}

const std::vector<Measure>& all_measures() {
  static const std::vector<Measure> all = make_measures();
  return all;
}

}  // namespace bench
