// SPDX-License-Identifier: BSD-2-Clause
//
// Our engines beside what one would pick instead, on the same work. Each peer has a stage of its own, and they take
// turns. Prints tables; tests/bench/compare/run builds and calls this, docs/benchmarks.md explains what comes out.
#include <fmt/format.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <boost/json.hpp>
#include <boost/program_options.hpp>
#include <chrono>
#include <cmath>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <ranges>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "tests/bench/compare/measures.h"
#include "tests/bench/compare/peers.h"
#include "tests/bench/compare/report.h"
#include "tests/bench/compare/stage.h"
#include "tests/support/cgroup.h"
#include "tests/support/tcp.h"

namespace {

namespace po = boost::program_options;

struct Choice {
  std::vector<std::string> measures;
  std::vector<std::string> peers;
  std::string json;
  bench::Options options;
};

std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> words;
  for (const auto& word : std::views::split(list, ',')) words.emplace_back(word.begin(), word.end());
  std::erase(words, "");
  return words;
}

/// Those of `all` that `names` names. Throws for a name that nobody has.
template <class T, class Names>
std::vector<const T*> chosen(const std::vector<T>& all, const std::vector<std::string>& names, const Names& has) {
  std::vector<const T*> result;
  std::vector<std::string> unknown = names;
  for (const T& one : all) {
    const auto named = [&](const std::string& name) { return has(one, name); };
    if (names.empty() || std::ranges::any_of(names, named)) result.push_back(&one);
    std::erase_if(unknown, named);
  }
  if (unknown.empty()) return result;
  std::string known;
  for (const T& one : all) known += " " + one.name;
  throw po::error(fmt::format("\"{}\" is none of:{}", unknown.front(), known));
}

/// A line for each of `peers` who lacks something, and the others.
std::vector<const bench::Peer*> present(const std::vector<const bench::Peer*>& peers) {
  std::vector<const bench::Peer*> result;
  for (const bench::Peer* peer : peers) {
    const auto missing = std::ranges::find_if(
        peer->needs, [](const std::string& needed) { return ::access(needed.c_str(), R_OK) != 0; });
    if (missing == peer->needs.end())
      result.push_back(peer);
    else
      fmt::print(stderr, "{} is left out: there is no {}\n", peer->name, *missing);
  }
  return result;
}

std::string in_words(const bench::Measure& measure, const bench::Trial& trial) {
  if (!trial.error.empty()) return "FAILED: " + trial.error;
  std::string text;
  for (std::size_t i = 0; i < measure.columns.size(); ++i) {
    if (!std::isfinite(trial.figures.values[i])) continue;
    const auto& column = measure.columns[i];
    text +=
        fmt::format("{}{:.{}f} {}", text.empty() ? "" : ", ", trial.figures.values[i], column.decimals, column.title);
  }
  if (trial.figures.failures > 0) text += fmt::format(", {} FAILURES", trial.figures.failures);
  return text;
}

/// One peer in one round.
class Part {
 public:
  Part(const Choice& choice, const bench::Measure& measure, const bench::Peer& peer) : measure_(measure) {
    attempt([&] {
      stage_ = std::make_unique<bench::Stage>(
          choice.options.congestion_control, choice.options.stage == "veth",
          [&](const bench::Place& place) { return measure.set_up(peer, choice.options, place); });
    });
  }
  void turn() {
    if (stage_) attempt([&] { turns_.push_back(stage_->turn()); });
  }
  bench::Trial trial() const {
    if (!error_.empty()) return {.figures = {}, .turns = {}, .error = error_};
    return bench::taken_together(measure_, turns_);
  }

 private:
  template <class Action>
  void attempt(const Action& action) {
    try {
      action();
    } catch (const bench::Interrupted&) {
      throw;
    } catch (const std::exception& error) {
      error_ = error.what();
      stage_.reset();
    }
  }

  const bench::Measure& measure_;
  std::unique_ptr<bench::Stage> stage_;
  std::vector<bench::Figures> turns_;
  std::string error_;
};

