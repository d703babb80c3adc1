// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include "plugin/maps.h"

namespace plugin {

/// What has been counted in maps goes on counting in those that have taken their place, with the same indices: to be
/// called once the programs over `to` run. Blocks for a grace period; where there is none, all counts begin at 0.
/// Whoever was killed during it has left the rest to be carried: a second call completes the first.
void carry_counts(const Maps& from, const Maps& to);

}  // namespace plugin
