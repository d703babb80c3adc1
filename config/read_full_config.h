// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include "config/read_config.h"

namespace config {

/// read_config without the refusal of what this version does not support: the whole schema, for its tests.
std::expected<Config, std::vector<Mistake>> read_full_config(std::string_view text);

}  // namespace config
