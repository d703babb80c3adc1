// SPDX-License-Identifier: BSD-2-Clause
//
// Tortures the publication protocol: threads connect without pause while another republishes, adds and removes
// services. Each service has backends of its own, so that a connect tells whether it was sent where it belongs. UDP
// connects are used, which cost a microsecond and send nothing.
//
// The same program is built with wider windows and with planted faults; with --expect-errors it succeeds when the fault
// shows, which is how the suite knows that it would see a wrong protocol.
#include <arpa/inet.h>
#include <bpf/bpf.h>
#include <fmt/format.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <boost/program_options.hpp>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "config/config.h"
#include "plugin/bpf_engine.h"
#include "tests/support/cgroup.h"
#include "tests/support/environment.h"
#include "tests/support/program.h"

namespace {

namespace po = boost::program_options;
using Clock = std::chrono::steady_clock;

constexpr std::uint32_t stable_services = 64;
constexpr std::uint32_t churned_services = 64;  // come and go
constexpr std::uint32_t services = stable_services + churned_services;
constexpr std::uint32_t backends_per_service = 6;
constexpr std::uint16_t first_port = 5000;
constexpr int publications_per_churn = 200;
constexpr std::uint64_t min_connects = 10000;  // fewer would prove little

/// Two services share a VIP, so that markers are counted as well.
std::uint32_t vip_of(std::uint32_t service) { return 0x0a600000u + service / 2; }  // 10.96.0.0
std::uint16_t port_of(std::uint32_t service) { return static_cast<std::uint16_t>(first_port + service); }
std::uint32_t backend_address(std::uint32_t service, std::uint32_t backend) {
  return 0x7f000000u + ((service + 1) << 8) + backend + 1;  // 127.0.<service + 1>.<backend + 1>
}

struct Tally {
  std::atomic<std::uint64_t> connects{0};
  std::atomic<std::uint64_t> wrong{0};    // reached another service's backend, or left untouched
  std::atomic<std::uint64_t> refused{0};  // of services that are always there
  std::atomic<std::uint64_t> failed{0};   // any other errno
};

/// One connect to `service`, judged.
void connect_once(int fd, std::uint32_t service, Tally& tally) {
  const bool stable = service < stable_services;
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port_of(service));
  address.sin_addr.s_addr = htonl(vip_of(service));
  tally.connects.fetch_add(1, std::memory_order_relaxed);
  if (connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
    // Without a VIP of ours there is no route: ENETUNREACH means that the connect was left untouched.
    if (errno == ECONNREFUSED || errno == ENETUNREACH) {
      if (stable) {
        tally.refused.fetch_add(1, std::memory_order_relaxed);
      }
    } else {
      tally.failed.fetch_add(1, std::memory_order_relaxed);
    }
    return;
  }
  sockaddr_in peer{};
  socklen_t length = sizeof peer;
  if (getpeername(fd, reinterpret_cast<sockaddr*>(&peer), &length) != 0) {
    tally.failed.fetch_add(1, std::memory_order_relaxed);
    return;
  }
  const std::uint32_t reached = ntohl(peer.sin_addr.s_addr);
  const std::uint32_t first = backend_address(service, 0);
  if ((stable || reached != vip_of(service)) &&
      (reached < first || reached >= first + backends_per_service || ntohs(peer.sin_port) != port_of(service))) {
    tally.wrong.fetch_add(1, std::memory_order_relaxed);
  }
}

void connect_until(const std::atomic<bool>& stop, std::uint64_t seed, Tally& tally) {
  const int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  std::minstd_rand random(static_cast<std::uint32_t>(seed));
  while (!stop.load(std::memory_order_relaxed)) {
    connect_once(fd, static_cast<std::uint32_t>(random() % services), tally);
  }
  close(fd);
}

std::vector<config::Backend> some_backends(std::uint32_t service, std::minstd_rand& random) {
  std::vector<config::Backend> backends;
  const std::uint32_t present = static_cast<std::uint32_t>(random() % ((1u << backends_per_service) - 1)) + 1;
  for (std::uint32_t i = 0; i < backends_per_service; ++i) {
    if (present & (1u << i)) {
      backends.push_back({.address = boost::asio::ip::make_address_v4(backend_address(service, i)),
                          .port = port_of(service),
                          .weight = static_cast<std::uint32_t>(random() % 9) + 1,
                          .state = config::BackendState::active,
                          .position = {}});
    }
  }
  return backends;
}

std::string name_of(std::uint32_t service) { return "svc" + std::to_string(service); }

/// All stable services, and about half of the others.
config::Config some_services(std::minstd_rand& random) {
  config::Config config;
  config.engine.peer_names = false;  // getpeername() tells which backend it was
  for (std::uint32_t i = 0; i < services; ++i) {
    if (i >= stable_services && random() % 2 == 0) {
      continue;
    }
    config::Service service;
    service.name = name_of(i);
    service.vip = boost::asio::ip::make_address_v4(vip_of(i));
    service.port = port_of(i);
    service.protocol = config::Protocol::udp;
    service.on_remove = config::OnRemove::keep;  // ending sockets takes longer than publishing
    service.backends = some_backends(i, random);
    config.services.push_back(std::move(service));
  }
  return config;
}

