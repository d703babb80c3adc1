// SPDX-License-Identifier: BSD-2-Clause
//
// An application behind a sidecar: what a request costs through it, and past it by `mark`. All of it is built here, in
// network namespaces of its own: the application's host, whose OUTPUT chain redirects what it sends to a sidecar as a
// service mesh does (HAProxy, which balances to the backend), and the backend's host. Prints figures; judges nothing.
#include <arpa/inet.h>
#include <fmt/format.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdint>
#include <fstream>
#include <map>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "tests/support/cgroup.h"
#include "tests/support/client.h"
#include "tests/support/environment.h"
#include "tests/support/observe.h"
#include "tests/support/other_host.h"
#include "tests/support/plugin.h"
#include "tests/support/process.h"
#include "tests/support/program.h"
#include "tests/support/tcp.h"
#include "tests/support/toml.h"

namespace {

namespace po = boost::program_options;
using Clock = std::chrono::steady_clock;
using support::Fd;

constexpr const char* vip = "10.96.0.1";
constexpr std::uint16_t service_port = 80, backend_port = 7000, sidecar_port = 15001;
constexpr std::uint32_t mark = 0xc1;
constexpr int sidecar_user = 1337;

double microseconds_since(Clock::time_point start) {
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

/// Answers each byte with a byte, in the backend's host, until the test's process tells it to end.
void serve_echo(const support::Channel& channel, const support::OtherHost& host, const support::Cgroup& cgroup) {
  cgroup.enter();
  const support::OtherHost::Stay stay(host);
  const support::TcpListener listener(support::OtherHost::v4, backend_port);
  channel.tell('r');
  for (;;) {
    const int accepted = ::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC);
    if (accepted < 0) continue;
    std::thread([accepted] {
      const Fd connection(accepted);
      const int on = 1;
      ::setsockopt(accepted, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
      for (char byte = 0; ::read(accepted, &byte, 1) == 1;)
        if (::write(accepted, &byte, 1) != 1) break;
    }).detach();
  }
}

/// What the redirect catches, unless the socket has our mark, or it is the sidecar's own.
class Redirect {
 public:
  Redirect() {
    support::shell(
        fmt::format("nft add table inet sidecar;"
                    "nft 'add chain inet sidecar output {{ type nat hook output priority -100; }}';"
                    "nft add rule inet sidecar output meta skuid {} return;"
                    "nft add rule inet sidecar output meta mark {} return;"
                    "nft add rule inet sidecar output meta l4proto tcp redirect to :{}",
                    sidecar_user, mark, sidecar_port));
  }
  ~Redirect() { support::run({"nft", "delete", "table", "inet", "sidecar"}); }
  Redirect(const Redirect&) = delete;
  Redirect& operator=(const Redirect&) = delete;
};

Fd connected(const std::string& address, std::uint16_t port, bool marked) {
  Fd fd = support::tcp_socket();
  if (marked && ::setsockopt(fd.get(), SOL_SOCKET, SO_MARK, &mark, sizeof mark) != 0)
    throw std::runtime_error("SO_MARK");
  if (const int error = support::connect_errno(fd.get(), address, port); error != 0)
    throw std::runtime_error(fmt::format("connect to {}:{}: errno {}", address, port, error));
  const int on = 1;
  ::setsockopt(fd.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  return fd;
}

void exchange(const Fd& fd) {
  char byte = 'x';
  if (::write(fd.get(), &byte, 1) != 1 || ::read(fd.get(), &byte, 1) != 1) throw std::runtime_error("no answer");
}

std::uint64_t cpu_microseconds(const support::Cgroup& cgroup) {
  std::ifstream file(cgroup.path() + "/cpu.stat");
  for (std::string key, value; file >> key >> value;)
    if (key == "usage_usec") return std::stoull(value);
  throw std::runtime_error("cpu.stat");
}

class Sidecar {
 public:
  Sidecar() : process_({"haproxy", "-db", "-f", directory_.write("sidecar.cfg", configuration())}, &cgroup_) {
    while (support::connect_errno(support::tcp_socket().get(), "127.0.0.1", sidecar_port) != 0)
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }

  const support::Cgroup& cgroup() const { return cgroup_; }

  /// Connections that have come to it, ever.
  std::uint64_t connections() const {
    const support::Finished shown =
        support::run({"curl", "-s", "--unix-socket", socket(), "http://sidecar/metrics?scope=frontend&no-maint"});
    const std::string key = "haproxy_frontend_connections_total{proxy=\"sidecar\"} ";
    const std::size_t at = shown.out.find(key);
    if (at == std::string::npos) throw std::runtime_error("the sidecar does not count");
    return std::stoull(shown.out.substr(at + key.size()));
  }

 private:
  std::string socket() const { return directory_.path() + "/stats.sock"; }
  std::string configuration() const {
    return fmt::format(
        "global\n  nbthread 1\n  uid {}\n"
        "defaults\n  timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n"
        "frontend sidecar\n  mode tcp\n  bind 0.0.0.0:{}\n  default_backend service\n"
        "backend service\n  mode tcp\n  server backend {}:{}\n"
        "frontend stats\n  mode http\n  bind unix@{}\n  http-request use-service prometheus-exporter\n",
        sidecar_user, sidecar_port, support::OtherHost::v4, backend_port, socket());
  }

  support::Cgroup cgroup_;
  support::TemporaryDirectory directory_;
  support::Process process_;
};

/// One way, measured once.
struct Figures {
  double connect, round_trip, cpu, sidecar_cpu, hops;
};

struct Settings {
  std::uint32_t rounds = 0, requests = 0, exchanges = 0;
};

struct Stage {
  const support::Cgroup& application;
  const support::Cgroup& backend;
  const Sidecar& sidecar;
};

double median(std::vector<double> values) {
  std::ranges::nth_element(values, values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2));
  return values[values.size() / 2];
}

Figures measure_once(const Stage& stage, const Settings& settings, const std::string& address, std::uint16_t port,
                     bool marked) {
  const auto cpu = [&] {
    return cpu_microseconds(stage.application) + cpu_microseconds(stage.backend) +
           cpu_microseconds(stage.sidecar.cgroup());
  };
  const std::uint64_t passed = stage.sidecar.connections(), used = cpu(),
                      sidecar_used = cpu_microseconds(stage.sidecar.cgroup());
  std::vector<double> connects, round_trips;
  for (std::uint32_t i = 0; i < settings.requests; ++i) {
    const auto start = Clock::now();
    exchange(connected(address, port, marked));
    connects.push_back(microseconds_since(start));
  }
  const double count = settings.requests;
  Figures figures{};
  figures.cpu = static_cast<double>(cpu() - used) / count;
  figures.sidecar_cpu = static_cast<double>(cpu_microseconds(stage.sidecar.cgroup()) - sidecar_used) / count;
  figures.hops = static_cast<double>(stage.sidecar.connections() - passed) / count;
  figures.connect = median(std::move(connects));
  const Fd fd = connected(address, port, marked);
  for (std::uint32_t i = 0; i < settings.exchanges; ++i) {
    const auto start = Clock::now();
    exchange(fd);
    round_trips.push_back(microseconds_since(start));
  }
  figures.round_trip = median(std::move(round_trips));
  return figures;
}

void row(const char* what, const std::vector<Figures>& rounds) {
  fmt::print("{:<34}", what);
  for (double Figures::* member :
       {&Figures::hops, &Figures::connect, &Figures::round_trip, &Figures::cpu, &Figures::sidecar_cpu}) {
    std::vector<double> values;
    for (const Figures& figures : rounds) values.push_back(figures.*member);
    std::ranges::sort(values);
    fmt::print("  {:>5.1f} {:>5.1f} {:>5.1f}", values.front(), values[values.size() / 2], values.back());
  }
  fmt::print("\n");
}

int measure(const Settings& settings) {
  const support::OtherHost host;
  const support::Cgroup application, backend;
  const support::Child server([&](const support::Channel& channel) { serve_echo(channel, host, backend); });
  server.channel().hear();
  const Sidecar sidecar;
  const Redirect redirect;
  const support::Plugin plugin;
  const std::string text = support::toml({{"service",
                                           vip,
                                           service_port,
                                           {{support::OtherHost::v4, backend_port}},
                                           "refuse",
                                           fmt::format("mark = {}", mark)}});
  const Stage stage{application, backend, sidecar};
  std::map<std::string, std::vector<Figures>> seen;
  application.enter();
  for (std::uint32_t round = 0; round < settings.rounds; ++round) {
    seen["through"].push_back(measure_once(stage, settings, vip, service_port, false));
    {
      support::Handle handle(plugin, {application.path(), {}, 0});
      support::require_ok(handle.load(text));
      support::require_ok(handle.attach());
      seen["past"].push_back(measure_once(stage, settings, vip, service_port, false));
    }
    seen["direct"].push_back(measure_once(stage, settings, support::OtherHost::v4, backend_port, true));
  }
  support::Cgroup::leave();
  fmt::print(
      "min, median, max of {} rounds; times in microseconds: a new connection with a request and its answer, a "
      "request\n"
      "on an open connection, CPU of application, sidecar and backend for a new one, the sidecar's part\n\n",
      settings.rounds);
  fmt::print("{:<34}  {:^17}  {:^17}  {:^17}  {:^17}  {:^17}\n", "", "sidecars passed", "new connection",
             "open connection", "CPU", "sidecar's CPU");
  row("through the sidecar", seen["through"]);
  row("past it: clusterip with `mark`", seen["past"]);
  row("to the backend's own address", seen["direct"]);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  Settings settings;
  po::options_description options("bench_sidecar: a request through a sidecar, and past it");
  auto add = options.add_options();
  add("rounds", po::value(&settings.rounds)->default_value(7), "rounds of each way, in turn");
  add("requests", po::value(&settings.requests)->default_value(1000), "new connections a round");
  add("exchanges", po::value(&settings.exchanges)->default_value(5000), "requests on an open one");
  return support::run_program("bench_sidecar", options, argc, argv, [&](const auto&) {
    if (settings.rounds == 0 || settings.requests == 0 || settings.exchanges == 0) return 2;
    return measure(settings);
  });
}
