// SPDX-License-Identifier: BSD-2-Clause
//
// What the running service costs and how quick it is: start, memory, a scrape of its metrics, and the time from a
// backend's end to the last connect that still met it.
#include <fmt/format.h>
#include <signal.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "tests/support/cgroup.h"
#include "tests/support/client.h"
#include "tests/support/environment.h"
#include "tests/support/fallback_proxy.h"
#include "tests/support/named_server.h"
#include "tests/support/process.h"
#include "tests/support/program.h"
#include "tests/support/tcp.h"
#include "tests/support/toml.h"

namespace {

namespace po = boost::program_options;
using Clock = std::chrono::steady_clock;
using support::Backend;
using support::RunningService;

double milliseconds_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

void row(const std::string& what, std::vector<double> values, const char* unit) {
  std::ranges::sort(values);
  fmt::print("{:<56} {:>9.1f} {:>9.1f} {:>9.1f} {}\n", what, values.front(), values[values.size() / 2], values.back(),
             unit);
}

std::shared_ptr<const support::FallbackProxy::Files> files(const support::Cgroup& cgroup, const std::string& text) {
  auto made = std::make_shared<support::FallbackProxy::Files>(
      fmt::format("cgroup = \"{}\"\npin = \"{}/clusterip\"\non_exit = \"detach\"\n", cgroup.path(), support::bpffs));
  made->write("[metrics]\nlisten = \"127.0.0.1:9464\"\n" + text);
  return made;
}

std::string services(std::uint32_t count, std::uint32_t backends) {
  std::string text = "[limits]\nservices = 70000\nbackends = 700000\n";
  for (std::uint32_t i = 0; i < count; ++i) {
    text += fmt::format("[[service]]\nname = \"service-{}\"\nvip = \"10.{}.{}.{}\"\nport = 80\nbackends = [", i,
                        96 + i / 65025, i / 255 % 255, i % 255 + 1);
    for (std::uint32_t k = 0; k < backends; ++k)
      text += fmt::format("\"10.200.{}.{}:{}\", ", i % 250, k + 1, 1000 + i / 250);
    text += "]\n";
  }
  return text;
}

void measure_start(const support::Cgroup& cgroup, std::uint32_t rounds, std::uint32_t count, std::uint32_t backends) {
  std::vector<double> start;
  std::vector<double> scrape;
  std::vector<double> size;
  std::vector<double> resident;
  for (std::uint32_t i = 0; i < rounds; ++i) {
    const auto made = files(cgroup, services(count, backends));
    const auto began = Clock::now();
    RunningService service(made);
    start.push_back(milliseconds_since(began));
    const auto asked = Clock::now();
    const auto got =
        support::run({"curl", "-sS", "-o", "/dev/null", "-w", "%{size_download}", "http://127.0.0.1:9464/metrics"});
    scrape.push_back(milliseconds_since(asked));
    size.push_back(std::stod(got.out) / 1e6);
    resident.push_back(static_cast<double>(service.resident_bytes()) / 1048576);
    service.terminate();
  }
  const std::string what = fmt::format("{} services of {} backends", count, backends);
  row(what + ": start until all serve", start, "ms");
  row(what + ": scrape", scrape, "ms");
  row(what + ": what it brings", size, "MB");
  row(what + ": resident", resident, "MiB");
}

/// From the end of one of two backends to the end of the last connect that met it.
void measure_flip(const support::Cgroup& cgroup, std::uint32_t rounds, const char* engine, int interval_ms) {
  constexpr const char* vip = "127.0.1.1";
  std::vector<double> last_failures;
  for (std::uint32_t i = 0; i < rounds; ++i) {
    const support::NamedServer stays("stays");
    auto goes = std::make_unique<support::NamedServer>("goes");
    const std::string text = support::proxy_toml(
        {{"web",
          vip,
          80,
          {backend(stays), backend(*goes)},
          "refuse",
          fmt::format("engine = \"{}\"\npolicy = \"round_robin\"\nhealth = {{ interval = \"{}ms\", fall = 1 }}\n",
                      engine, interval_ms)}});
    RunningService service(files(cgroup, text));
    while (goes->accepted() < 3) support::ask(vip, 80);
    goes.reset();
    const auto ended = Clock::now();
    double last = 0;
    while (milliseconds_since(ended) < 5 * interval_ms) {
      if (support::ask(vip, 80).error != 0) last = milliseconds_since(ended);
    }
    last_failures.push_back(last);
    service.terminate();
  }
  row(fmt::format("{}: last failed connect after a backend's end, interval {} ms", engine, interval_ms), last_failures,
      "ms");
}

int measure(std::uint32_t rounds, std::uint32_t many) {
  const support::Cgroup cgroup;
  cgroup.enter();
  fmt::print("{:<56} {:>9} {:>9} {:>9}\n", "", "min", "median", "max");
  measure_start(cgroup, rounds, 10, 3);
  measure_start(cgroup, rounds, 10000, 3);
  measure_start(cgroup, rounds, many, 10);
  measure_flip(cgroup, rounds, "bpf", 200);
  fmt::print("\nThe userspace engine tries another backend: no connect fails.\n");
  measure_flip(cgroup, rounds, "userspace", 200);
  support::Cgroup::leave();
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  std::uint32_t rounds = 0;
  std::uint32_t many = 0;
  po::options_description options("bench_service: the running service");
  auto add = options.add_options();
  add("rounds", po::value(&rounds)->default_value(5), "rounds of each figure");
  add("services", po::value(&many)->default_value(20000), "services of 10 backends, for the largest start");
  return support::run_program("bench_service", options, argc, argv, [&](const auto&) { return measure(rounds, many); });
}
