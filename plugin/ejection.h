// SPDX-License-Identifier: BSD-2-Clause
//
// Ejections are the kernel's doing; user space shows them, carries them to new maps, and ends those that a change of a
// service's backends leaves no room for.
#pragma once

#include <cstdint>

#include "plugin/map_encoding.h"
#include "plugin/maps.h"

namespace plugin {

/// CLOCK_MONOTONIC in ns: the time of the maps.
std::uint64_t monotonic_now();

bool is_ejected(const backend_record& backend, std::uint64_t now);

/// Ends ejections, those that have the least to go, until at most half of each group of the block's members is ejected.
/// To be called when the block is published and its members have their places.
void limit_ejections(const Maps& maps, const Block& block);

/// What `from` says of failed connects, for the same backend in maps that take the place of others.
void copy_ejection(const backend_record& from, backend_record& to);

/// An ejection that has come about in the old maps since copy_ejection() goes on in the new ones. Can be repeated.
void carry_ejection(const backend_record& from, backend_record& to, std::uint64_t now);

}  // namespace plugin
