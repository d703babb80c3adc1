// SPDX-License-Identifier: BSD-2-Clause
//
// What is adopted from pins may have been written by anybody who could: any word, over any slots, is no block or one
// that lies within the map, and reading it stays there. What is read from it can be encoded again.
#include <cstring>
#include <vector>

#include "plugin/map_encoding.h"
#include "tests/fuzz/require.h"

namespace {

/// The next bytes of the input; zeros behind its end.
template <class T>
T take(const unsigned char*& data, std::size_t& size) {
  T value{};
  const std::size_t length = std::min(size, sizeof value);
  std::memcpy(static_cast<void*>(&value), data, length);
  data += length;
  size -= length;
  return value;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  const auto word = take<std::uint64_t>(data, size);
  const auto record = take<service_record>(data, size);
  std::vector<block_entry> slots(size / sizeof(block_entry) + 1);
  std::memcpy(static_cast<void*>(slots.data()), data, std::min(size, slots.size() * sizeof(block_entry)));

  config::Service service = plugin::decode_service(record);
  require(service.name.size() <= config::max_name_length);
  const auto block = plugin::find_block(word, slots);
  if (!block) return 0;
  require(block->is_within(slots.size()));
  plugin::decode_block(*block, slots, service);
  const auto members = plugin::members_of(*block, slots);
  require(members.empty() || (members.data() >= slots.data() && &members.back() <= &slots.back()));

  // Publisher::adopt compares with what it would write, after it has refused policies that do not exist.
  if (service.policy > config::Policy::maglev) return 0;
  std::vector<std::uint32_t> indices;
  for (const block_entry& member : members.first(std::min<std::size_t>(members.size(), 64))) {
    backend_record backend{};
    std::memcpy(static_cast<void*>(&backend), &member, std::min(sizeof member, sizeof backend));
    service.backends.push_back(plugin::decode_backend(backend));
    service.backends.back().weight = service.backends.back().weight % 100 + 1;
    indices.push_back(member.slot.backend);
  }
  std::vector<block_entry> encoded(plugin::block_size(service));
  plugin::encode_block(service, 1, indices, true, encoded);
  const plugin::Block plan = plugin::plan_block(service);
  require(plan.size() == encoded.size());
  return 0;
}
