// SPDX-License-Identifier: BSD-2-Clause
#include "tests/support/stream.h"

#include <sys/socket.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string_view>
#include <vector>

#include "tests/support/tcp.h"

namespace support {
namespace {

constexpr std::size_t block = std::size_t{256} * 1024;

// One block of random bytes for all; the stream is this block over and over, each time with the number of the block and
// the seed added to every word: that is as fast as memory.
const std::vector<std::uint64_t>& words() {
  static const std::vector<std::uint64_t> result = [] {
    std::mt19937_64 random(1);
    std::vector<std::uint64_t> drawn(block / sizeof(std::uint64_t));
    for (auto& word : drawn) word = random();
    return drawn;
  }();
  return result;
}

void fill(std::vector<std::uint64_t>& bytes, std::uint64_t seed, std::uint64_t number) {
  const std::uint64_t added = seed * 0x9e3779b97f4a7c15 + number * 0xd1b54a32d192ed03;
  std::ranges::transform(words(), bytes.begin(), [added](std::uint64_t word) { return word + added; });
}

std::string_view as_bytes(const std::vector<std::uint64_t>& words_of_block, std::uint64_t left) {
  return {reinterpret_cast<const char*>(words_of_block.data()), std::min<std::uint64_t>(left, block)};
}

}  // namespace

void send_stream(const Fd& fd, std::uint64_t seed, std::uint64_t size, Chunks chunks) {
  std::vector<std::uint64_t> current(words().size());
  std::mt19937_64 random(seed);
  for (std::uint64_t number = 0; number * block < size; ++number) {
    fill(current, seed, number);
    std::string_view bytes = as_bytes(current, size - number * block);
    // Four blocks as they are, then one in small pieces.
    if (chunks == Chunks::large || number % 5 != 4) {
      send_all(fd, bytes);
      continue;
    }
    while (!bytes.empty()) {
      const std::string_view piece = bytes.substr(0, 1 + random() % 4000);
      send_all(fd, piece);
      bytes.remove_prefix(piece.size());
    }
  }
}

void receive_stream(const Fd& fd, std::uint64_t seed, std::uint64_t size) {
  std::vector<std::uint64_t> expected(words().size());
  std::vector<char> received(block);
  for (std::uint64_t number = 0; number * block < size; ++number) {
    fill(expected, seed, number);
    const std::string_view wanted = as_bytes(expected, size - number * block);
    std::size_t have = 0;
    while (have < wanted.size()) {
      const ssize_t more = checked(::recv(fd.get(), received.data() + have, wanted.size() - have, 0), "recv");
      if (more == 0) throw std::runtime_error("ended after " + std::to_string(number * block + have) + " bytes");
      have += static_cast<std::size_t>(more);
    }
    const auto [wrong, other] = std::ranges::mismatch(received.begin(), received.begin() + static_cast<long>(have),
                                                      wanted.begin(), wanted.end());
    if (other != wanted.end())
      throw std::runtime_error("wrong byte at " +
                               std::to_string(number * block + static_cast<std::uint64_t>(other - wanted.begin())));
  }
}

std::string stream(std::uint64_t seed, std::size_t size) {
  std::vector<std::uint64_t> current(words().size());
  std::string result;
  for (std::uint64_t number = 0; result.size() < size; ++number) {
    fill(current, seed, number);
    result += as_bytes(current, size - result.size());
  }
  return result;
}

}  // namespace support
