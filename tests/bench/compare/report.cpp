// SPDX-License-Identifier: BSD-2-Clause
#include "tests/bench/compare/report.h"

#include <fmt/format.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <boost/json.hpp>
#include <cmath>
#include <fstream>
#include <optional>
#include <string_view>

namespace bench {
namespace {

namespace json = boost::json;

/// What one of ours is to reach.
struct Goal {
  std::string_view measure;
  std::size_t column = 0;
  std::string_view peer;
  std::string_view to;    // a peer, in the same rounds; or another measure, of the same peer; or empty: an amount
  bool at_least = false;  // else at most
  double bound = 0;
  bool of_ratios = false;  // of another measure: each figure as a ratio to `direct`, which costs more there, too
};

constexpr std::string_view direct = "direct";

constexpr Goal goals[] = {
    {"connect", 0, "bpf", "direct", false, 1.03},
    {"connect", 1, "bpf", "direct", false, 1.03},
    {"connect", 0, "bpf-names", "direct", false, 1.08},
    {"connect", 1, "bpf-names", "direct", false, 1.08},
    {"miss", 0, "bpf", "direct", false, 1.01},
    {"miss", 1, "bpf", "direct", false, 1.01},
    {"miss", 0, "bpf-names", "direct", false, 1.01},
    {"miss", 1, "bpf-names", "direct", false, 1.01},
    {"request1", 0, "bpf", "direct", true, 0.98},
    {"request1", 0, "bpf-names", "direct", true, 0.98},
    {"request1024", 0, "bpf", "direct", true, 0.98},
    {"request1024", 0, "bpf-names", "direct", true, 0.98},
    {"bulk1", 0, "bpf", "direct", true, 0.98},
    {"bulk1", 0, "bpf-names", "direct", true, 0.98},
    {"bulk8", 0, "bpf", "direct", true, 0.98},
    {"bulk8", 0, "bpf-names", "direct", true, 0.98},
    {"services-50000", 1, "bpf", "direct", false, 1.12},
    {"services-50000", 1, "bpf-names", "direct", false, 1.20},
    {"update-50000", 2, "bpf", "", false, 1000},
    {"update-50000", 2, "bpf-names", "", false, 1000},
    {"start-50000", 0, "bpf", "", false, 2.5},
    {"start-50000", 1, "bpf", "", false, 400},
    {"start-50000", 0, "bpf-names", "", false, 2.5},
    {"start-50000", 1, "bpf-names", "", false, 400},
    {"bulk1", 0, "userspace", "direct", true, 0.65},
    {"bulk1", 2, "userspace", "", false, 0.10},
    {"rate", 2, "userspace", "", false, 60},
    {"idle", 0, "userspace", "", false, 1.2},
    {"listeners", 0, "userspace", "", false, 1},
    {"listeners", 1, "userspace", "", false, 15},
    // and what no table of one measure shows
    {"bulk1", 0, "userspace", "haproxy", true, 2.2},
    {"bulk1", 0, "userspace", "haproxy-splice", true, 1.3},
    {"bulk8", 0, "userspace", "haproxy", true, 1.5},
    {"bulk8", 0, "userspace", "haproxy-splice", true, 1.1},
    {"rate", 0, "userspace", "haproxy", true, 1.1},
    {"request1024", 0, "userspace", "haproxy", true, 1.0},
    {"request1024", 2, "userspace", "haproxy", false, 1.0},
    {"update-50000", 0, "bpf", "update-10", false, 1.0},
    {"update-50000", 0, "bpf-names", "update-10", false, 1.0},
    {"backends-1000", 1, "bpf", "backends-1", false, 1.0, true},
    {"backends-1000", 1, "bpf-names", "backends-1", false, 1.0, true},
};

struct Spread {
  double min = not_measured;
  double median = not_measured;
  double max = not_measured;
};

double median_of(std::vector<double>& values) {
  std::ranges::sort(values);
  const std::size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

/// Of the values that are numbers.
Spread spread(std::vector<double> values) {
  std::erase_if(values, [](double value) { return !std::isfinite(value); });
  if (values.empty()) return {};
  const double median = median_of(values);
  return {.min = values.front(), .median = median, .max = values.back()};
}

double figure(const Trial& trial, std::size_t column) {
  return trial.error.empty() ? trial.figures.values[column] : not_measured;
}

Spread spread(const Series& series, std::size_t column) {
  std::vector<double> values;
  for (const Trial& trial : series.trials) values.push_back(figure(trial, column));
  return spread(std::move(values));
}

/// Of one round: turns that followed each other are compared, since what disturbs one disturbs the other.
double ratio(const Trial& of, const Trial& to, std::size_t column, bool least) {
  if (least || of.turns.size() != to.turns.size()) return figure(of, column) / figure(to, column);
  std::vector<double> values;
  for (std::size_t i = 0; i < of.turns.size(); ++i)
    values.push_back(of.turns[i].values[column] / to.turns[i].values[column]);
  return spread(std::move(values)).median;
}

/// Over the rounds.
Spread ratio(const Series& of, const Series& to, std::size_t column) {
  std::vector<double> values;
  for (std::size_t i = 0; i < std::min(of.trials.size(), to.trials.size()); ++i)
    values.push_back(ratio(of.trials[i], to.trials[i], column, of.measure->columns[column].least));
  return spread(std::move(values));
}

const Series* find(const std::vector<Series>& series, std::string_view measure, std::string_view peer) {
  const auto found =
      std::ranges::find_if(series, [&](const Series& one) { return one.measure->name == measure && one.peer == peer; });
  return found == series.end() ? nullptr : &*found;
}

/// One peer's figure, or its ratio to `direct`; NaN when that was not measured.
Spread spread_of(const Goal& goal, std::string_view measure, const std::vector<Series>& series) {
  const Series* of = find(series, measure, goal.peer);
  if (of == nullptr) return {};
  if (!goal.of_ratios) return spread(*of, goal.column);
  const Series* base = find(series, measure, direct);
  return base == nullptr ? Spread{} : ratio(*of, *base, goal.column);
}

/// What was reached, if it was measured. Rounds of two measures have nothing to do with each other: there it is from
/// the least of the one to the most of the other.
std::optional<Spread> reached(const Goal& goal, const std::vector<Series>& series) {
  const Series* of = find(series, goal.measure, goal.peer);
  if (of == nullptr) return {};
  Spread value = spread_of(goal, goal.measure, series);
  if (const Series* peer = find(series, goal.measure, goal.to); peer != nullptr) {
    value = ratio(*of, *peer, goal.column);
  } else if (!goal.to.empty()) {
    const Spread base = spread_of(goal, goal.to, series);
    value = {.min = value.min / base.max, .median = value.median / base.median, .max = value.max / base.min};
  }
  return std::isfinite(value.median) ? std::optional(value) : std::nullopt;
}

/// What is compared.
std::string figure_of(const Goal& goal, const std::vector<Series>& series) {
  const Column& column = find(series, goal.measure, goal.peer)->measure->columns[goal.column];
  return column.title + (goal.of_ratios ? ", as a ratio to direct" : "");
}

bool is_met(const Goal& goal, double value) { return goal.at_least ? value >= goal.bound : value <= goal.bound; }

/// Of the rounds, not only of their median.
std::string_view verdict(const Goal& goal, const Spread& value) {
  const bool least = is_met(goal, value.min);
  const bool most = is_met(goal, value.max);
  return least && most ? "met" : least || most ? "within noise" : "missed";
}

std::string in_words(const Goal& goal, const Spread& value) {
  return fmt::format("{} {}: {}", goal.at_least ? ">=" : "<=", goal.bound, verdict(goal, value));
}

std::string number(double value, int decimals, int width) {
  return std::isfinite(value) ? fmt::format("{:>{}.{}f}", value, width, decimals) : fmt::format("{:>{}}", "", width);
}

std::string cells(const Spread& of, int decimals) {
  return number(of.min, decimals, 11) + number(of.median, decimals, 11) + number(of.max, decimals, 11);
}

std::uint64_t failures(const Series& series) {
  std::uint64_t sum = 0;
  for (const Trial& trial : series.trials) sum += trial.figures.failures;
  return sum;
}

/// Whatever makes figures doubtful.
std::string doubts(const std::vector<const Series*>& all) {
  std::string text;
  std::vector<double> others;
  for (const Series* one : all) {
    if (failures(*one) > 0) text += fmt::format("  FAILURES of {}: {}\n", one->peer, failures(*one));
    for (std::size_t round = 0; round < one->trials.size(); ++round) {
      const Trial& trial = one->trials[round];
      others.push_back(trial.figures.others);
      if (!trial.error.empty()) text += fmt::format("  FAILED: {}, round {}: {}\n", one->peer, round + 1, trial.error);
    }
  }
  const Spread seen = spread(std::move(others));
  if (std::isfinite(seen.median))
    text +=
        fmt::format("  CPUs that others kept busy meanwhile: median {:.2f}, at most {:.2f}\n", seen.median, seen.max);
  return text;
}

json::value number_or_null(double value) { return std::isfinite(value) ? json::value(value) : json::value(nullptr); }

json::object as_json(const Spread& of) {
  return {{"min", number_or_null(of.min)}, {"median", number_or_null(of.median)}, {"max", number_or_null(of.max)}};
}

json::object as_json(const Series& one, const Series* base) {
  json::array figures;
  json::array ratios;
  for (std::size_t column = 0; column < one.measure->columns.size(); ++column) {
    figures.push_back(as_json(spread(one, column)));
    if (base != nullptr) ratios.push_back(as_json(ratio(one, *base, column)));
  }
  json::array rounds;
  for (const Trial& trial : one.trials) {
    json::array values;
    for (std::size_t column = 0; column < one.measure->columns.size(); ++column)
      values.push_back(number_or_null(figure(trial, column)));
    rounds.push_back(json::object{{"values", std::move(values)},
                                  {"others", number_or_null(trial.figures.others)},
                                  {"failures", trial.figures.failures},
                                  {"error", trial.error}});
  }
  return {{"peer", one.peer},
          {"figures", std::move(figures)},
          {"ratios", std::move(ratios)},
          {"rounds", std::move(rounds)}};
}

}  // namespace

Trial taken_together(const Measure& measure, const std::vector<Figures>& turns) {
  Trial trial{.figures = {}, .turns = turns, .error = {}};
  for (std::size_t column = 0; column < measure.columns.size(); ++column) {
    std::vector<double> values;
    for (const Figures& turn : turns) values.push_back(turn.values[column]);
    const Spread of = spread(std::move(values));
    trial.figures.values[column] = measure.columns[column].least ? of.min : of.median;
  }
  std::vector<double> others;
  for (const Figures& turn : turns) {
    others.push_back(turn.others);
    trial.figures.failures += turn.failures;
  }
  trial.figures.others = spread(std::move(others)).median;
  return trial;
}

std::string machine() {
  utsname kernel{};
  ::uname(&kernel);
  std::string model = "unknown";
  std::ifstream cpus("/proc/cpuinfo");
  for (std::string line; std::getline(cpus, line);) {
    if (!line.starts_with("model name")) continue;
    model = line.substr(line.find(':') + 2);
    break;
  }
  const double memory = static_cast<double>(::sysconf(_SC_PHYS_PAGES)) * static_cast<double>(::sysconf(_SC_PAGE_SIZE));
  return fmt::format("Linux {}, {} CPUs ({}), {:.1f} GiB", kernel.release, ::sysconf(_SC_NPROCESSORS_ONLN), model,
                     memory / (1 << 30));
}

bool failed(const std::vector<Series>& series) {
  return std::ranges::any_of(series, [](const Series& one) {
    return failures(one) > 0 ||
           std::ranges::any_of(one.trials, [](const Trial& trial) { return !trial.error.empty(); });
  });
}

std::string table(const Measure& measure, const std::vector<Series>& series) {
  std::vector<const Series*> all;
  for (const Series& one : series)
    if (one.measure == &measure) all.push_back(&one);
  if (all.empty()) return {};
  const Series* base = find(series, measure.name, direct);
  std::string text = fmt::format("\n{}: {}\n", measure.name, measure.title);
  for (std::size_t column = 0; column < measure.columns.size(); ++column) {
    const Column& shown = measure.columns[column];
    text += fmt::format("  {:<26}{:>11}{:>11}{:>11}", shown.title, "min", "median", "max");
    text += base == nullptr ? "\n" : fmt::format("  to direct:{:>8}{:>11}{:>11}\n", "min", "median", "max");
    for (const Series* one : all) {
      const Spread of = spread(*one, column);
      if (!std::isfinite(of.median)) continue;
      std::string line = fmt::format("  {:<26}{}", one->peer, cells(of, shown.decimals));
      if (base != nullptr) line += one == base ? "" : "       " + cells(ratio(*one, *base, column), 3);
      for (const Goal& goal : goals) {
        if (goal.measure != measure.name || goal.column != column || goal.peer != one->peer) continue;
        if (!goal.to.empty() && goal.to != direct) continue;
        if (const auto value = reached(goal, series)) line += "   " + in_words(goal, *value);
      }
      text += line + '\n';
    }
  }
  return text + doubts(all);
}

std::string other_goals(const std::vector<Series>& series) {
  std::string text;
  for (const Goal& goal : goals) {
    if (goal.to.empty() || goal.to == direct) continue;
    const auto value = reached(goal, series);
    if (!value) continue;
    text += fmt::format("  {:<80}{:>8.3f}   {}\n",
                        fmt::format("{} of {}, {} to {}", figure_of(goal, series), goal.measure, goal.peer, goal.to),
                        value->median, in_words(goal, *value));
  }
  return text.empty() ? text : "\nbetween measures, and to peers other than direct\n" + text;
}

json::value as_json(const std::vector<Series>& series, const Options& options) {
  json::array measured;
  for (const Measure& measure : all_measures()) {
    json::array peers;
    for (const Series& one : series)
      if (one.measure == &measure) peers.push_back(as_json(one, find(series, measure.name, direct)));
    if (peers.empty()) continue;
    json::array columns;
    for (const Column& column : measure.columns)
      columns.push_back(json::object{{"title", column.title}, {"decimals", column.decimals}});
    measured.push_back(json::object{{"measure", measure.name},
                                    {"title", measure.title},
                                    {"columns", std::move(columns)},
                                    {"peers", std::move(peers)}});
  }
  json::array reached_goals;
  for (const Goal& goal : goals) {
    const auto value = reached(goal, series);
    if (!value) continue;
    reached_goals.push_back(json::object{{"measure", goal.measure},
                                         {"figure", figure_of(goal, series)},
                                         {"peer", goal.peer},
                                         {"to", goal.to},
                                         {"goal", fmt::format("{} {}", goal.at_least ? ">=" : "<=", goal.bound)},
                                         {"reached", as_json(*value)},
                                         {"met", is_met(goal, value->median)},
                                         {"verdict", verdict(goal, *value)}});
  }
  const std::vector<Peer> everybody = all_peers();
  json::object whole;
  for (const Measure& measure : all_measures()) {
    json::array peers;
    for (const Peer& peer : everybody)
      if (measure.has(peer)) peers.push_back(json::value(peer.name));
    whole[measure.name] = std::move(peers);
  }
  return json::object{{"machine", machine()},
                      {"stage", options.stage},
                      {"congestion_control", options.congestion_control},
                      {"quick", options.quick},
                      {"rounds", options.rounds},
                      {"turns", options.turns},
                      {"seconds", options.seconds.count()},
                      {"threads", options.threads},
                      {"whole", std::move(whole)},
                      {"measured", std::move(measured)},
                      {"goals", std::move(reached_goals)}};
}

}  // namespace bench
