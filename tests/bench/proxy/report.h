// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <boost/json/value.hpp>
#include <string>
#include <vector>

#include "tests/bench/proxy/measures.h"
#include "tests/bench/proxy/stage.h"

namespace bench {

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

/// All tables: the figures of each measure, then the ratios of the same round's figures, with the goal where there is
/// one.
std::string tables(const std::vector<Series>& series);

boost::json::value as_json(const std::vector<Series>& series, const Options& options);

}  // namespace bench
