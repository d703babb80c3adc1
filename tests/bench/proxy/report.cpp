// SPDX-License-Identifier: BSD-2-Clause
#include "tests/bench/proxy/report.h"

#include <fmt/format.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <boost/json.hpp>
#include <cmath>
#include <fstream>
#include <functional>
#include <string_view>

namespace bench {
namespace {

namespace json = boost::json;

/// What fallback_proxy is to reach: a ratio to a peer, or an amount when `peer` is empty.
struct Goal {
  std::string_view measure;
  bool second = false;  // which of the measure's figures
  std::string_view peer;
  bool at_least = false;  // else at most
  double bound = 0;
};

constexpr std::string_view subject = "fallback_proxy";

constexpr Goal goals[] = {
    {.measure = "bulk1", .peer = "direct", .at_least = true, .bound = 0.65},
    {.measure = "bulk1", .peer = "haproxy", .at_least = true, .bound = 2.2},
    {.measure = "bulk1", .peer = "haproxy-splice", .at_least = true, .bound = 1.3},
    {.measure = "bulk1", .second = true, .peer = "", .bound = 0.10},
    {.measure = "bulk8", .peer = "haproxy", .at_least = true, .bound = 1.5},
    {.measure = "bulk8", .peer = "haproxy-splice", .at_least = true, .bound = 1.1},
    {.measure = "short", .peer = "haproxy", .at_least = true, .bound = 1.1},
    {.measure = "short", .second = true, .peer = "", .bound = 60},
    {.measure = "request", .peer = "haproxy", .at_least = true, .bound = 1.0},
    {.measure = "request", .second = true, .peer = "haproxy", .bound = 1.0},
    {.measure = "idle", .peer = "", .bound = 1.2},
    {.measure = "listeners", .peer = "", .bound = 1},
    {.measure = "listeners", .second = true, .peer = "", .bound = 15},
};

double figure(const Trial& trial, bool second) {
  if (!trial.error.empty()) return std::nan("");
  return second ? trial.figures.second : trial.figures.first;
}

struct Spread {
  double min = std::nan("");
  double median = std::nan("");
  double max = std::nan("");
};

/// Of the values that are numbers.
Spread spread(std::vector<double> values) {
  std::erase_if(values, [](double value) { return !std::isfinite(value); });
  if (values.empty()) return {};
  std::ranges::sort(values);
  const std::size_t middle = values.size() / 2;
  const double median = values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
  return {.min = values.front(), .median = median, .max = values.back()};
}

Spread spread(const Series& series, bool second) {
  std::vector<double> values;
  for (const Trial& trial : series.trials) values.push_back(figure(trial, second));
  return spread(std::move(values));
}

/// Of the same round each: what disturbs a round disturbs both.
Spread ratio(const Series& of, const Series& to, bool second) {
  std::vector<double> values;
  for (std::size_t i = 0; i < std::min(of.trials.size(), to.trials.size()); ++i)
    values.push_back(figure(of.trials[i], second) / figure(to.trials[i], second));
  return spread(std::move(values));
}

std::string number(double value, int decimals, int width) {
  return std::isfinite(value) ? fmt::format("{:>{}.{}f}", value, width, decimals) : fmt::format("{:>{}}", "-", width);
}

std::string columns(const Spread& of, int decimals) {
  return number(of.min, decimals, 10) + number(of.median, decimals, 10) + number(of.max, decimals, 10);
}

std::string verdict(const Goal& goal, double reached) {
  if (!std::isfinite(reached)) return {};
  const bool met = goal.at_least ? reached >= goal.bound : reached <= goal.bound;
  return fmt::format("   goal {} {}: {}", goal.at_least ? ">=" : "<=", goal.bound, met ? "met" : "MISSED");
}

const Goal* find_goal(const Measure& measure, bool second, std::string_view peer) {
  const Goal* found = std::ranges::find_if(goals, [&](const Goal& goal) {
    return goal.measure == measure.name && goal.second == second && goal.peer == peer;
  });
  return found == std::end(goals) ? nullptr : found;
}

std::uint64_t failures(const Series& series) {
  std::uint64_t sum = 0;
  for (const Trial& trial : series.trials) sum += trial.figures.failures;
  return sum;
}

std::string figure_lines(const std::vector<const Series*>& all, const Column& column, bool second) {
  std::string text = fmt::format("  {:<20}{:>10}{:>10}{:>10}\n", column.title, "min", "median", "max");
  for (const Series* one : all) {
    const Spread of = spread(*one, second);
    if (second && !std::isfinite(of.median)) continue;
    text += fmt::format("  {:<20}{}", one->peer, columns(of, column.decimals));
    const Goal* goal = one->peer.starts_with(subject) ? find_goal(*one->measure, second, "") : nullptr;
    if (goal != nullptr) text += verdict(*goal, of.median);
    text += '\n';
  }
  return text;
}

std::string ratio_lines(const std::vector<const Series*>& all, const Column& column, bool second) {
  // Without a subject, the others to HAProxy as Debian ships it.
  const auto named = [&](std::string_view name) {
    const auto found = std::ranges::find(all, name, [](const Series* one) { return std::string_view(one->peer); });
    return found == all.end() ? nullptr : *found;
  };
  const Series* proxy = named(subject);
  const Series* haproxy = named("haproxy");
  std::string text;
  for (const Series* one : all) {
    const Series* of = proxy != nullptr ? proxy : one;
    const Series* to = proxy != nullptr ? one : haproxy;
    if (to == nullptr || of == to) continue;
    const Spread spread = ratio(*of, *to, second);
    if (!std::isfinite(spread.median)) continue;
    text += fmt::format("  {:<38}{}", of->peer + " / " + to->peer, columns(spread, 2));
    if (const Goal* goal = find_goal(*one->measure, second, to->peer); goal != nullptr && of->peer == subject)
      text += verdict(*goal, spread.median);
    text += '\n';
  }
  return text.empty() ? text : fmt::format("  ratio of {}\n", column.title) + text;
}

/// Whatever makes figures doubtful.
std::string doubts(const std::vector<const Series*>& all) {
  std::string text;
  for (const Series* one : all) {
    if (failures(*one) > 0) text += fmt::format("  FAILURES of {}: {}\n", one->peer, failures(*one));
    for (std::size_t round = 0; round < one->trials.size(); ++round) {
      const Trial& trial = one->trials[round];
      if (!trial.error.empty()) text += fmt::format("  FAILED: {}, round {}: {}\n", one->peer, round + 1, trial.error);
    }
  }
  std::vector<double> bystanders;
  for (const Series* one : all)
    for (const Trial& trial : one->trials) bystanders.push_back(trial.figures.bystanders);
  const Spread others = spread(std::move(bystanders));
  if (std::isfinite(others.median))
    text += fmt::format("  CPUs that others kept busy meanwhile: median {:.2f}, at most {:.2f}\n", others.median,
                        others.max);
  return text;
}

json::value number_or_null(double value) { return std::isfinite(value) ? json::value(value) : json::value(nullptr); }

json::object as_json(const Spread& of) {
  return {{"min", number_or_null(of.min)}, {"median", number_or_null(of.median)}, {"max", number_or_null(of.max)}};
}

}  // namespace

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

std::string tables(const std::vector<Series>& series) {
  std::string text;
  for (const Measure& measure : all_measures()) {
    std::vector<const Series*> all;
    for (const Series& one : series)
      if (one.measure == &measure) all.push_back(&one);
    if (all.empty()) continue;
    text += fmt::format("\n{}\n", measure.title);
    text += figure_lines(all, measure.first, false) + ratio_lines(all, measure.first, false);
    if (!measure.second.title.empty())
      text += figure_lines(all, measure.second, true) + ratio_lines(all, measure.second, true);
    text += doubts(all);
  }
  return text;
}

json::value as_json(const std::vector<Series>& series, const Options& options) {
  json::array measured;
  for (const Series& one : series) {
    json::array trials;
    for (const Trial& trial : one.trials) {
      trials.push_back(json::object{{"first", number_or_null(figure(trial, false))},
                                    {"second", number_or_null(figure(trial, true))},
                                    {"bystanders", number_or_null(trial.figures.bystanders)},
                                    {"failures", trial.figures.failures},
                                    {"error", trial.error}});
    }
    json::object object{
        {"measure", one.measure->name},           {"peer", one.peer},          {"first", as_json(spread(one, false))},
        {"first_unit", one.measure->first.title}, {"failures", failures(one)}, {"trials", std::move(trials)}};
    if (!one.measure->second.title.empty()) {
      object["second"] = as_json(spread(one, true));
      object["second_unit"] = one.measure->second.title;
    }
    measured.push_back(std::move(object));
  }
  return json::object{{"machine", machine()},
                      {"seconds", options.seconds.count()},
                      {"threads", options.threads},
                      {"measured", std::move(measured)}};
}

}  // namespace bench