/// All peers in one round, turn by turn. The order is reversed each time, so that nobody always comes first.
std::vector<bench::Trial> one_round(const Choice& choice, const bench::Measure& measure,
                                    const std::vector<const bench::Peer*>& peers) {
  std::vector<std::unique_ptr<Part>> parts;
  for (const bench::Peer* peer : peers) parts.push_back(std::make_unique<Part>(choice, measure, *peer));
  const std::size_t many = choice.options.turns;
  const std::size_t turns = measure.turns == bench::Turns::many   ? many
                            : measure.turns == bench::Turns::some ? std::max<std::size_t>(many / 4, 1)
                                                                  : 1;
  for (std::size_t turn = 0; turn < turns; ++turn) {
    for (const auto& part : parts) part->turn();
    std::ranges::reverse(parts);
  }
  if (turns % 2 == 1) std::ranges::reverse(parts);
  std::vector<bench::Trial> trials;
  for (const auto& part : parts) trials.push_back(part->trial());
  return trials;
}

/// Rather before anything is measured than after.
void check_json(const Choice& choice) {
  if (!choice.json.empty() && !std::ofstream(choice.json, std::ios::app))
    throw po::error(choice.json + " cannot be written");
}

/// After each measure, so that an interrupt loses one of them at most.
void write_json(const Choice& choice, const std::vector<bench::Series>& series) {
  if (choice.json.empty()) return;
  std::ofstream file(choice.json);
  if (!(file << boost::json::serialize(bench::as_json(series, choice.options)) << '\n' << std::flush))
    throw std::runtime_error(choice.json + " cannot be written");
}

std::vector<bench::Series> measure(const Choice& choice, const std::vector<const bench::Measure*>& measures,
                                   const std::vector<const bench::Peer*>& peers) {
  std::vector<bench::Series> all;
  for (const bench::Measure* measure : measures) {
    const auto begin = std::chrono::steady_clock::now();
    std::vector<const bench::Peer*> taking_part;
    std::ranges::copy_if(peers, std::back_inserter(taking_part),
                         [&](const bench::Peer* peer) { return measure->has(*peer); });
    std::vector<bench::Series> series;
    for (const bench::Peer* peer : taking_part)
      series.push_back({.measure = measure, .peer = peer->name, .trials = {}});
    for (unsigned round = 0; round < choice.options.rounds; ++round) {
      const std::vector<bench::Trial> trials = one_round(choice, *measure, taking_part);
      for (std::size_t i = 0; i < trials.size(); ++i) {
        series[i].trials.push_back(trials[i]);
        fmt::print(stderr, "{} {}/{} {}: {}\n", measure->name, round + 1, choice.options.rounds, taking_part[i]->name,
                   in_words(*measure, trials[i]));
      }
    }
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    std::cout << bench::table(*measure, series) << std::flush;
    fmt::print(stderr, "{} took {:.1f} s\n", measure->name, took.count());
    std::ranges::move(series, std::back_inserter(all));
    write_json(choice, all);
  }
  return all;
}

/// False when something failed.
bool run(const Choice& choice) {
  const std::vector<bench::Peer> all_peers = bench::all_peers();
  auto measures = chosen(
      bench::all_measures(), choice.measures,
      [](const bench::Measure& one, const std::string& name) { return one.name == name || one.group() == name; });
  if (choice.options.quick && choice.measures.empty())
    std::erase_if(measures, [](const bench::Measure* one) { return !one->for_quick; });
  const auto peers = present(chosen(all_peers, choice.peers,
                                    [](const bench::Peer& one, const std::string& name) { return one.name == name; }));
  if (::geteuid() != 0) throw std::runtime_error("needs root: it makes namespaces");
  check_json(choice);
  support::raise_descriptor_limit();
  support::remove_stale_cgroups();
  bench::catch_interrupts();

  std::cout << fmt::format("{}\n{} rounds of {} turns, loads of {} s; {} threads for each proxy; {}, {}\n",
                           bench::machine(), choice.options.rounds, choice.options.turns,
                           choice.options.seconds.count(), choice.options.threads, choice.options.stage,
                           choice.options.congestion_control);
  const std::vector<bench::Series> series = measure(choice, measures, peers);
  std::cout << bench::other_goals(series);
  return !bench::failed(series);
}

}  // namespace

