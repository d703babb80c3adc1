// SPDX-License-Identifier: BSD-2-Clause
//
// What it costs to publish: filling the maps with many services, and changing one backend of one service among many and
// among few, in turn. Prints figures; judges nothing. Uses the fast path as a host does, through the C ABI.
#include <bpf/bpf.h>
#include <dlfcn.h>
#include <fmt/format.h>
#include <sys/resource.h>

#include <algorithm>
#include <boost/program_options.hpp>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "config/read_config.h"
#include "plugin/bpf_engine.h"
#include "plugin/include/clusterip.h"
#include "tests/support/cgroup.h"
#include "tests/support/program.h"

namespace {

namespace po = boost::program_options;
using Clock = std::chrono::steady_clock;

double milliseconds_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

std::string dotted(std::uint32_t address) {
  return fmt::format("{}.{}.{}.{}", address >> 24, address >> 16 & 255, address >> 8 & 255, address & 255);
}

/// Each service has a VIP of its own, 10.0.0.1 and up, and backends at 127.0.0.1.
std::string configuration(std::uint32_t services, std::uint32_t backends) {
  std::string text = fmt::format("[limits]\nservices = {}\nbackends = {}\n", services, services * backends);
  for (std::uint32_t service = 0; service < services; ++service) {
    text += fmt::format("[[service]]\nname = \"svc{}\"\nvip = \"{}\"\nport = 80\nbackends = [", service,
                        dotted(0x0a000001 + service));
    for (std::uint32_t backend = 0; backend < backends; ++backend) {
      text += fmt::format("{}\"127.0.0.1:{}\"", backend > 0 ? ", " : "", 1000 + backend);
    }
    text += "]\n";
  }
  return text;
}

struct Spread {
  double min, median, max;
};

Spread spread(std::vector<double> values) {
  std::ranges::sort(values);
  return {values.front(), values[values.size() / 2], values.back()};
}

void check(int result, const clusterip_error& error) {
  if (result != 0) {
    fmt::print(stderr, "bench_publish: {}\n", error.message);
    std::exit(1);
  }
}

/// A live fast path with this configuration.
struct Host {
  explicit Host(const std::string& text) {
    const clusterip_options options{sizeof options, cgroup.path().c_str(), nullptr, 0, 0};
    check(clusterip_open(&options, &handle, &error), error);
    check(clusterip_attach(handle, &error), error);
    check(clusterip_load_text(handle, text.data(), text.size(), "bench", &error), error);
  }
  ~Host() { clusterip_close(handle); }
  Host(const Host&) = delete;
  Host& operator=(const Host&) = delete;

  /// Microseconds of one clusterip_set_backends that changes the port of one of ten backends.
  double change(std::uint32_t service, std::uint16_t port) {
    std::vector<clusterip_backend> backends;
    for (std::uint16_t i = 0; i < 10; ++i) {
      backends.push_back({sizeof(clusterip_backend), "127.0.0.1", static_cast<std::uint16_t>(i == 0 ? port : 1000 + i),
                          0, 1, CLUSTERIP_ACTIVE});
    }
    const std::string name = "svc" + std::to_string(service);
    const auto start = Clock::now();
    check(clusterip_set_backends(handle, name.c_str(), backends.data(), backends.size(), &error), error);
    return milliseconds_since(start) * 1000;
  }

