// SPDX-License-Identifier: BSD-2-Clause
//
// Tortures the books: threads connect to services of every kind, with everything switched on (peer names, marks,
// affinity, all policies, events with a reader), and when they have ended, each counter must be exactly what they did,
// and nothing may be left in a map. Most are UDP connects, which cost microseconds and send nothing. By hand:
// --connects 1000000.
#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <fmt/format.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <boost/program_options.hpp>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "bpf/map_layout.h"
#include "tests/support/bpf_objects.h"
#include "tests/support/cgroup.h"
#include "tests/support/client.h"
#include "tests/support/environment.h"
#include "tests/support/named_server.h"
#include "tests/support/observe.h"
#include "tests/support/plugin.h"
#include "tests/support/program.h"
#include "tests/support/toml.h"

namespace {

namespace po = boost::program_options;
using support::Fd;
using support::instruction;

enum class Way { tcp, tcp_dead, tcp_refused, udp, udp_datagram };

struct Kind {
  const char* name;
  Way way;
  const char* vip;
  const char* keys;
  unsigned share;  // of all connects, in shares
};

constexpr std::array kinds{
    Kind{"tcp-least-conn", Way::tcp, "10.96.0.1", "policy = \"least_conn\"\nmark = 193", 1},
    Kind{"tcp6-round-robin", Way::tcp, "fd00::1", "policy = \"round_robin\"\non_remove = \"reset\"", 1},
    Kind{"tcp-dead", Way::tcp_dead, "10.96.0.2", "policy = \"least_conn\"", 1},
    Kind{"tcp-empty", Way::tcp_refused, "10.96.0.3", "", 2},
    Kind{"udp-random", Way::udp, "10.96.0.4", "protocol = \"udp\"", 5},
    Kind{"udp-round-robin", Way::udp, "10.96.0.5", "protocol = \"udp\"\npolicy = \"round_robin\"", 5},
    Kind{"udp-least-conn", Way::udp, "10.96.0.6", "protocol = \"udp\"\npolicy = \"least_conn\"\nmark = 194", 5},
    Kind{"udp-maglev", Way::udp, "10.96.0.7", "protocol = \"udp\"\npolicy = \"maglev\"\nclient = \"socket\"", 5},
    Kind{"udp-affinity", Way::udp, "10.96.0.8", "protocol = \"udp\"\naffinity = \"1h\"\nclient = \"socket\"", 5},
    Kind{"udp-affinity-cgroup", Way::udp, "10.96.0.9", "protocol = \"udp\"\naffinity = \"1h\"", 5},
    Kind{"udp6-datagrams", Way::udp_datagram, "fd00::2", "protocol = \"udp\"\npolicy = \"round_robin\"", 5},
};

constexpr unsigned connects_per_socket = 3;  // of UDP: each ends the session of the one before
constexpr std::uint32_t flows_limit = 4096;  // far fewer than the clients of "udp-affinity"

struct Tally {
  std::atomic<std::uint64_t> connects{0};
  std::atomic<std::uint64_t> refused{0};
  std::atomic<std::uint64_t> named{0};  // getpeername() or recvfrom() that was to show the VIP
  std::atomic<std::uint64_t> wrong{0};
};
using Tallies = std::array<Tally, kinds.size()>;

support::Service service_of(const Kind& kind, const support::NamedServer& four, const support::NamedServer& six) {
  std::vector<support::Backend> backends;
  const bool is_v6 = std::string(kind.vip).contains(':');
  switch (kind.way) {
    case Way::tcp: {
      // "four" listens on all addresses.
      if (is_v6)
        backends = {support::backend(six)};
      else
        backends = {{"127.0.0.1", four.port()}, {"127.0.0.2", four.port()}};
      break;
    }
    case Way::tcp_dead:
      backends = {{"127.0.0.1", 1}, {"127.0.0.1", 2}};
      break;
    case Way::tcp_refused:
      break;
    case Way::udp:
      for (std::uint16_t port = 1; port <= 6; ++port) backends.push_back({"127.0.0.1", port, port});
      break;
    case Way::udp_datagram:
      for (std::uint16_t port = 1; port <= 6; ++port) backends.push_back({"::1", port, port});
      break;
  }
  return {kind.name, kind.vip, 80, backends, "refuse", kind.keys};
}

void count_name(int fd, const support::Endpoint& vip, Tally& tally) {
  sockaddr_storage peer{};
  socklen_t length = sizeof peer;
  ++tally.named;
  if (::getpeername(fd, reinterpret_cast<sockaddr*>(&peer), &length) != 0 || length != vip.length() ||
      std::memcmp(&peer, vip.address(), offsetof(sockaddr_in, sin_zero)) != 0)
    ++tally.wrong;
}

/// So many connects with one socket; returns how many.
unsigned connect_once(const Kind& kind, const support::Endpoint& vip, Tally& tally) {
  if (kind.way == Way::udp_datagram) {
    const Fd fd = support::udp_socket(vip.family());
    for (unsigned i = 0; i < 2; ++i) {  // the second belongs to the same flow
      if (::sendto(fd.get(), "x", 1, 0, vip.address(), vip.length()) != 1) ++tally.wrong;
    }
    ++tally.connects;
    return 1;
  }
  if (kind.way == Way::udp) {
    const Fd fd = support::udp_socket(vip.family());
    for (unsigned i = 0; i < connects_per_socket; ++i) {
      if (::connect(fd.get(), vip.address(), vip.length()) != 0) ++tally.wrong;
      ++tally.connects;
    }
    count_name(fd.get(), vip, tally);
    return connects_per_socket;
  }
  const Fd fd = support::tcp_socket(0, vip.family());
  const int error = ::connect(fd.get(), vip.address(), vip.length()) == 0 ? 0 : errno;
  if (error != (kind.way == Way::tcp ? 0 : ECONNREFUSED)) ++tally.wrong;
  if (kind.way == Way::tcp_refused)
    ++tally.refused;
  else
    ++tally.connects;
  if (kind.way == Way::tcp) count_name(fd.get(), vip, tally);
  return 1;
}

void connect_until(std::atomic<std::int64_t>& left, unsigned seed, Tallies& tallies) {
  std::vector<std::size_t> draws;
  std::vector<support::Endpoint> vips;
  for (std::size_t i = 0; i < kinds.size(); ++i) {
    draws.insert(draws.end(), kinds[i].share, i);
    vips.emplace_back(kinds[i].vip, 80);
  }
  std::minstd_rand random(seed);
  while (left.load(std::memory_order_relaxed) > 0) {
    const std::size_t kind = draws[random() % draws.size()];
    left -= connect_once(kinds[kind], vips[kind], tallies[kind]);
  }
}

std::size_t count_keys(const Fd& map, std::size_t key_size) {
  std::vector<std::byte> key(key_size);
  std::size_t count = 0;
  for (const void* from = nullptr; bpf_map_get_next_key(map.get(), from, key.data()) == 0; from = key.data()) ++count;
  return count;
}

std::uint32_t max_entries(const Fd& map) {
  bpf_map_info info{};
  std::uint32_t length = sizeof info;
  support::checked(bpf_obj_get_info_by_fd(map.get(), &info, &length), "BPF_OBJ_GET_INFO_BY_FD");
  return info.max_entries;
}

/// Elements of a socket storage, which user space cannot list: an iterator writes a byte for each.
class StorageCounter {
 public:
  StorageCounter() {
    static constexpr bpf_insn count[] = {
        instruction(BPF_ALU64 | BPF_MOV | BPF_X, 6, 1, 0, 0),
        instruction(BPF_LDX | BPF_MEM | BPF_DW, 1, 6, 24, 0),  // ctx->value: NULL at the end
        instruction(BPF_JMP | BPF_JEQ | BPF_K, 1, 0, 7, 0),
        instruction(BPF_LDX | BPF_MEM | BPF_DW, 1, 6, 0, 0),  // ctx->meta
        instruction(BPF_LDX | BPF_MEM | BPF_DW, 1, 1, 0, 0),  // ->seq
        instruction(BPF_ST | BPF_MEM | BPF_B, 10, 0, -1, 1),
        instruction(BPF_ALU64 | BPF_MOV | BPF_X, 2, 10, 0, 0),
        instruction(BPF_ALU64 | BPF_ADD, 2, 0, 0, -1),
        instruction(BPF_ALU64 | BPF_MOV | BPF_K, 3, 0, 0, 1),
        instruction(BPF_JMP | BPF_CALL, 0, 0, 0, BPF_FUNC_seq_write),
        instruction(BPF_ALU64 | BPF_MOV | BPF_K, 0, 0, 0, 0),
        instruction(BPF_JMP | BPF_EXIT, 0, 0, 0, 0),
    };
    LIBBPF_OPTS(bpf_prog_load_opts, options, .expected_attach_type = BPF_TRACE_ITER,
                .attach_btf_id = static_cast<__u32>(support::checked(
                    libbpf_find_vmlinux_btf_id("bpf_sk_storage_map", BPF_TRACE_ITER), "the iterator's type")));
    const int program = bpf_prog_load(BPF_PROG_TYPE_TRACING, "count", "GPL", count, std::size(count), &options);
    // Some builds of Linux 6.18 load no program for iterators over map elements, also none of two instructions.
    if (program != -EPERM) program_ = Fd(support::checked(program, "the iterator"));
  }

