// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <chrono>
#include <string>
#include <vector>

#include "tests/bench/proxy/peers.h"
#include "tests/bench/proxy/stage.h"

namespace bench {

struct Options {
  std::chrono::duration<double> seconds{};  // that a load is measured for
  unsigned threads = 0;                     // of each proxy
};

/// One figure of a measure, as the tables show it. Without a title there is none.
struct Column {
  std::string title;
  int decimals = 0;
};

/// What is measured, one trial of one peer at a time.
struct Measure {
  std::string name;
  std::string title;
  Column first;
  Column second;
  /// Called on a stage of its own.
  Figures (*take)(const Peer& peer, const Options& options) = nullptr;
};

const std::vector<Measure>& all_measures();

}  // namespace bench
