// SPDX-License-Identifier: BSD-2-Clause
//
// Bytes that are known at every place, so that the one who receives them can tell each from every other: nothing lost,
// repeated or exchanged goes unseen.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "tests/support/fd.h"

namespace support {

enum class Chunks : std::uint8_t {
  large,  // as much at once as there is
  mixed,  // now large, now small messages: a relay changes its way of passing them on
};

/// Sends the first `size` bytes of the stream `seed`.
void send_stream(const Fd& fd, std::uint64_t seed, std::uint64_t size, Chunks chunks = Chunks::large);

/// Receives so many bytes; throws when one of them is not the stream's, naming its place, or when fewer come.
void receive_stream(const Fd& fd, std::uint64_t seed, std::uint64_t size);

/// The same bytes at once.
std::string stream(std::uint64_t seed, std::size_t size);

}  // namespace support