  /// False where the kernel refuses even the capable: then nothing can be counted.
  explicit operator bool() const { return program_.get() >= 0; }

  std::size_t operator()(const Fd& map) const {
    bpf_iter_link_info info{};
    info.map.map_fd = static_cast<__u32>(map.get());
    LIBBPF_OPTS(bpf_link_create_opts, options, .iter_info = &info, .iter_info_len = sizeof info);
    const Fd link(support::checked(bpf_link_create(program_.get(), 0, BPF_TRACE_ITER, &options), "link"));
    const Fd iterator(support::checked(bpf_iter_create(link.get()), "iterator"));
    std::size_t count = 0;
    for (char bytes[4096];;) {
      const auto size = support::checked(::read(iterator.get(), bytes, sizeof bytes), "read of the iterator");
      if (size == 0) return count;
      count += static_cast<std::size_t>(size);
    }
  }

 private:
  Fd program_;
};

/// A session and a flow that live are seen: later, to see none must mean something.
void prove_counter(const StorageCounter& count, const Fd& sessions, const Fd& flows, Tallies& tallies) {
  for (std::size_t i = 0; i < kinds.size(); ++i) {
    const support::Endpoint vip(kinds[i].vip, 80);
    if (kinds[i].way == Way::udp) {
      const Fd fd = support::udp_socket(vip.family());
      support::checked(::connect(fd.get(), vip.address(), vip.length()), "connect");
      ++tallies[i].connects;
      support::require(count(sessions) == 1, "a session is not seen");
    } else if (kinds[i].way == Way::udp_datagram) {
      const Fd fd = support::udp_socket(vip.family());
      support::checked(::sendto(fd.get(), "x", 1, 0, vip.address(), vip.length()), "sendto");
      ++tallies[i].connects;
      support::require(count(flows) == 1, "a flow is not seen");
    }
    support::require(support::eventually([&] { return count(sessions) + count(flows) == 0; }), "they do not end");
  }
}

/// Reads events until the threads have ended; returns how many of each service.
std::map<std::string, std::uint64_t> read_events(const support::Plugin& plugin, const support::Handle& handle, int fd,
                                                 const std::atomic<unsigned>& running) {
  std::map<std::string, std::uint64_t> seen;
  const clusterip_event_visitor visit = [](const clusterip_event* event, void* user) {
    ++(*static_cast<std::map<std::string, std::uint64_t>*>(user))[event->service];
    return 0;
  };
  while (running > 0) {
    pollfd readable{fd, POLLIN, 0};
    ::poll(&readable, 1, 100);
    plugin.read_events(handle.get(), visit, &seen, nullptr);
  }
  plugin.read_events(handle.get(), visit, &seen, nullptr);
  return seen;
}

/// Prints what is not as it should be.
class Books {
 public:
  void expect(std::uint64_t found, std::uint64_t expected, const std::string& what) {
    if (found == expected) return;
    fmt::print("{}: {}, not {}\n", what, found, expected);
    ++mistakes_;
  }
  void expect(bool is_so, const std::string& what) {
    if (is_so) return;
    fmt::print("{}\n", what);
    ++mistakes_;
  }
  bool balance() const { return mistakes_ == 0; }

