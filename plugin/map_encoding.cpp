// SPDX-License-Identifier: BSD-2-Clause
#include "plugin/map_encoding.h"

#include <arpa/inet.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "balance/alias_table.h"
#include "balance/hash.h"
#include "balance/maglev.h"
#include "balance/round_robin.h"

namespace plugin {

namespace {

static_assert(config::max_name_length == SERVICE_NAME_SIZE - 1);
static_assert(config::reserved_vip == CANARY_VIP);
static_assert(std::to_underlying(config::NoBackend::refuse) == NO_BACKEND_REFUSE);
static_assert(std::to_underlying(config::NoBackend::unreachable) == NO_BACKEND_UNREACHABLE);
static_assert(std::to_underlying(config::NoBackend::pass) == NO_BACKEND_PASS);
static_assert(std::to_underlying(config::Policy::random) == POLICY_RANDOM);
static_assert(std::to_underlying(config::Policy::round_robin) == POLICY_ROUND_ROBIN);
static_assert(std::to_underlying(config::Policy::least_conn) == POLICY_LEAST_CONN);
static_assert(std::to_underlying(config::Policy::maglev) == POLICY_MAGLEV);
static_assert(std::to_underlying(config::Client::cgroup) == CLIENT_CGROUP);
static_assert(std::to_underlying(config::Client::netns) == CLIENT_NETNS);
static_assert(std::to_underlying(config::Client::socket) == CLIENT_SOCKET);

void encode_address(const config::Address& address, __be32 (&out)[4]) {
  const auto v6 =
      address.is_v4() ? boost::asio::ip::make_address_v6(boost::asio::ip::v4_mapped, address.to_v4()) : address.to_v6();
  const auto bytes = v6.to_bytes();
  static_assert(sizeof bytes == sizeof out);
  std::memcpy(out, bytes.data(), sizeof out);
}

std::uint8_t encode_state(config::BackendState state) {
  switch (state) {
    case config::BackendState::active:
      return BACKEND_ACTIVE;
    case config::BackendState::drain:
      return BACKEND_DRAIN;
    case config::BackendState::down:
      break;
  }
  return BACKEND_DOWN;
}

config::BackendState decode_state(std::uint8_t state) {
  switch (state) {
    case BACKEND_DRAIN:
      return config::BackendState::drain;
    case BACKEND_DOWN:
    case BACKEND_TRIED:
      return config::BackendState::down;
    default:
      return config::BackendState::active;
  }
}

std::vector<std::uint32_t> chosen_weights(const config::Service& service) {
  const auto wanted = chosen_state(service);
  std::vector<std::uint32_t> weights;
  weights.reserve(service.backends.size());
  for (const auto& backend : service.backends) {
    if (backend.state == wanted) {
      weights.push_back(backend.weight);
    }
  }
  return weights;
}

/// Whether slot i names backend i, beside another: then the slots are the members.
bool has_alias_table(const config::Service& service) {
  return service.policy != config::Policy::round_robin && service.policy != config::Policy::maglev;
}

/// What makes a backend the same to Maglev, whichever process makes the table.
std::uint64_t hash_of(const config::Backend& backend) {
  const Key key = encode_key(backend.address, backend.port, config::Protocol::tcp);
  const auto word = [&key](int at) { return std::uint64_t{ntohl(key.address[at])} << 32 | ntohl(key.address[at + 1]); };
  return balance::hash_pair(balance::hash_pair(word(0), word(2)), backend.port);
}

/// The backends that are chosen from, as indices into themselves, in the order of the slots.
std::vector<std::uint32_t> slot_order(const config::Service& service) {
  if (service.policy == config::Policy::round_robin) {
    return balance::ring_order(chosen_weights(service));
  }
  const auto wanted = chosen_state(service);
  std::vector<balance::MaglevEntry> entries;
  for (const auto& backend : service.backends) {
    if (backend.state == wanted) {
      entries.push_back({.hash = hash_of(backend), .weight = backend.weight});
    }
  }
  return balance::maglev_table(entries);
}

}  // namespace

config::BackendState chosen_state(const config::Service& service) {
  const auto has = [&service](config::BackendState state) {
    return std::ranges::find(service.backends, state, &config::Backend::state) != service.backends.end();
  };
  return service.panic && !has(config::BackendState::active) && has(config::BackendState::down)
             ? config::BackendState::down
             : config::BackendState::active;
}

std::vector<std::uint32_t> places_of(const config::Service& service) {
  const auto wanted = chosen_state(service);
  std::vector<std::uint32_t> places;
  places.reserve(service.backends.size());
  std::uint32_t next = 0;
  for (const auto& backend : service.backends) {
    places.push_back(backend.state == wanted ? next++ : NO_PLACE);
  }
  return places;
}

bool Key::operator==(const Key& other) const { return std::memcmp(this, &other, sizeof *this) == 0; }

std::size_t KeyHash::operator()(const Key& key) const {
  std::uint64_t words[2];
  std::uint32_t rest = 0;
  static_assert(sizeof words + sizeof rest == sizeof key);
  const auto* bytes = reinterpret_cast<const char*>(&key);
  std::memcpy(words, bytes, sizeof words);
  std::memcpy(&rest, bytes + sizeof words, sizeof rest);
  // Keys are few per bucket and not chosen by an attacker: the operator writes them. Multiply and fold (Fibonacci
  // hashing) is enough.
  std::uint64_t hash = (words[0] ^ rest) * 0x9e3779b97f4a7c15u;
  hash = (hash ^ (hash >> 32) ^ words[1]) * 0xbf58476d1ce4e5b9u;
  return hash ^ (hash >> 29);
}

Key encode_key(const config::Address& vip, std::uint16_t port, config::Protocol protocol) {
  Key key{};
  encode_address(vip, key.address);
  key.port = htons(port);
  key.protocol = std::to_underlying(protocol);
  return key;
}

Key marker_of(const Key& key) {
  Key marker = key;
  marker.port = 0;
  marker.protocol = 0;
  return marker;
}

bool is_marker(const Key& key) { return key.port == 0 && key.protocol == 0; }

config::Address decode_address(const __be32 (&address)[4]) {
  boost::asio::ip::address_v6::bytes_type bytes;
  std::memcpy(bytes.data(), address, sizeof bytes);
  const boost::asio::ip::address_v6 v6{bytes};
  if (v6.is_v4_mapped()) {
    return boost::asio::ip::make_address_v4(boost::asio::ip::v4_mapped, v6);
  }
  return v6;
}

config::Service decode_service(const service_record& record) {
  config::Service service;
  service.name.assign(record.name, strnlen(record.name, sizeof record.name - 1));
  service.vip = decode_address(record.key.address);
  service.port = ntohs(record.key.port);
  service.protocol = static_cast<config::Protocol>(record.key.protocol);
  return service;
}

bool has_key(const service_record& record, const Key& key) {
  return std::memcmp(&record.key, static_cast<const service_key*>(&key), sizeof record.key) == 0;
}

void encode_record(const config::Service& service, service_record& record) {
  record.key = encode_key(service);
  record.turn = 0;
  encode_name(service.name, record);
}

/// Whoever reads meanwhile, or after a process that died here, finds some of the old and some of the new name, never
/// none.
void encode_name(std::string_view name, service_record& record) {
  const std::size_t length = std::min(name.size(), sizeof record.name - 1);
  std::memcpy(record.name, name.data(), length);
  std::memset(record.name + length, 0, sizeof record.name - length);
}

backend_record encode_backend(const config::Backend& backend, std::uint32_t record) {
  backend_record out{};
  encode_address(backend.address, out.address);
  out.port = htons(backend.port);
  out.record = record;
  out.weight = backend.weight;
  out.state = encode_state(backend.state);
  out.place = NO_PLACE;
  return out;
}

void update_backend(const config::Backend& backend, const config::Service& service, std::uint32_t place,
                    backend_record& record) {
  const bool is_tried = place != NO_PLACE && backend.state == config::BackendState::down;
  std::atomic_ref(record.weight).store(backend.weight, std::memory_order_relaxed);
  std::atomic_ref(record.place).store(service.eject ? place : NO_PLACE, std::memory_order_relaxed);
  std::atomic_ref(record.state)
      .store(is_tried ? std::uint8_t{BACKEND_TRIED} : encode_state(backend.state), std::memory_order_relaxed);
  if (!service.eject) {
    std::atomic_ref(record.ejected_until).store(0, std::memory_order_relaxed);
    std::atomic_ref(record.failures).store(0, std::memory_order_relaxed);
    std::atomic_ref(record.ejections).store(0, std::memory_order_relaxed);
  }
}

config::Backend decode_backend(const backend_record& record) {
  return {.address = decode_address(record.address),
          .port = ntohs(record.port),
          .weight = record.weight,
          .state = decode_state(record.state),
          .position = {}};
}

std::optional<Block> find_block(std::uint64_t word, std::span<const block_entry> slots) {
  Block block{.header = static_cast<std::uint32_t>(word), .slots = static_cast<std::uint32_t>(word >> 32), .more = 0};
  if (!block.is_within(slots.size())) {
    return std::nullopt;
  }
  if ((slots[block.header].header.flags & BLOCK_EJECT) == 0) {
    return block;
  }
  block.more = 1;
  if (!block.is_within(slots.size())) {
    return std::nullopt;
  }
  const block_eject& eject = slots[block.header + 1 + block.slots].eject;
  const bool in_slots = eject.first == 1 && eject.members == block.slots;
  if (!in_slots) {
    if (eject.first != block.size() || eject.members > config::max_backends_per_service) {
      return std::nullopt;
    }
    block.more += eject.members;
  }
  return block.is_within(slots.size()) ? std::optional(block) : std::nullopt;
}

std::span<const block_entry> members_of(const Block& block, std::span<const block_entry> slots) {
  if (block.more == 0) {
    return slots.subspan(block.header + 1, block.slots);
  }
  const block_eject& eject = slots[block.header + 1 + block.slots].eject;
  return slots.subspan(block.header + eject.first, eject.members);
}

Block plan_block(const config::Service& service) {
  const auto wanted = chosen_state(service);
  const auto chosen = static_cast<std::uint32_t>(std::ranges::count(service.backends, wanted, &config::Backend::state));
  Block block{.header = 0, .slots = chosen, .more = 0};
  if (service.policy == config::Policy::round_robin) {
    block.slots = static_cast<std::uint32_t>(balance::ring_order(chosen_weights(service)).size());
  } else if (service.policy == config::Policy::maglev) {
    block.slots = balance::maglev_size(chosen);
  }
  if (service.eject) {
    block.more = 1 + (has_alias_table(service) ? 0 : chosen);
  }
  return block;
}

block_header encode_header(const config::Service& service, std::uint32_t record, bool peer_names) {
  constexpr std::uint64_t longest = std::numeric_limits<std::uint32_t>::max();
  const bool ends_sockets = service.protocol == config::Protocol::udp || service.on_remove == config::OnRemove::reset;
  const bool remembers =
      peer_names || ends_sockets || service.policy == config::Policy::least_conn || service.mark != 0 || service.eject;
  const std::uint64_t affinity =
      service.affinity ? static_cast<std::uint64_t>(service.affinity->count() + AFFINITY_UNIT_MS - 1) / AFFINITY_UNIT_MS
                       : 0;
  const bool is_left = service.engine == config::EngineMode::userspace;
  const std::uint32_t flags =
      (peer_names ? BLOCK_NAMED : 0u) | (remembers ? BLOCK_SESSION : 0u) | (service.mark != 0 ? BLOCK_MARK : 0u) |
      (service.on_remove == config::OnRemove::reset ? BLOCK_RESET : 0u) |
      (service.on_remove == config::OnRemove::keep ? BLOCK_KEEP : 0u) | (is_left ? BLOCK_LEFT : 0u) |
      (service.eject ? BLOCK_EJECT : 0u) | (service.panic ? BLOCK_PANIC : 0u) | (service.health ? BLOCK_HEALTH : 0u);
  block_header header{};
  header.no_backend = std::to_underlying(service.no_backend) & 0xf;
  header.client = std::to_underlying(service.client) & 0xf;
  header.policy = std::to_underlying(service.policy);
  header.flags = static_cast<std::uint16_t>(flags);
  header.record = record;
  header.affinity = static_cast<std::uint32_t>(std::min(affinity, longest));
  header.mark = service.mark;
  return header;
}

std::optional<block_eject> encode_eject(const config::Service& service, const Block& block) {
  if (!service.eject) {
    return std::nullopt;
  }
  constexpr std::int64_t longest = std::numeric_limits<std::uint32_t>::max();  // 49 days
  constexpr std::uint32_t most = std::numeric_limits<std::uint16_t>::max();
  const bool in_slots = has_alias_table(service);
  return block_eject{.time = static_cast<std::uint32_t>(std::min<std::int64_t>(service.eject->time.count(), longest)),
                     .failures = static_cast<std::uint16_t>(std::min(service.eject->failures, most)),
                     .zero = 0,
                     .members = in_slots ? block.slots : block.more - 1,
                     .first = in_slots ? 1 : 2 + block.slots};
}

void decode_block(const Block& block, std::span<const block_entry> slots, config::Service& service) {
  const block_header& header = slots[block.header].header;
  service.no_backend = static_cast<config::NoBackend>(header.no_backend);
  service.policy = static_cast<config::Policy>(header.policy);
  service.client = static_cast<config::Client>(header.client);
  service.on_remove = (header.flags & BLOCK_RESET) != 0  ? config::OnRemove::reset
                      : (header.flags & BLOCK_KEEP) != 0 ? config::OnRemove::keep
                                                         : config::OnRemove::drain;
  if (header.affinity != 0) {
    service.affinity = std::chrono::milliseconds(std::int64_t{header.affinity} * AFFINITY_UNIT_MS);
  }
  service.mark = header.mark;
  if ((header.flags & BLOCK_LEFT) != 0) {
    service.engine = config::EngineMode::userspace;
  }
  service.panic = (header.flags & BLOCK_PANIC) != 0;
  if ((header.flags & BLOCK_HEALTH) != 0) {
    service.health.emplace();  // what it asks for in particular is for whoever checks
  }
  if ((header.flags & BLOCK_EJECT) != 0) {
    const block_eject& eject = slots[block.header + 1 + block.slots].eject;
    service.eject = {.failures = eject.failures, .time = std::chrono::milliseconds(eject.time)};
  }
}

void encode_block(const config::Service& service, std::uint32_t record, std::span<const std::uint32_t> indices,
                  bool peer_names, std::span<block_entry> block) {
  const auto wanted = chosen_state(service);
  std::vector<std::uint32_t> chosen;
  chosen.reserve(indices.size());
  for (std::size_t i = 0; i < indices.size(); ++i) {
    if (service.backends[i].state == wanted) {
      chosen.push_back(indices[i]);
    }
  }
  const Block plan = plan_block(service);
  const auto slots = block.subspan(1, plan.slots);
  block[0].header = encode_header(service, record, peer_names);
  if (const auto eject = encode_eject(service, plan)) {
    block[1 + plan.slots].eject = *eject;
    for (std::size_t i = 0; i + 1 < plan.more; ++i) {
      block[2 + plan.slots + i].slot = {.threshold = 0, .backend = chosen[i], .alias = 0, .choices = 0};
    }
  }
  if (chosen.empty()) {
    return;
  }
  if (has_alias_table(service)) {
    const auto columns = balance::alias_table(chosen_weights(service));
    for (std::size_t i = 0; i < columns.size(); ++i) {
      slots[i].slot = {
          .threshold = columns[i].threshold, .backend = chosen[i], .alias = chosen[columns[i].alias], .choices = 0};
    }
  } else {
    const auto order = slot_order(service);
    for (std::size_t i = 0; i < order.size(); ++i) {
      slots[i].slot = {.threshold = 0, .backend = chosen[order[i]], .alias = 0, .choices = 0};
    }
  }
  slots[0].slot.choices = static_cast<std::uint32_t>(chosen.size());
}

}  // namespace plugin
