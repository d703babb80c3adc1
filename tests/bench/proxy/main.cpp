// SPDX-License-Identifier: BSD-2-Clause
//
// The userspace engine beside its peers: a direct connection, HAProxy, HAProxy with splice, and nginx. Each trial runs
// one peer, freshly started, on a stage of its own; the peers take turns. Prints tables; docs/benchmarks.md explains
// them.
#include <fmt/format.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <boost/json.hpp>
#include <boost/program_options.hpp>
#include <chrono>
#include <cmath>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "tests/bench/proxy/measures.h"
#include "tests/bench/proxy/peers.h"
#include "tests/bench/proxy/report.h"
#include "tests/bench/proxy/stage.h"

namespace {

namespace po = boost::program_options;

struct Choice {
  std::vector<std::string> only;
  std::vector<std::string> measures;
  std::string fallback_proxy;
  std::string json;
  std::string congestion_control;
  unsigned rounds = 0;
  unsigned retries = 0;
  bool urgent = false;
  bench::Options options;
};

/// Those of `all` that `names` names, all when it names none. Throws for a name that nobody has.
template <class T>
std::vector<const T*> chosen(const std::vector<T>& all, const std::vector<std::string>& names) {
  for (const std::string& name : names) {
    if (std::ranges::find(all, name, &T::name) != all.end()) continue;
    std::string known;
    for (const T& one : all) known += " " + one.name;
    throw po::error(fmt::format("\"{}\" is none of:{}", name, known));
  }
  std::vector<const T*> result;
  for (const T& one : all)
    if (names.empty() || std::ranges::find(names, one.name) != names.end()) result.push_back(&one);
  return result;
}

/// A line for each of `peers` whose program is missing, and the others.
std::vector<const bench::Peer*> present(const std::vector<const bench::Peer*>& peers) {
  std::vector<const bench::Peer*> result;
  for (const bench::Peer* peer : peers) {
    if (peer->is_direct() || ::access(peer->program.c_str(), X_OK) == 0)
      result.push_back(peer);
    else
      fmt::print(stderr, "{} is left out: there is no program {}\n", peer->name, peer->program);
  }
  return result;
}

/// Nobody is to be limited by the descriptors that he may open.
void raise_descriptor_limit() {
  rlimit limit{};
  ::getrlimit(RLIMIT_NOFILE, &limit);
  limit.rlim_cur = limit.rlim_max;
  ::setrlimit(RLIMIT_NOFILE, &limit);
}

/// More CPUs than that, kept busy by others, make a trial doubtful.
constexpr double disturbing = 0.1;

std::string in_words(const bench::Measure& measure, const bench::Trial& trial) {
  if (!trial.error.empty()) return trial.error;
  std::string text = fmt::format("{:.{}f} {}", trial.figures.first, measure.first.decimals, measure.first.title);
  if (std::isfinite(trial.figures.second))
    text += fmt::format(", {:.{}f} {}", trial.figures.second, measure.second.decimals, measure.second.title);
  if (trial.figures.bystanders > disturbing) text += fmt::format(", others took {:.2f} CPUs", trial.figures.bystanders);
  if (trial.figures.failures > 0) text += fmt::format(", {} FAILURES", trial.figures.failures);
  return text;
}

/// One trial; while others disturb, up to `retries` more, of which the least disturbed counts, whatever its figures.
bench::Trial least_disturbed(const Choice& choice, const bench::Measure& measure, const bench::Peer& peer) {
  // a start, the warm-up, the load, and as much again for a slow machine
  const auto patience = std::chrono::ceil<std::chrono::seconds>(choice.options.seconds * 2) + std::chrono::seconds(60);
  const auto take = [&] {
    return bench::on_stage(choice.congestion_control, patience, [&] { return measure.take(peer, choice.options); });
  };
  bench::Trial best = take();
  for (unsigned i = 0; i < choice.retries && best.figures.bystanders > disturbing; ++i) {
    bench::Trial next = take();
    next.figures.failures += best.figures.failures;  // a failure is never forgotten
    if (!next.error.empty()) return next;
    if (next.figures.bystanders < best.figures.bystanders)
      best = std::move(next);
    else
      best.figures.failures = next.figures.failures;
  }
  return best;
}

/// Be scheduled before everything else on this machine, this session's other programs and other sessions' included.
void become_urgent() {
  // Nice values compare within an autogroup, and autogroups by their own. A new session is a new autogroup.
  ::setsid();  // fails for the leader of a process group, which has to make do with its group
  std::ofstream("/proc/self/autogroup") << "-20" << std::flush;
  if (::setpriority(PRIO_PROCESS, 0, -20) != 0) throw std::runtime_error("the priority cannot be raised");
}

std::vector<bench::Series> measure(const Choice& choice, const std::vector<const bench::Measure*>& measures,
                                   const std::vector<const bench::Peer*>& peers) {
  std::vector<bench::Series> all;
  for (const bench::Measure* measure : measures) {
    std::vector<const bench::Peer*> taking_part;
    for (const bench::Peer* peer : peers)
      if (peer->takes_part(measure->name)) taking_part.push_back(peer);
    std::vector<bench::Series> series;
    for (const bench::Peer* peer : taking_part)
      series.push_back({.measure = measure, .peer = peer->name, .trials = {}});

    for (unsigned round = 0; round < choice.rounds; ++round) {
      for (std::size_t i = 0; i < taking_part.size(); ++i) {
        series[i].trials.push_back(least_disturbed(choice, *measure, *taking_part[i]));
        fmt::print(stderr, "{} {}/{} {}: {}\n", measure->name, round + 1, choice.rounds, taking_part[i]->name,
                   in_words(*measure, series[i].trials.back()));
      }
    }
    std::ranges::move(series, std::back_inserter(all));
  }
  return all;
}

/// False when something failed.
bool run(const Choice& choice) {
  const std::vector<bench::Peer> all_peers = bench::all_peers(choice.fallback_proxy);
  const auto peers = present(chosen(all_peers, choice.only));
  const auto measures = chosen(bench::all_measures(), choice.measures);
  if (::geteuid() != 0) throw std::runtime_error("needs root: it makes namespaces");
  raise_descriptor_limit();
  if (choice.urgent) become_urgent();

  const std::vector<bench::Series> series = measure(choice, measures, peers);
  fmt::print("{}\n{} rounds, {} s each, {} threads for each proxy, {}\n", bench::machine(), choice.rounds,
             choice.options.seconds.count(), choice.options.threads, choice.congestion_control);
  std::cout << bench::tables(series);
  if (!choice.json.empty()) {
    std::ofstream file(choice.json);
    if (!(file << boost::json::serialize(bench::as_json(series, choice.options)) << '\n' << std::flush))
      throw std::runtime_error(choice.json + " cannot be written");
  }
  return !bench::failed(series);
}

}  // namespace

