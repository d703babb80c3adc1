// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <string>

#include "config/config.h"

namespace run {

/// What a reload changes, for the log: "1 service added (web), 1 changed (db: + 10.0.0.3:80, - 10.0.0.2:80)". At most
/// ten services of a kind and ten changes of a service are named, then "and 5 more". Empty: it changes nothing about
/// services.
std::string describe_change(const config::Config& before, const config::Config& after);

/// The keys of [engine], [limits], [metrics] and [kubernetes] that differ although a reload does not change them:
/// "engine.pin". Empty: there are none.
std::string late_keys(const config::Config& before, const config::Config& after);

}  // namespace run
