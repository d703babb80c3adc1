// SPDX-License-Identifier: BSD-2-Clause
//
// From the plain model to the bytes of the maps and back. Pure; the only place where byte order changes.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

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

/// Fills key and name; `word` stays as it is.
void encode_record(const config::Service& service, service_record& record);
void encode_name(std::string_view name, service_record& record);

backend_record encode_backend(const config::Backend& backend, std::uint32_t record);

/// Writes what may change while a backend is in use: its weight and its state.
void update_backend(const config::Backend& backend, backend_record& record);

config::Backend decode_backend(const backend_record& record);

bool is_active(const config::Backend& backend);

/// How many entries the block of `service` takes: the header, and what its policy needs for the active backends.
std::uint32_t block_size(const config::Service& service);

/// `peer_names` is that of the engine.
block_header encode_header(const config::Service& service, std::uint32_t record, bool peer_names);

/// The part of a service that its block's header holds.
void decode_header(const block_header& header, config::Service& service);

/// Fills `block` (of block_size entries). `indices` are the Backend_Map indices of service.backends, in their order.
void encode_block(const config::Service& service, std::uint32_t record, std::span<const std::uint32_t> indices,
                  bool peer_names, std::span<block_entry> block);

/// Where a service's block is: the index of its header in Slot_Map, and the number of slots that follow.
struct Block {
  std::uint32_t header = 0;
  std::uint32_t slots = 0;

  std::uint32_t size() const { return slots + 1; }
  /// Whether a Slot_Map of so many entries holds it. Only what somebody else wrote does not.
  bool is_within(std::size_t entries) const { return header > 0 && std::uint64_t{header} + 1 + slots <= entries; }
};

constexpr std::uint64_t encode_word(const Block& block) { return std::uint64_t{block.slots} << 32 | block.header; }
constexpr Block decode_word(std::uint64_t word) {
  return {.header = static_cast<std::uint32_t>(word), .slots = static_cast<std::uint32_t>(word >> 32)};
}

}  // namespace plugin
