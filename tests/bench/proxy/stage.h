// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>

namespace bench {

/// What one trial has measured. What it did not measure is NaN.
struct Figures {
  double first = 0;  // of the measure's two figures
  double second = std::numeric_limits<double>::quiet_NaN();
  double bystanders = std::numeric_limits<double>::quiet_NaN();  // CPUs that others kept busy meanwhile
  std::uint64_t failures = 0;
};

struct Trial {
  Figures figures;
  std::string error;  // why there are no figures; empty when there are
};

/// Where a trial may write: a file system in memory that ends with the trial.
inline constexpr const char* scratch = "/mnt";

/// Run `body` in a forked copy of this process that has network, PID and mount namespaces of its own: `lo` is up, the
/// congestion control is `congestion_control`, and nobody's connections in TIME_WAIT are in the way. It and everything
/// it has started are ended after `patience` at the latest, or with this process.
Trial on_stage(const std::string& congestion_control, std::chrono::seconds patience,
               const std::function<Figures()>& body);

}  // namespace bench
