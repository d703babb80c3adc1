// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "tests/bench/compare/peers.h"
#include "tests/bench/compare/stage.h"

namespace bench {

struct Options {
  std::string stage;               // veth or loopback: where the backends are
  std::string congestion_control;  // of every connection
  unsigned rounds = 0;
  std::chrono::duration<double> seconds{};  // that a load is measured for, each turn
  std::size_t turns = 0;                    // in a round, where these are many; loads have a quarter
  unsigned threads = 0;                     // of each proxy
  bool quick = false;
};

/// One figure of a measure, as the tables show it.
struct Column {
  std::string title;
  int decimals = 0;
  bool least = false;  // of the turns of a round; else the median
};

/// In a round: of some milliseconds each, of a part of a second, or of whatever it takes.
enum class Turns { many, some, one };

/// What is measured, one peer at a time.
struct Measure {
  std::string name;  // what is before a dash names a group of measures
  std::string title;
  std::vector<Column> columns;
  Turns turns;
  bool for_quick = true;  // takes part when time is short
  std::function<bool(const Peer&)> possible = [](const Peer&) { return true; };
  /// Called on a stage of its own, once a round.
  std::function<Stage::Turn(const Peer&, const Options&, const Place&)> set_up = {};

  bool has(const Peer& peer) const;
  std::string group() const { return name.substr(0, name.find('-')); }
};

const std::vector<Measure>& all_measures();

}  // namespace bench