int main(int argc, char** argv) {
  Choice choice;
  double seconds = 0;
  po::options_description options("bench_proxy: the userspace engine beside its peers, on loopback");
  auto add = options.add_options();
  add("help", "show this text");
  add("only", po::value(&choice.only)->multitoken()->value_name("PEER..."),
      "peers: direct haproxy haproxy-splice nginx fallback_proxy fallback_proxy-vips; all by default");
  add("measure", po::value(&choice.measures)->multitoken()->value_name("MEASURE..."),
      "measures: bulk1 bulk8 short request idle listeners; all by default");
  add("rounds", po::value(&choice.rounds)->default_value(5), "rounds, in each of which every peer has its turn");
  add("seconds", po::value(&seconds)->default_value(2), "how long a load is measured");
  add("threads", po::value(&choice.options.threads)->default_value(2), "of each proxy");
  add("congestion-control", po::value(&choice.congestion_control)->default_value("reno"),
      "of every connection; bbr, the default of some hosts, paces loopback and hides every difference");
  add("fallback-proxy", po::value(&choice.fallback_proxy)->value_name("PATH"), "default: the one of this build");
  add("urgent", po::bool_switch(&choice.urgent), "take precedence over everything else on this machine: it is shared");
  add("retries", po::value(&choice.retries)->default_value(2),
      "more trials, at most, when others disturbed one; the least disturbed counts");
  add("json", po::value(&choice.json)->value_name("FILE"), "write every figure there too");
  try {
    po::variables_map given;
    po::store(po::parse_command_line(argc, argv, options), given);
    po::notify(given);
    if (given.contains("help")) {
      std::cout << options;
      return 0;
    }
    if (choice.rounds == 0 || choice.options.threads == 0 || !(seconds > 0 && seconds <= 60))
      throw po::error("at least one round and one thread, and at most 60 seconds");
    choice.options.seconds = std::chrono::duration<double>(seconds);
    const auto self = std::filesystem::read_symlink("/proc/self/exe");
    if (choice.fallback_proxy.empty())
      choice.fallback_proxy = self.parent_path() / "../../../fallback_proxy/fallback_proxy";
    choice.fallback_proxy = std::filesystem::absolute(choice.fallback_proxy).lexically_normal();
    return run(choice) ? 0 : 1;
  } catch (const po::error& error) {
    fmt::print(stderr, "bench_proxy: {}\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    fmt::print(stderr, "bench_proxy: {}\n", error.what());
    return 1;
  }
}
