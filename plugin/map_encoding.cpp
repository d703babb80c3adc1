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
  return state == BACKEND_DRAIN  ? config::BackendState::drain
         : state == BACKEND_DOWN ? config::BackendState::down
                                 : config::BackendState::active;
}

std::vector<std::uint32_t> active_weights(const config::Service& service) {
  std::vector<std::uint32_t> weights;
  weights.reserve(service.backends.size());
  for (const auto& backend : service.backends) {
    if (is_active(backend)) {
      weights.push_back(backend.weight);
    }
  }
  return weights;
}

/// What makes a backend the same to Maglev, whichever process makes the table.
std::uint64_t hash_of(const config::Backend& backend) {
  const Key key = encode_key(backend.address, backend.port, config::Protocol::tcp);
  const auto word = [&key](int at) { return std::uint64_t{ntohl(key.address[at])} << 32 | ntohl(key.address[at + 1]); };
  return balance::hash_pair(balance::hash_pair(word(0), word(2)), backend.port);
}

/// The active backends, as indices into themselves, in the order of the slots.
std::vector<std::uint32_t> slot_order(const config::Service& service) {
  if (service.policy == config::Policy::round_robin) {
    return balance::ring_order(active_weights(service));
  }
  std::vector<balance::MaglevEntry> entries;
  for (const auto& backend : service.backends) {
    if (is_active(backend)) {
      entries.push_back({.hash = hash_of(backend), .weight = backend.weight});
    }
  }
  return balance::maglev_table(entries);
}

}  // namespace

bool is_active(const config::Backend& backend) { return backend.state == config::BackendState::active; }

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
  service.name.assign(record.name, strnlen(record.name, sizeof record.name));
  service.vip = decode_address(record.key.address);
  service.port = ntohs(record.key.port);
  service.protocol = static_cast<config::Protocol>(record.key.protocol);
  return service;
}

void encode_record(const config::Service& service, service_record& record) {
  record.key = encode_key(service);
  record.turn = 0;
  encode_name(service.name, record);
}

void encode_name(std::string_view name, service_record& record) {
  std::memset(record.name, 0, sizeof record.name);
  std::memcpy(record.name, name.data(), std::min(name.size(), sizeof record.name - 1));
}

backend_record encode_backend(const config::Backend& backend, std::uint32_t record) {
  backend_record out{};
  encode_address(backend.address, out.address);
  out.port = htons(backend.port);
  out.record = record;
  update_backend(backend, out);
  return out;
}

void update_backend(const config::Backend& backend, backend_record& record) {
  std::atomic_ref(record.weight).store(backend.weight, std::memory_order_relaxed);
  std::atomic_ref(record.state).store(encode_state(backend.state), std::memory_order_relaxed);
}

config::Backend decode_backend(const backend_record& record) {
  return {.address = decode_address(record.address),
          .port = ntohs(record.port),
          .weight = record.weight,
          .state = decode_state(record.state),
          .position = {}};
}

std::uint32_t block_size(const config::Service& service) {
  const auto active = static_cast<std::uint32_t>(std::ranges::count_if(service.backends, is_active));
  switch (service.policy) {
    case config::Policy::round_robin:
      return 1 + static_cast<std::uint32_t>(balance::ring_order(active_weights(service)).size());
    case config::Policy::maglev:
      return 1 + balance::maglev_size(active);
    case config::Policy::random:
    case config::Policy::least_conn:
      break;
  }
  return 1 + active;
}

block_header encode_header(const config::Service& service, std::uint32_t record, bool peer_names) {
  constexpr std::uint64_t longest = std::numeric_limits<std::uint32_t>::max();
  const bool ends_sockets = service.protocol == config::Protocol::udp || service.on_remove == config::OnRemove::reset;
  const bool remembers =
      peer_names || ends_sockets || service.policy == config::Policy::least_conn || service.mark != 0;
  const std::uint64_t affinity =
      service.affinity ? static_cast<std::uint64_t>(service.affinity->count() + AFFINITY_UNIT_MS - 1) / AFFINITY_UNIT_MS
                       : 0;
  const bool is_left = service.engine == config::EngineMode::userspace;
  return {.no_backend = std::to_underlying(service.no_backend),
          .policy = std::to_underlying(service.policy),
          .client = std::to_underlying(service.client),
          .flags = static_cast<std::uint8_t>((peer_names ? BLOCK_NAMED : 0u) | (remembers ? BLOCK_SESSION : 0u) |
                                             (service.mark != 0 ? BLOCK_MARK : 0u) |
                                             (service.on_remove == config::OnRemove::reset ? BLOCK_RESET : 0u) |
                                             (service.on_remove == config::OnRemove::keep ? BLOCK_KEEP : 0u) |
                                             (is_left ? BLOCK_LEFT : 0u)),
          .record = record,
          .affinity = static_cast<std::uint32_t>(std::min(affinity, longest)),
          .mark = service.mark};
}

void decode_header(const block_header& header, config::Service& service) {
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
}

void encode_block(const config::Service& service, std::uint32_t record, std::span<const std::uint32_t> indices,
                  bool peer_names, std::span<block_entry> block) {
  std::vector<std::uint32_t> active;
  active.reserve(indices.size());
  for (std::size_t i = 0; i < indices.size(); ++i) {
    if (is_active(service.backends[i])) {
      active.push_back(indices[i]);
    }
  }

  block[0].header = encode_header(service, record, peer_names);
  if (active.empty()) {
    return;
  }
  if (service.policy == config::Policy::round_robin || service.policy == config::Policy::maglev) {
    const auto order = slot_order(service);
    for (std::size_t i = 0; i < order.size(); ++i) {
      block[i + 1].slot = {.threshold = 0, .backend = active[order[i]], .alias = 0, .zero = 0};
    }
    return;
  }
  const auto columns = balance::alias_table(active_weights(service));
  for (std::size_t i = 0; i < columns.size(); ++i) {
    block[i + 1].slot = {
        .threshold = columns[i].threshold, .backend = active[i], .alias = active[columns[i].alias], .zero = 0};
  }
}

}  // namespace plugin
