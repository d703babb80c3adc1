// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <cstdint>

#include "plugin/map_encoding.h"
#include "plugin/maps.h"

namespace plugin {

/// Makes `block` what a connect() to `key` finds from now on: one release store, which cannot fail. Everything that the
/// block names must have been written before.
void publish(const Maps& maps, const Key& key, std::uint32_t record, const Block& block);

/// Makes a connect() to `key` find no service. The key may stay in Service_Map for a while.
void withdraw(const Maps& maps, const Key& key, std::uint32_t record);

}  // namespace plugin
