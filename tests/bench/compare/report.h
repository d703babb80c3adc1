// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <boost/json/value.hpp>
#include <string>
#include <vector>

#include "tests/bench/compare/measures.h"
#include "tests/bench/compare/stage.h"

namespace bench {

/// One peer's part in a round: its turns, taken together.
struct Trial {
  Figures figures;
  std::vector<Figures> turns = {};
  std::string error;  // why there are no figures; empty when there are
};

Trial taken_together(const Measure& measure, const std::vector<Figures>& turns);

/// The trials of one peer at one measure, by round.
struct Series {
  const Measure* measure = nullptr;
  std::string peer;
  std::vector<Trial> trials;
};

/// One line on what was measured on: kernel, CPUs, memory.
std::string machine();

/// Whether a trial failed or a connection did.
bool failed(const std::vector<Series>& series);

/// The figures of one measure, each beside its ratio to `direct` in the same round, with the goal where there is one.
std::string table(const Measure& measure, const std::vector<Series>& series);

/// The goals that compare measures, or peers other than `direct`; empty when nothing is known of any.
std::string other_goals(const std::vector<Series>& series);

boost::json::value as_json(const std::vector<Series>& series, const Options& options);

}  // namespace bench
