// SPDX-License-Identifier: BSD-2-Clause
//
// What each program of the fast path costs per call, as the kernel's own statistic (kernel.bpf_stats_enabled) counts
// it: with that statistic's overhead, which an empty program shows in the same rounds. Prints figures; judges nothing.
// Uses the fast path as a host does, through the C ABI.
//
// Backends of most scenarios have no route: the system call ends right behind the program, so that neither packets nor
// ports disturb what is measured.
#include <arpa/inet.h>
#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <boost/program_options.hpp>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "clusterip.skel.h"
#include "plugin/include/clusterip.h"
#include "tests/support/cgroup.h"
#include "tests/support/environment.h"
#include "tests/support/fd.h"
#include "tests/support/program.h"
#include "tests/support/tcp.h"
#include "tests/support/udp.h"

namespace {

namespace po = boost::program_options;
using Clock = std::chrono::steady_clock;
using support::checked;
using support::Fd;

[[noreturn]] void give_up(const std::string& reason) {
  fmt::print(stderr, "bench_cost: {}\n", reason);
  std::exit(1);
}

void check(int result, const clusterip_error& error) {
  if (result < 0) {
    give_up(error.message);
  }
}

// Addresses.

std::string dotted(std::uint32_t address) {
  return fmt::format("{}.{}.{}.{}", address >> 24, address >> 16 & 255, address >> 8 & 255, address & 255);
}

sockaddr_in v4(std::uint32_t address, std::uint16_t port) {
  sockaddr_in to{};
  to.sin_family = AF_INET;
  to.sin_port = htons(port);
  to.sin_addr.s_addr = htonl(address);
  return to;
}

sockaddr_in6 v6(const char* address, std::uint16_t port) {
  sockaddr_in6 to{};
  to.sin6_family = AF_INET6;
  to.sin6_port = htons(port);
  inet_pton(AF_INET6, address, &to.sin6_addr);
  return to;
}

constexpr std::uint32_t first_vip = 0x0a000001;  // 10.0.0.1, and up
constexpr std::uint32_t no_vip = 0x0aff0001;

// Configurations.

struct Kind {
  std::string name;
  std::uint32_t vip;
  std::string more;
};

/// `services`, with backends that have no route.
std::string configuration(bool peer_names, const std::vector<Kind>& services, std::uint32_t backends = 10) {
  const std::size_t count = services.size() + 10;
  std::string text = fmt::format("[engine]\npeer_names = {}\n[limits]\nservices = {}\nbackends = {}\n", peer_names,
                                 count, count * backends);
  std::uint32_t next = 0xac100001;  // 172.16.0.1
  for (const Kind& service : services) {
    text += fmt::format("[[service]]\nname = \"{}\"\nvip = \"{}\"\nport = 80\n{}backends = [", service.name,
                        dotted(service.vip), service.more);
    for (std::uint32_t backend = 0; backend < backends; ++backend) {
      text += fmt::format("{}\"{}:8080\"", backend > 0 ? ", " : "", dotted(next++));
    }
    text += "]\n";
  }
  text += "[[service]]\nname = \"six\"\nvip = \"2001:db8:1::1\"\nport = 80\nbackends = [";
  for (std::uint32_t backend = 0; backend < backends; ++backend) {
    text += fmt::format("{}\"[2001:db8:2::{:x}]:8080\"", backend > 0 ? ", " : "", backend + 1);
  }
  return text + "]\n";
}

std::vector<Kind> many_services(std::uint32_t count) {
  std::vector<Kind> services;
  for (std::uint32_t i = 0; i < count; ++i) {
    services.push_back({.name = fmt::format("svc{}", i), .vip = first_vip + i, .more = ""});
  }
  return services;
}

// Programs, and what the kernel counts of them.

struct Program {
  Fd fd;
  std::string name;
};

bpf_prog_info info_of(const Fd& program) {
  bpf_prog_info info{};
  std::uint32_t size = sizeof info;
  checked(bpf_obj_get_info_by_fd(program.get(), &info, &size), "BPF_OBJ_GET_INFO_BY_FD");
  return info;
}

constexpr std::array hooks{
    BPF_CGROUP_INET4_CONNECT,     BPF_CGROUP_INET6_CONNECT, BPF_CGROUP_UDP4_SENDMSG,      BPF_CGROUP_UDP6_SENDMSG,
    BPF_CGROUP_UDP4_RECVMSG,      BPF_CGROUP_UDP6_RECVMSG,  BPF_CGROUP_INET4_GETPEERNAME, BPF_CGROUP_INET6_GETPEERNAME,
    BPF_CGROUP_INET_SOCK_RELEASE, BPF_CGROUP_SOCK_OPS,
};

/// A cgroup, and the programs attached to it.
class Host {
 public:
  explicit Host(const std::string& text) {
    const clusterip_options options{sizeof options, cgroup_.path().c_str(), nullptr, 0, 0};
    check(clusterip_open(&options, &handle_, &error_), error_);
    check(clusterip_load_text(handle_, text.data(), text.size(), "bench", &error_), error_);
    check(clusterip_attach(handle_, &error_), error_);
    find_programs();
  }
  /// With this program alone.
  explicit Host(Fd program) : alone_(std::move(program)), directory_(open_directory()) {
    checked(bpf_prog_attach(alone_.get(), directory_.get(), BPF_CGROUP_INET4_CONNECT, 0), "BPF_PROG_ATTACH");
    find_programs();
  }
  ~Host() {
    clusterip_close(handle_);
    if (alone_.get() >= 0) {
      bpf_prog_detach2(alone_.get(), directory_.get(), BPF_CGROUP_INET4_CONNECT);
    }
    support::Cgroup::leave();
  }
  Host(const Host&) = delete;
  Host& operator=(const Host&) = delete;