 private:
  unsigned mistakes_ = 0;
};

/// Returns how many live connections are counted that are none.
std::uint64_t audit(Books& books, const support::SeenService& service, const Tally& tally,
                    const std::map<std::string, std::uint64_t>& events) {
  std::uint64_t left = 0;
  std::uint64_t connects = 0;
  std::uint64_t reversed = 0;
  for (const auto& backend : service.backends) {
    connects += backend.connects;
    reversed += backend.reversed;
    if (service.protocol == IPPROTO_UDP)
      left += backend.live;
    else
      books.expect(backend.live, 0, service.name + ": live at a backend");
  }
  books.expect(service.connects, tally.connects, service.name + ": connects");
  books.expect(connects, service.connects, service.name + ": connects of all backends");
  books.expect(service.refused, tally.refused, service.name + ": refused");
  books.expect(service.reversed, tally.named, service.name + ": reversed");
  books.expect(reversed, service.reversed, service.name + ": reversed of all backends");
  books.expect(tally.wrong, 0, service.name + ": connects, datagrams or names that went wrong");
  const auto told = events.find(service.name);
  const std::uint64_t count = told == events.end() ? 0 : told->second;
  books.expect(count > 0 && count <= tally.connects + tally.refused,
               fmt::format("{}: {} events of {} decisions", service.name, count, tally.connects + tally.refused));
  return left;
}

int torture(std::uint64_t connects, unsigned threads) {
  const support::Cgroup cgroup;
  const std::string pin = std::string(support::bpffs) + "/torture";
  const support::NamedServer four("four", "0.0.0.0"), six("six", "::1");
  const support::Plugin plugin;
  support::Handle handle(plugin, {cgroup.path(), pin, 0});
  std::vector<support::Service> services;
  for (const Kind& kind : kinds) services.push_back(service_of(kind, four, six));
  support::require_ok(handle.load(support::toml(services, {256, 4096, flows_limit})));
  support::require_ok(handle.attach());
  const int events_fd = support::checked(plugin.event_fd(handle.get(), 600, nullptr), "event_fd");
  const auto maps = support::objects_of(cgroup).maps;
  const Fd service_map = support::pinned_map(pin, "Service_Map");
  const std::size_t keys = count_keys(service_map, sizeof(service_key));
  cgroup.enter();

  const StorageCounter count;
  const Fd sessions = support::pinned_map(pin, "Session_Map"), flows = support::pinned_map(pin, "Flow_Map");
  Tallies tallies;
  if (count)
    prove_counter(count, sessions, flows, tallies);
  else
    fmt::print("this kernel does not list socket storage: what is left of it is not counted\n");
  std::atomic<std::int64_t> left = static_cast<std::int64_t>(connects);
  std::atomic<unsigned> running = threads;
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> connecting;
  for (unsigned i = 0; i < threads; ++i) {
    connecting.emplace_back([&, i] {
      connect_until(left, i + 1, tallies);
      --running;
    });
  }
  const auto events = read_events(plugin, handle, events_fd, running);
  for (auto& thread : connecting) thread.join();
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  support::Cgroup::leave();

  Books books;
  // The kernel ends sockets and their storage a little later than close() returns.
  support::eventually([&] {
    return std::ranges::all_of(handle.visit(), [](const support::SeenService& service) { return service.live == 0; });
  });
  if (count) {
    support::eventually([&] { return count(sessions) == 0 && count(flows) == 0; });
    books.expect(count(sessions), 0, "Session_Map");
    books.expect(count(flows), 0, "Flow_Map");
  }
  books.expect(count_keys(service_map, sizeof(service_key)), keys, "Service_Map");
  const Fd affinities = support::pinned_map(pin, "Affinity_Map");
  const std::size_t clients = count_keys(affinities, sizeof(affinity_key));
  books.expect(clients > 0 && clients <= max_entries(affinities),
               fmt::format("Affinity_Map: {} of {}", clients, max_entries(affinities)));
  books.expect(support::objects_of(cgroup).maps == maps, "the maps are others than before");

  std::uint64_t decided = 0;
  std::uint64_t told = 0;
  std::uint64_t too_many = 0;
  auto seen = handle.visit();
  for (std::size_t i = 0; i < kinds.size(); ++i) {
    const auto service = std::ranges::find(seen, kinds[i].name, &support::SeenService::name);
    too_many += audit(books, *service, tallies[i], events);
    decided += tallies[i].connects + tallies[i].refused;
  }
  // One of some ten million connected UDP sockets was seen to count on for ever (Linux 6.18.44): what ends it is
  // sock_release alone, while TCP connections are ended by sock_ops as well. Not understood; more than one is a
  // failure.
  books.expect(too_many <= 1, fmt::format("{} live connections that are none", too_many));
  for (const auto& [name, number] : events) told += number;
  support::require_ok(handle.detach());
  fmt::print("{} connects by {} threads in {:.1f} s, {} events read; {} of {} places for affinity taken; {}\n", decided,
             threads, took.count(), told, clients, max_entries(affinities),
             books.balance() ? "the books balance" : "THE BOOKS DO NOT BALANCE");
  return books.balance() && decided >= connects ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  std::uint64_t connects = 0;
  unsigned threads = 0;
  po::options_description options("torture_features: connects to services of every kind, and an audit");
  auto add = options.add_options();
  add("connects", po::value(&connects)->default_value(1000000), "connects in all");
  add("threads", po::value(&threads)->default_value(8), "threads that connect");
  return support::run_program("torture_features", options, argc, argv,
                              [&](const auto&) { return torture(connects, threads); });
}