  support::Cgroup cgroup;
  clusterip* handle = nullptr;
  clusterip_error error{
      .size = sizeof(clusterip_error), .code = 0, .line = 0, .column = 0, .reserved = 0, .message = {}};
};

int measure(std::uint32_t services, std::uint32_t rounds, std::uint32_t changes) {
  if (services <= 10 || rounds == 0 || changes == 0) {
    fmt::print(stderr, "bench_publish: more than 10 services, and at least one round and one change\n");
    return 2;
  }
  const std::string many = configuration(services, 10);
  fmt::print("{} services of 10 backends, {:.1f} MB of TOML\n\n", services, static_cast<double>(many.size()) / 1e6);

  // Filling: the engine itself, to tell it from parsing.
  std::vector<double> parse;
  std::vector<double> fill;
  for (std::uint32_t round = 0; round < rounds; ++round) {
    const support::Cgroup cgroup;
    auto start = Clock::now();
    const auto config = config::read_config(many);
    parse.push_back(milliseconds_since(start));
    auto engine = plugin::BpfEngine::open({.cgroup = cgroup.path(), .pin = "", .engine_table = false});
    if (!config || !engine || !(*engine)->attach()) {
      fmt::print(stderr, "bench_publish: the fast path could not be attached\n");
      return 1;
    }
    start = Clock::now();
    if (const auto loaded = (*engine)->load(*config); !loaded) {
      fmt::print(stderr, "bench_publish: {}\n", loaded.error().message);
      return 1;
    }
    fill.push_back(milliseconds_since(start));
  }
  const auto row = [](const char* what, const Spread& of, const char* unit) {
    fmt::print("{:<52} {:>9.2f} {:>9.2f} {:>9.2f} {}\n", what, of.min, of.median, of.max, unit);
  };
  fmt::print("{:<52} {:>9} {:>9} {:>9}\n", "", "min", "median", "max");
  row("parse and validate", spread(parse), "ms");
  row("make and fill the maps, exchange the program", spread(fill), "ms");

  // One backend, among many and among few, in turn.
  Host large(many);
  Host small(configuration(10, 10));
  // `spread_out` picks all over the 50,000, whose memory is then in no cache; `warm` the same ten that `few` has.
  std::vector<double> spread_out;
  std::vector<double> warm;
  std::vector<double> few;
  std::vector<double> spread_out_ratios;
  std::vector<double> warm_ratios;
  for (std::uint32_t round = 0; round < rounds; ++round) {
    std::vector<double> taken[3];
    for (std::uint32_t i = 0; i < changes; ++i) {
      const auto port = static_cast<std::uint16_t>(2000 + (round * changes + i) % 60000);
      taken[0].push_back(large.change(10 + i * 7919 % (services - 10), port));
      taken[1].push_back(large.change(i % 10, port));
      taken[2].push_back(small.change(i % 10, port));
    }
    spread_out.insert(spread_out.end(), taken[0].begin(), taken[0].end());
    warm.insert(warm.end(), taken[1].begin(), taken[1].end());
    few.insert(few.end(), taken[2].begin(), taken[2].end());
    const double base = spread(taken[2]).median;
    spread_out_ratios.push_back(spread(taken[0]).median / base);
    warm_ratios.push_back(spread(taken[1]).median / base);
  }
  row("clusterip_set_backends among 10 services", spread(few), "us");
  row(fmt::format("the same ten services among {}", services).c_str(), spread(warm), "us");
  row(fmt::format("services all over the {}", services).c_str(), spread(spread_out), "us");
  row("ratio, the same ten", spread(warm_ratios), "");
  row("ratio, all over (memory in no cache)", spread(spread_out_ratios), "");

  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  fmt::print(
      "\nA call whose maximum is milliseconds has published at once and then waited for a grace period.\n"
      "peak memory of this process: {} MiB\n",
      usage.ru_maxrss / 1024);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  std::uint32_t services = 0;
  std::uint32_t rounds = 0;
  std::uint32_t changes = 0;
  po::options_description options("bench_publish: the cost of publishing services");
  auto add = options.add_options();
  add("services", po::value(&services)->default_value(50000), "services, of 10 backends each; more than 10");
  add("rounds", po::value(&rounds)->default_value(5), "rounds of filling, and of changing");
  add("changes", po::value(&changes)->default_value(2000), "changes of one backend a round");
  return support::run_program("bench_publish", options, argc, argv,
                              [&](const auto&) { return measure(services, rounds, changes); });
}