  void enter() const { cgroup_.enter(); }
  const Fd& program(std::string_view name) const {
    for (const Program& program : programs_) {
      if (program.name == name) {
        return program.fd;
      }
    }
    give_up(fmt::format("{} is not attached", name));
  }

  void want_events() { check(clusterip_event_fd(handle_, 60, &error_), error_); }
  void drain_events() {
    const auto ignore = [](const clusterip_event*, void*) { return 0; };
    check(clusterip_read_events(handle_, ignore, nullptr, &error_), error_);
  }

 private:
  Fd open_directory() const {
    return Fd(checked(::open(cgroup_.path().c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC), cgroup_.path()));
  }
  void find_programs() {
    const Fd directory = open_directory();
    for (const bpf_attach_type hook : hooks) {
      std::uint32_t id = 0;
      std::uint32_t count = 1;
      if (bpf_prog_query(directory.get(), hook, 0, nullptr, &id, &count) != 0 || count == 0) {
        continue;
      }
      Fd fd(checked(bpf_prog_get_fd_by_id(id), "BPF_PROG_GET_FD_BY_ID"));
      std::string name = info_of(fd).name;
      programs_.push_back({std::move(fd), std::move(name)});
    }
  }

  support::Cgroup cgroup_;
  clusterip* handle_ = nullptr;
  Fd alone_;
  Fd directory_;
  std::vector<Program> programs_;
  clusterip_error error_{
      .size = sizeof(clusterip_error), .code = 0, .line = 0, .column = 0, .reserved = 0, .message = {}};
};

Fd load(std::span<const bpf_insn> code) {
  LIBBPF_OPTS(bpf_prog_load_opts, options, .expected_attach_type = BPF_CGROUP_INET4_CONNECT);
  return Fd(checked(
      bpf_prog_load(BPF_PROG_TYPE_CGROUP_SOCK_ADDR, "bench", "Dual BSD/GPL", code.data(), code.size(), &options),
      "BPF_PROG_LOAD"));
}

constexpr bpf_insn set(unsigned to, std::int32_t value) {
  bpf_insn move{.code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = 0, .src_reg = 0, .off = 0, .imm = value};
  move.dst_reg = to & 15;
  return move;
}
constexpr bpf_insn leave{.code = BPF_JMP | BPF_EXIT, .dst_reg = 0, .src_reg = 0, .off = 0, .imm = 0};

/// Returns 1, as every program must: what is left is the statistic's own cost.
Fd empty_program() { return load(std::array{set(BPF_REG_0, 1), leave}); }

/// The maps of the program `name` of `host`, by their names.
std::map<std::string, Fd> maps_of(const Host& host, std::string_view name) {
  std::array<std::uint32_t, 32> ids{};
  bpf_prog_info info{};
  info.map_ids = reinterpret_cast<std::uint64_t>(ids.data());
  info.nr_map_ids = ids.size();
  std::uint32_t size = sizeof info;
  checked(bpf_obj_get_info_by_fd(host.program(name).get(), &info, &size), "BPF_OBJ_GET_INFO_BY_FD");
  std::map<std::string, Fd> maps;
  for (std::uint32_t i = 0; i < info.nr_map_ids; ++i) {
    Fd map(checked(bpf_map_get_fd_by_id(ids[i]), "BPF_MAP_GET_FD_BY_ID"));
    bpf_map_info seen{};
    size = sizeof seen;
    checked(bpf_obj_get_info_by_fd(map.get(), &seen, &size), "BPF_OBJ_GET_INFO_BY_FD");
    maps.emplace(seen.name, std::move(map));
  }
  return maps;
}

/// Makes room for a session, which is never used: what no program with sessions can do without.
Fd storing_program(const Host& host) {
  const auto maps = maps_of(host, "sock4_connect");
  return load(std::array{
      bpf_insn{.code = BPF_LDX | BPF_DW | BPF_MEM,
               .dst_reg = BPF_REG_2,
               .src_reg = BPF_REG_1,
               .off = offsetof(bpf_sock_addr, sk),
               .imm = 0},
      bpf_insn{.code = BPF_LD | BPF_IMM | BPF_DW,
               .dst_reg = BPF_REG_1,
               .src_reg = BPF_PSEUDO_MAP_FD,
               .off = 0,
               .imm = maps.at("Session_Map").get()},
      bpf_insn{},  // the second half of the one before
      set(BPF_REG_3, 0),
      set(BPF_REG_4, BPF_SK_STORAGE_GET_F_CREATE),
      bpf_insn{.code = BPF_JMP | BPF_CALL, .dst_reg = 0, .src_reg = 0, .off = 0, .imm = BPF_FUNC_sk_storage_get},
      set(BPF_REG_0, 1),
      leave,
  });
}

/// The sock4_connect of `host` once more, over the same maps and with the same constants, but unable to tell events.
Fd without_events(const Host& host) {
  const std::unique_ptr<clusterip_bpf, decltype(&clusterip_bpf__destroy)> skeleton(clusterip_bpf__open(),
                                                                                   clusterip_bpf__destroy);
  if (!skeleton) {
    give_up("the BPF object cannot be opened");
  }
  bpf_program* program = nullptr;
  bpf_object__for_each_program(program, skeleton->obj) {
    bpf_program__set_autoload(program, program == skeleton->progs.sock4_connect);
  }
  bpf_map* map = nullptr;
  bpf_object__for_each_map(map, skeleton->obj) { bpf_map__set_autocreate(map, bpf_map__is_internal(map)); }
  for (const auto& [name, live] : maps_of(host, "sock4_connect")) {
    if (name.ends_with(".rodata")) {
      const std::uint32_t first = 0;
      checked(bpf_map_lookup_elem(live.get(), &first, skeleton->rodata), "the program's constants");
    } else if ((map = bpf_object__find_map_by_name(skeleton->obj, name.c_str())) != nullptr) {
      checked(bpf_map__reuse_fd(map, live.get()), "using the maps");
      bpf_map__set_autocreate(map, true);
    }
  }
  skeleton->rodata->can_events = 0;
  checked(clusterip_bpf__load(skeleton.get()), "loading sock4_connect");
  return Fd(checked(::fcntl(bpf_program__fd(skeleton->progs.sock4_connect), F_DUPFD_CLOEXEC, 0), "dup"));
}

// What is called.

template <class Address>
int connect_to(int fd, const Address& to) {
  return ::connect(fd, reinterpret_cast<const sockaddr*>(&to), sizeof to);
}

int new_socket(int family, int type) { return checked(::socket(family, type | SOCK_CLOEXEC, 0), "socket"); }

/// Connects a new socket each time.
template <class Address>
std::function<void(std::uint32_t)> on_new_sockets(Address to, int type = SOCK_STREAM) {
  return [to, type](std::uint32_t calls) {
    const int family = std::is_same_v<Address, sockaddr_in> ? AF_INET : AF_INET6;
    for (std::uint32_t i = 0; i < calls; ++i) {
      const Fd fd(new_socket(family, type));
      connect_to(fd.get(), to);
    }
  };
}

/// Connects one socket again and again.
template <class Address>
std::function<void(std::uint32_t)> on_one_socket(Address to, int type = SOCK_STREAM) {
  return [to, type](std::uint32_t calls) {
    const Fd fd(new_socket(std::is_same_v<Address, sockaddr_in> ? AF_INET : AF_INET6, type));
    for (std::uint32_t i = 0; i < calls; ++i) {
      connect_to(fd.get(), to);
    }
  };
}

/// To any of so many services, in no order that a cache could guess.
std::function<void(std::uint32_t)> to_random_services(std::uint32_t services, bool new_sockets) {
  return [services, new_sockets, state = std::uint64_t{88172645463325252}](std::uint32_t calls) mutable {
    Fd fd(new_socket(AF_INET, SOCK_STREAM));
    for (std::uint32_t i = 0; i < calls; ++i) {
      state ^= state << 13;
      state ^= state >> 7;
      state ^= state << 17;
      if (new_sockets) {
        fd = Fd();
        fd = Fd(new_socket(AF_INET, SOCK_STREAM));
      }
      connect_to(fd.get(), v4(first_vip + static_cast<std::uint32_t>(state >> 32) % services, 80));
    }
  };
}

struct Datagrams {
  support::UdpSocket server;  // made outside of any cgroup of ours

