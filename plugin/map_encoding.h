// SPDX-License-Identifier: BSD-2-Clause
//
// From the plain model to the bytes of the maps and back. Pure; the only place where byte order changes.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "bpf/map_layout.h"
#include "config/config.h"

namespace plugin {

/// service_key with the comparison and hash that its bytes have.
struct Key : service_key {
  bool operator==(const Key& other) const;
};

struct KeyHash {
  using is_avalanching = void;  // Boost.Unordered need not mix it again
  std::size_t operator()(const Key& key) const;
};

Key encode_key(const config::Address& vip, std::uint16_t port, config::Protocol protocol);

inline Key encode_key(const config::Service& service) {
  return encode_key(service.vip, service.port, service.protocol);
}

/// The key that marks the address of `key` as a VIP of ours.
Key marker_of(const Key& key);

bool is_marker(const Key& key);

config::Address decode_address(const __be32 (&address)[4]);

/// The part of a service that its key and record hold: vip, port, protocol, name.
config::Service decode_service(const service_record& record);

/// Whether the record is of the service that has this key.
bool has_key(const service_record& record, const Key& key);

/// Fills key and name; `word` stays as it is.
void encode_record(const config::Service& service, service_record& record);
void encode_name(std::string_view name, service_record& record);

/// The state that backends of `service` have which are to be chosen from: active; or down, when it has panic and nobody
/// is active.
config::BackendState chosen_state(const config::Service& service);

/// Those of service.backends that are chosen from: where each is among them, or NO_PLACE.
std::vector<std::uint32_t> places_of(const config::Service& service);

backend_record encode_backend(const config::Backend& backend, std::uint32_t record);

/// Writes what may change while a backend is in use: its weight, its state, and its place among those that `service`
/// chooses from.
void update_backend(const config::Backend& backend, const config::Service& service, std::uint32_t place,
                    backend_record& record);

config::Backend decode_backend(const backend_record& record);

/// Where a service's block is: the index of its header in Slot_Map, the number of slots that follow, and of entries
/// after those.
struct Block {
  std::uint32_t header = 0;
  std::uint32_t slots = 0;
  std::uint32_t more = 0;

  std::uint32_t size() const { return 1 + slots + more; }
  /// Whether a Slot_Map of so many entries holds it. Only what somebody else wrote does not.
  bool is_within(std::size_t entries) const {
    return header > 0 && std::uint64_t{header} + 1 + slots + more <= entries;
  }
};

constexpr std::uint64_t encode_word(const Block& block) { return std::uint64_t{block.slots} << 32 | block.header; }

/// The block that a word names in Slot_Map; none when it does not lie within the map.
std::optional<Block> find_block(std::uint64_t word, std::span<const block_entry> slots);

/// The members of a block: one for each backend that can be chosen.
std::span<const block_entry> members_of(const Block& block, std::span<const block_entry> slots);

/// The size and shape of the block of `service`: the header, what its policy needs for the backends that are chosen
/// from, and what ejection needs. It is nowhere yet.
Block plan_block(const config::Service& service);
inline std::uint32_t block_size(const config::Service& service) { return plan_block(service).size(); }

/// `peer_names` is that of the engine.
block_header encode_header(const config::Service& service, std::uint32_t record, bool peer_names);

/// The entry of its block that says when backends are ejected; empty when they are not.
std::optional<block_eject> encode_eject(const config::Service& service, const Block& block);

/// The part of a service that its block holds, but for the backends.
void decode_block(const Block& block, std::span<const block_entry> slots, config::Service& service);

/// Fills `block` (of block_size entries). `indices` are the Backend_Map indices of service.backends, in their order.
void encode_block(const config::Service& service, std::uint32_t record, std::span<const std::uint32_t> indices,
                  bool peer_names, std::span<block_entry> block);

}  // namespace plugin