void check(const plugin::Result<void>& result, const char* what) {
  if (!result) {
    fmt::print(stderr, "torture: {}: {}\n", what, result.error().message);
    std::exit(1);
  }
}

/// Fills Service_Map up, but for the room that services which come and go need: long chains, in which elements are
/// reused.
std::uint32_t fill_service_map(const std::string& pin) {
  const int fd = bpf_obj_get((pin + "/Service_Map").c_str());
  bpf_map_info info{};
  std::uint32_t length = sizeof info;
  if (fd < 0 || bpf_obj_get_info_by_fd(fd, &info, &length) != 0) {
    fmt::print(stderr, "torture: Service_Map is not pinned\n");
    std::exit(1);
  }
  constexpr std::uint32_t canary_keys = 2;
  constexpr std::uint32_t used = services + services / 2 + canary_keys;  // at most: every service and every VIP
  const std::uint32_t fillers = info.max_entries - used;
  for (std::uint32_t i = 0; i < fillers; ++i) {
    service_key key{};
    key.address[3] = htonl(0xf0000000u + i);
    key.port = htons(1);
    key.protocol = IPPROTO_SCTP;
    const std::uint32_t value = MARKER_RECORD;
    if (bpf_map_update_elem(fd, &key, &value, BPF_ANY) != 0) {
      fmt::print(stderr, "torture: filling Service_Map: {}\n", std::strerror(errno));
      std::exit(1);
    }
  }
  close(fd);
  return info.max_entries;
}

struct Settings {
  std::uint64_t publications = 0;
  unsigned threads = 0;
  unsigned seconds = 0;
  std::uint64_t expect_errors = 0;
};

int torture(const Settings& settings) {
  const auto& [publications, threads, seconds, expect_errors] = settings;
  const support::Cgroup cgroup;
  const std::string pin = std::string(support::bpffs) + "/torture";
  auto opened = plugin::BpfEngine::open({.cgroup = cgroup.path(), .pin = pin, .engine_table = false});
  if (!opened) {
    fmt::print(stderr, "torture: {}\n", opened.error().message);
    return 1;
  }
  plugin::BpfEngine& engine = **opened;

  std::minstd_rand random(1);
  check(engine.load(some_services(random)), "load");
  check(engine.attach(), "attach");
  const std::uint32_t entries = fill_service_map(pin);
  cgroup.enter();

  std::atomic<bool> stop{false};
  Tally tally;
  std::vector<std::thread> connecting;
  for (unsigned i = 0; i < threads; ++i) {
    connecting.emplace_back([&stop, &tally, i] { connect_until(stop, i + 1, tally); });
  }

  const auto start = Clock::now();
  const auto deadline = start + std::chrono::seconds(seconds);
  // What only a wrong publication can do. What fails otherwise is none of it: nothing may work at all.
  const auto errors = [&tally] { return tally.wrong.load() + tally.refused.load(); };
  std::uint64_t published = 0;
  std::uint64_t churns = 0;
  while (published < publications && Clock::now() < deadline && (expect_errors == 0 || errors() < expect_errors)) {
    for (int i = 0; i < publications_per_churn && published < publications; ++i, ++published) {
      const auto service = static_cast<std::uint32_t>(random() % stable_services);
      check(engine.set_backends(name_of(service), some_backends(service, random)), "set_backends");
    }
    const config::Config config = some_services(random);
    check(engine.load(config), "load");
    published += config.services.size();
    ++churns;
  }
  const std::chrono::duration<double> took = Clock::now() - start;
  stop = true;
  for (auto& thread : connecting) {
    thread.join();
  }
  support::Cgroup::leave();
  check(engine.detach(), "detach");

  fmt::print(
      "{} publications ({} with services added and removed) and {} connects by {} threads in {:.1f} s, Service_Map "
      "of {} entries full: {} wrong, {} refused, {} failed\n",
      published, churns, tally.connects.load(), threads, took.count(), entries, tally.wrong.load(),
      tally.refused.load(), tally.failed.load());
  if (expect_errors > 0) {
    return errors() >= expect_errors && errors() + tally.failed < tally.connects.load() / 2 ? 0 : 1;
  }
  const bool complete = published >= publications && tally.connects.load() >= min_connects;
  return errors() + tally.failed == 0 && complete ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  Settings settings;
  po::options_description options("torture: connects under a storm of publications");
  auto add = options.add_options();
  add("publications", po::value(&settings.publications)->default_value(100000), "services to publish");
  add("threads", po::value(&settings.threads)->default_value(4), "threads that connect");
  add("seconds", po::value(&settings.seconds)->default_value(300), "give up after so long");
  add("expect-errors", po::value(&settings.expect_errors)->default_value(0), "succeed when at least so many are seen");
  return support::run_program("torture", options, argc, argv, [&](const auto&) { return torture(settings); });
}
