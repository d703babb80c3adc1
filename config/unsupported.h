// SPDX-License-Identifier: BSD-2-Clause
//
// The keys and values that belong to the schema, but whose feature this version does not have. They are read and
// validated like all others and then refused: never silently accepted.
#pragma once

#include <string_view>

#include "config/config.h"
#include "config/read_config.h"

namespace config {

/// Whether this version of the carrier lacks what `key`, which the file writes and which has been read into the struct,
/// asks for.
bool is_unsupported(const Engine& engine, std::string_view key, Carrier carrier);
bool is_unsupported(const Metrics& metrics, std::string_view key, Carrier carrier);
bool is_unsupported(const Service& service, std::string_view key, Carrier carrier);

}  // namespace config