  /// A question and its answer, on one unconnected socket.
  void exchange(std::uint32_t calls, std::uint32_t vip) const {
    const Fd client(new_socket(AF_INET, SOCK_DGRAM));
    const sockaddr_in to = v4(vip, 80);
    char byte = 'x';
    for (std::uint32_t i = 0; i < calls; ++i) {
      sockaddr_in from{};
      socklen_t size = sizeof from;
      ::sendto(client.get(), &byte, 1, 0, reinterpret_cast<const sockaddr*>(&to), sizeof to);
      checked(::recvfrom(server.get(), &byte, 1, 0, reinterpret_cast<sockaddr*>(&from), &size), "question");
      ::sendto(server.get(), &byte, 1, 0, reinterpret_cast<const sockaddr*>(&from), size);
      size = sizeof from;
      checked(::recvfrom(client.get(), &byte, 1, 0, reinterpret_cast<sockaddr*>(&from), &size), "answer");
    }
  }
  /// The first datagram of a socket.
  static void first(std::uint32_t calls, std::uint32_t vip) {
    const sockaddr_in to = v4(vip, 80);
    const char byte = 'x';
    for (std::uint32_t i = 0; i < calls; ++i) {
      const Fd client(new_socket(AF_INET, SOCK_DGRAM));
      ::sendto(client.get(), &byte, 1, 0, reinterpret_cast<const sockaddr*>(&to), sizeof to);
    }
  }
  static void ask_names(std::uint32_t calls, std::uint32_t vip) {
    const Fd client(new_socket(AF_INET, SOCK_DGRAM));
    checked(connect_to(client.get(), v4(vip, 80)), "connect");
    for (std::uint32_t i = 0; i < calls; ++i) {
      sockaddr_in peer{};
      socklen_t size = sizeof peer;
      ::getpeername(client.get(), reinterpret_cast<sockaddr*>(&peer), &size);
    }
  }
};

// Scenarios.

struct Scenario {
  std::string name;
  Host* host;
  std::vector<std::pair<std::string, std::uint32_t>> programs;  // with the goal in ns; 0: none is set
  std::function<void(std::uint32_t)> body;
  std::uint32_t calls = 0;               // at most, a round; 0: as many as are asked for
  std::function<void()> before = [] {};  // each round
};

struct Samples {
  std::vector<std::vector<double>> programs;  // ns per call of each program, by rounds
  std::vector<double> loop;                   // ns of the whole loop for each turn, other system calls included
  std::vector<std::uint64_t> calls;
};

double median(std::vector<double> values) {
  std::ranges::sort(values);
  return values.empty() ? 0 : values[values.size() / 2];
}

void run_once(const Scenario& scenario, std::uint32_t calls, Samples& samples) {
  std::vector<bpf_prog_info> before;
  scenario.host->enter();
  scenario.before();
  scenario.body(std::min(calls, 50u));  // the caches
  for (const auto& [name, goal] : scenario.programs) {
    before.push_back(info_of(scenario.host->program(name)));
  }
  const auto start = Clock::now();
  scenario.body(calls);
  samples.loop.push_back(std::chrono::duration<double, std::nano>(Clock::now() - start).count() / calls);
  for (std::size_t i = 0; i < before.size(); ++i) {
    const bpf_prog_info after = info_of(scenario.host->program(scenario.programs[i].first));
    const std::uint64_t count = after.run_cnt - before[i].run_cnt;
    if (count == 0) {
      give_up(fmt::format("{}: {} was not called", scenario.name, scenario.programs[i].first));
    }
    samples.programs[i].push_back(static_cast<double>(after.run_time_ns - before[i].run_time_ns) /
                                  static_cast<double>(count));
    samples.calls[i] += count;
  }
  support::Cgroup::leave();
}

struct Settings {
  std::uint32_t services = 0;
  std::uint32_t backends = 0;
  std::uint32_t rounds = 0;
  std::uint32_t calls = 0;
  std::string only;
};

void measure(const Settings& settings) {
  const Datagrams datagrams;
  const support::TcpListener listener;
  const std::vector<Kind> kinds{
      {.name = "random", .vip = first_vip, .more = ""},
      {.name = "round_robin", .vip = first_vip + 1, .more = "policy = \"round_robin\"\n"},
      {.name = "maglev", .vip = first_vip + 2, .more = "policy = \"maglev\"\n"},
      {.name = "affinity", .vip = first_vip + 3, .more = "affinity = \"1h\"\n"},
  };
  constexpr std::uint32_t udp_vip = first_vip + 10;
  constexpr std::uint32_t tcp_vip = first_vip + 11;
  constexpr std::uint32_t ejecting_vip = first_vip + 12;
  constexpr std::uint32_t ejected_vip = first_vip + 13;
  const std::string eject = "eject = { failures = 1, time = \"1h\" }\n";
  std::string served = configuration(true, {});
  served += fmt::format(
      "[[service]]\nname = \"udp\"\nprotocol = \"udp\"\nvip = \"{}\"\nport = 80\nbackends = [\"127.0.0.1:{}\"]\n"
      "[[service]]\nname = \"tcp\"\nvip = \"{}\"\nport = 80\nbackends = [\"127.0.0.1:{}\"]\n",
      dotted(udp_vip), datagrams.server.port(), dotted(tcp_vip), listener.port());
  served += fmt::format("[[service]]\nname = \"ejecting\"\nvip = \"{}\"\nport = 80\nbackends = [\"127.0.0.1:{}\"]\n{}",
                        dotted(ejecting_vip), listener.port(), eject);
  served += fmt::format(
      "[[service]]\nname = \"ejected\"\nvip = \"{}\"\nport = 80\nbackends = [\"127.0.0.1:{}\", \"127.0.0.1:1\"]\n{}",
      dotted(ejected_vip), listener.port(), eject);

  Host empty(empty_program());
  Host plain(configuration(false, kinds));
  Host quiet(without_events(plain));
  Host loud(configuration(false, kinds));
  Host named(configuration(true, kinds));
  Host ejecting(configuration(true, {{.name = "eject", .vip = first_vip, .more = eject}}));
  Host storing(storing_program(named));
  Host least(configuration(false, {{.name = "least_conn", .vip = first_vip, .more = "policy = \"least_conn\"\n"}}));
  Host serving(served);
  Host many(configuration(false, many_services(settings.services), settings.backends));
  Host many_named(configuration(true, many_services(settings.services), settings.backends));

  const auto connections_to = [&listener](std::uint32_t address) -> std::function<void(std::uint32_t)> {
    return [&listener, address](std::uint32_t calls) {
      for (std::uint32_t i = 0; i < calls; ++i) {
        Fd client(new_socket(AF_INET, SOCK_STREAM));
        if (connect_to(client.get(), v4(address, 80)) != 0) {
          continue;  // the failure that ejects, among those for the caches
        }
        const Fd server = listener.accept();
        support::reset(std::move(client));
      }
    };
  };
  const sockaddr_in vip = v4(first_vip, 80);
  const std::string of_many = fmt::format("{} services of {} at random", settings.services, settings.backends);
  std::vector<Scenario> scenarios{
      {"nothing (the statistic itself)", &empty, {{"bench", 0}}, on_one_socket(vip)},
      {"nothing, new sockets", &empty, {{"bench", 0}}, on_new_sockets(vip)},
      {"nothing but a socket storage", &storing, {{"bench", 0}}, on_new_sockets(vip)},
      {"miss", &plain, {{"sock4_connect", 90}}, on_one_socket(v4(no_vip, 80))},
      {"miss, new sockets", &plain, {{"sock4_connect", 90}}, on_new_sockets(v4(no_vip, 80))},
      {"miss, new sockets, peer names",
       &named,
       {{"sock4_connect", 90}, {"sock_release", 0}},
       on_new_sockets(v4(no_vip, 80))},
      {"foreign port of a VIP", &plain, {{"sock4_connect", 0}}, on_one_socket(v4(first_vip, 81))},
      {"random", &plain, {{"sock4_connect", 160}}, on_one_socket(vip)},
      {"random, unable to tell events", &quiet, {{"sock4_connect", 0}}, on_one_socket(vip)},
      {"random, events on",
       &loud,
       {{"sock4_connect", 0}},
       on_one_socket(vip),
       500,
       [&loud] {
         loud.want_events();
         loud.drain_events();
       }},
      {"random, new sockets", &plain, {{"sock4_connect", 0}}, on_new_sockets(vip)},
      {"random, IPv6", &plain, {{"sock6_connect", 0}}, on_one_socket(v6("2001:db8:1::1", 80))},
      {"round_robin", &plain, {{"sock4_connect", 0}}, on_one_socket(v4(first_vip + 1, 80))},
      {"maglev", &plain, {{"sock4_connect", 0}}, on_one_socket(v4(first_vip + 2, 80))},
      {"affinity", &plain, {{"sock4_connect", 0}}, on_one_socket(v4(first_vip + 3, 80))},
      {"random, peer names, same socket again", &named, {{"sock4_connect", 0}}, on_one_socket(vip)},
      {"random, peer names, new sockets", &named, {{"sock4_connect", 650}, {"sock_release", 0}}, on_new_sockets(vip)},
      {"random, eject, same socket again", &ejecting, {{"sock4_connect", 0}}, on_one_socket(vip)},
      {"random, eject, new sockets", &ejecting, {{"sock4_connect", 0}, {"sock_release", 0}}, on_new_sockets(vip)},
      {"the same, IPv6", &named, {{"sock6_connect", 0}, {"sock_release", 0}}, on_new_sockets(v6("2001:db8:1::1", 80))},
      {"least_conn, new sockets", &least, {{"sock4_connect", 850}, {"sock_release", 0}}, on_new_sockets(vip)},
      {of_many, &many, {{"sock4_connect", 600}}, to_random_services(settings.services, false)},
      {of_many + ", peer names, new sockets",
       &many_named,
       {{"sock4_connect", 1100}, {"sock_release", 0}},
       to_random_services(settings.services, true)},
      {"TCP connections, peer names",
       &serving,
       {{"sock4_connect", 0}, {"sock_ops", 0}, {"sock_release", 0}},
       connections_to(tcp_vip),
       500},
      {"TCP connections, peer names, eject",
       &serving,
       {{"sock4_connect", 0}, {"sock_ops", 0}, {"sock_release", 0}},
       connections_to(ejecting_vip),
       500},
      {"the same, one of two backends ejected",
       &serving,
       {{"sock4_connect", 0}, {"sock_ops", 0}, {"sock_release", 0}},
       connections_to(ejected_vip),
       500},
      {"UDP, getpeername()",
       &serving,
       {{"sock4_getpeer", 0}},
       [](std::uint32_t calls) { Datagrams::ask_names(calls, udp_vip); }},
      {"UDP, datagrams of an unconnected socket",
       &serving,
       {{"sock4_sendmsg", 0}, {"sock4_recvmsg", 0}},
       [&datagrams](std::uint32_t calls) { datagrams.exchange(calls, udp_vip); },
       1000},
      {"UDP, first datagram of a new socket",
       &serving,
       {{"sock4_sendmsg", 0}, {"sock_release", 0}},
       [&datagrams](std::uint32_t calls) {
         Datagrams::first(calls, udp_vip);
         char byte = 0;
         while (::recv(datagrams.server.get(), &byte, 1, MSG_DONTWAIT) >= 0) {
         }
       },
       100},
      {"UDP, datagrams to elsewhere",
       &serving,
       {{"sock4_sendmsg", 0}},
       [](std::uint32_t calls) {
         const Fd client(new_socket(AF_INET, SOCK_DGRAM));
         const sockaddr_in to = v4(no_vip, 80);
         for (std::uint32_t i = 0; i < calls; ++i) {
           ::sendto(client.get(), "x", 1, 0, reinterpret_cast<const sockaddr*>(&to), sizeof to);
         }
       }},
  };
  std::erase_if(scenarios, [&settings](const Scenario& scenario) {
    return scenario.host->program(scenario.programs.front().first).get() < 0 ||
           (scenario.name.find(settings.only) == std::string::npos && !scenario.name.starts_with("nothing"));
  });

  const Fd statistic(checked(bpf_enable_stats(BPF_STATS_RUN_TIME), "BPF_ENABLE_STATS (Linux 5.8)"));
  std::vector<Samples> samples;
  for (const Scenario& scenario : scenarios) {
    samples.push_back({.programs = std::vector<std::vector<double>>(scenario.programs.size()),
                       .loop = {},
                       .calls = std::vector<std::uint64_t>(scenario.programs.size())});
  }
  for (std::uint32_t round = 0; round < settings.rounds; ++round) {
    for (std::size_t i = 0; i < scenarios.size(); ++i) {
      const std::uint32_t most = scenarios[i].calls == 0 ? settings.calls : scenarios[i].calls;
      run_once(scenarios[i], std::min(settings.calls, most), samples[i]);
    }
  }

  fmt::print("{:<42} {:<14} {:>9} {:>7} {:>7} {:>7} {:>6} {:>9} {:>8}\n", "", "program", "calls", "least", "median",
             "goal", "", "without", "loop");
  const double overhead = median(samples.front().programs.front());
  for (std::size_t i = 0; i < scenarios.size(); ++i) {
    for (std::size_t program = 0; program < scenarios[i].programs.size(); ++program) {
      const auto& [name, goal] = scenarios[i].programs[program];
      const auto& values = samples[i].programs[program];
      const double middle = median(values);
      fmt::print("{:<42} {:<14} {:>9} {:>7.0f} {:>7.0f} {:>7} {:>6} {:>9.0f} {:>8}\n",
                 program == 0 ? scenarios[i].name : "", name, samples[i].calls[program], std::ranges::min(values),
                 middle, goal == 0 ? "" : std::to_string(goal),
                 goal == 0        ? ""
                 : middle <= goal ? "met"
                                  : "missed",
                 middle - overhead, program == 0 ? fmt::format("{:.0f}", median(samples[i].loop)) : "");
    }
  }

  // Of each round, since the two followed each other within milliseconds.
  const auto find = [&scenarios](std::string_view name) {
    return static_cast<std::size_t>(
        std::ranges::find_if(scenarios, [name](const Scenario& scenario) { return scenario.name == name; }) -
        scenarios.begin());
  };
  const std::size_t able = find("random");
  const std::size_t unable = find("random, unable to tell events");
  if (able < scenarios.size() && unable < scenarios.size()) {
    std::vector<double> differences;
    for (std::size_t round = 0; round < settings.rounds; ++round) {
      differences.push_back(samples[able].programs[0][round] - samples[unable].programs[0][round]);
    }
    const double middle = median(differences);
    fmt::print("\nevents that nobody wants: {:.1f} ns, goal 10, {}\n", middle, middle <= 10 ? "met" : "missed");
  }
  fmt::print(
      "\nns per call, over {} rounds in turn, with the statistic's own cost in them; `without`: the median less that "
      "of\n"
      "the empty program. `loop`: ns of one turn of the loop, its other system calls included.\n",
      settings.rounds);
}

}  // namespace

int main(int argc, char** argv) {
  Settings settings;
  po::options_description options("bench_cost: what each program of the fast path costs per call");
  auto add = options.add_options();
  add("services", po::value(&settings.services)->default_value(50000), "services, where there are many");
  add("backends", po::value(&settings.backends)->default_value(10), "backends of each of these");
  add("rounds", po::value(&settings.rounds)->default_value(51), "rounds, of which the median counts");
  add("calls", po::value(&settings.calls)->default_value(2000), "calls a round");
  add("only", po::value(&settings.only)->default_value(""), "scenarios with this in their names");
  return support::run_program("bench_cost", options, argc, argv, [&](const auto&) {
    if (settings.services == 0 || settings.backends == 0 || settings.services > 0xf0000 || settings.rounds == 0 ||
        settings.calls == 0) {
      fmt::print(stderr, "bench_cost: 1 to 983040 services, and at least one backend, one round and one call\n");
      return 2;
    }
    measure(settings);
    return 0;
  });
}