int main(int argc, char** argv) {
  Choice choice;
  std::string only;
  std::string peers;
  double seconds = 0;
  po::options_description options("bench_compare: our engines beside their peers");
  auto add = options.add_options();
  add("help", "show this text");
  add("only", po::value(&only)->value_name("TEST[,...]"),
      "of connect, miss, rate, request1, request1024, bulk1, bulk8, services, backends, udp, udpmiss, idle, listeners, "
      "update, reload, start; or one of a group, like services-1000");
  add("peers", po::value(&peers)->value_name("PEER[,...]"),
      "of direct, bpf, bpf-names, nftables, iptables, userspace, haproxy, haproxy-splice, nginx");
  add("quick", po::bool_switch(&choice.options.quick), "few and short rounds: under a minute, and rough figures");
  add("rounds", po::value(&choice.options.rounds)->value_name("N"), "rounds; 5, or 2 with --quick");
  add("turns", po::value(&choice.options.turns)->value_name("N"),
      "turns of milliseconds in a round; 20, or 8 with --quick. Loads have a quarter");
  add("seconds", po::value(&seconds)->value_name("S"), "how long a load is measured in each turn; 0.25, or 0.1");
  add("threads", po::value(&choice.options.threads)->value_name("N")->default_value(2), "of each proxy");
  add("stage", po::value(&choice.options.stage)->value_name("veth|loopback")->default_value("veth"),
      "where the backends are: at the far end of a virtual cable, or behind the clients' own loopback");
  add("congestion-control", po::value(&choice.options.congestion_control)->value_name("NAME")->default_value("reno"),
      "of every connection; bbr, the default of some hosts, paces what never leaves the machine");
  add("json", po::value(&choice.json)->value_name("FILE"), "write every figure there too");
  try {
    if (argc == 4 && std::string_view(argv[1]) == bench::host_command) {
      bench::serve_as_host(argv[2], argv[3]);
      return 0;
    }
    po::variables_map given;
    // An option is what it says, not what it begins with.
    const int style = po::command_line_style::default_style & ~po::command_line_style::allow_guessing;
    po::store(po::parse_command_line(argc, argv, options, style), given);
    po::notify(given);
    if (given.contains("help")) {
      std::cout << options;
      return 0;
    }
    const bool quick = choice.options.quick;
    if (!given.contains("rounds")) choice.options.rounds = quick ? 2 : 5;
    if (!given.contains("turns")) choice.options.turns = quick ? 8 : 20;
    if (!given.contains("seconds")) seconds = quick ? 0.1 : 0.25;
    const auto is_number = [](std::size_t value) { return value >= 1 && value <= 1000; };  // -1 is read as a large one
    if (!is_number(choice.options.rounds) || !is_number(choice.options.turns) || !is_number(choice.options.threads) ||
        !(seconds > 0 && seconds <= 60))
      throw po::error("1 to 1000 rounds, turns and threads, and at most 60 seconds");
    if (choice.options.stage != "veth" && choice.options.stage != "loopback")
      throw po::error("a stage is veth or loopback");
    choice.options.seconds = std::chrono::duration<double>(seconds);
    choice.measures = split(only);
    choice.peers = split(peers);
    return run(choice) ? 0 : 1;
  } catch (const po::error& error) {
    fmt::print(stderr, "bench_compare: {}\n", error.what());
    return 2;
  } catch (const bench::Interrupted&) {
    fmt::print(stderr, "bench_compare: interrupted\n");
    return 130;
  } catch (const std::exception& error) {
    fmt::print(stderr, "bench_compare: {}\n", error.what());
    return 1;
  }
}
