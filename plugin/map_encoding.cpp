// SPDX-License-Identifier: BSD-2-Clause
#include "plugin/map_encoding.h"

#include <arpa/inet.h>

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "balance/alias_table.h"

namespace plugin {

namespace {

static_assert(config::max_name_length == SERVICE_NAME_SIZE - 1);
static_assert(config::reserved_vip == CANARY_VIP);
static_assert(std::to_underlying(config::NoBackend::refuse) == NO_BACKEND_REFUSE);
static_assert(std::to_underlying(config::NoBackend::unreachable) == NO_BACKEND_UNREACHABLE);
static_assert(std::to_underlying(config::NoBackend::pass) == NO_BACKEND_PASS);

void encode_address(const config::Address& address, __be32 (&out)[4]) {
  const auto v6 =
      address.is_v4() ? boost::asio::ip::make_address_v6(boost::asio::ip::v4_mapped, address.to_v4()) : address.to_v6();
  const auto bytes = v6.to_bytes();
  static_assert(sizeof bytes == sizeof out);
  std::memcpy(out, bytes.data(), sizeof out);
}

bool is_active(const config::Backend& backend) { return backend.state == config::BackendState::active; }

}  // namespace

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
  record.zero = 0;
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
  out.state = is_active(backend) ? BACKEND_ACTIVE : BACKEND_DRAIN;
  out.weight = backend.weight;
  out.record = record;
  return out;
}

config::Backend decode_backend(const backend_record& record) {
  return {.address = decode_address(record.address),
          .port = ntohs(record.port),
          .weight = record.weight,
          .state = record.state == BACKEND_DRAIN ? config::BackendState::drain : config::BackendState::active,
          .position = {}};
}

std::uint32_t block_size(const config::Service& service) {
  return 1 + static_cast<std::uint32_t>(std::ranges::count_if(service.backends, is_active));
}

void encode_block(const config::Service& service, std::uint32_t record, std::span<const std::uint32_t> indices,
                  std::span<block_entry> block) {
  std::vector<std::uint32_t> weights;
  std::vector<std::uint32_t> active;
  weights.reserve(indices.size());
  active.reserve(indices.size());
  for (std::size_t i = 0; i < indices.size(); ++i) {
    if (is_active(service.backends[i])) {
      weights.push_back(service.backends[i].weight);
      active.push_back(indices[i]);
    }
  }

  block[0].header = {.no_backend = std::to_underlying(service.no_backend), .zero = {}, .record = record, .reserved = 0};
  if (active.empty()) {
    return;
  }
  const auto columns = balance::alias_table(weights);
  for (std::size_t i = 0; i < columns.size(); ++i) {
    block[i + 1].slot = {
        .threshold = columns[i].threshold, .backend = active[i], .alias = active[columns[i].alias], .zero = 0};
  }
}

}  // namespace plugin
