// SPDX-License-Identifier: BSD-2-Clause
#include "fallback_proxy/service.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstring>

#include "balance/hash.h"
#include "balance/maglev.h"
#include "balance/round_robin.h"
#include "config/fail.h"
#include "config/printable.h"

namespace userspace {
namespace {

// Draws before a choice among all: with any backend usable at a share of a tenth, 32 draws miss it once in 30 times,
// and then the scan finds it.
constexpr int draws = 32;

std::uint64_t hash_address(const config::Address& address, std::uint16_t port) {
  std::uint64_t high = 0;
  std::uint64_t low = 0;
  if (address.is_v4()) {
    low = 0xffff00000000U | address.to_v4().to_uint();
  } else {
    const auto bytes = address.to_v6().to_bytes();
    std::memcpy(&high, bytes.data(), sizeof high);
    std::memcpy(&low, bytes.data() + sizeof high, sizeof low);
  }
  return balance::hash_pair(balance::hash_pair(high, low), port);
}

std::vector<std::uint32_t> weights_of(const std::vector<const config::Backend*>& backends) {
  std::vector<std::uint32_t> weights;
  weights.reserve(backends.size());
  for (const auto* backend : backends) weights.push_back(backend->weight);
  return weights;
}

}  // namespace

std::uint64_t client_hash(const SocketAddress& client, config::Client kind) {
  return hash_address(client.address(), kind == config::Client::socket ? client.port() : std::uint16_t{0});
}

Service::Service(config::Service settings, std::vector<BackendPointer> backends, std::shared_ptr<ServiceState> state)
    : settings_(std::move(settings)), backends_(std::move(backends)), state_(std::move(state)) {
  std::vector<const config::Backend*> active;
  for (std::size_t i = 0; i < backends_.size(); ++i) {
    if (settings_.backends[i].state != config::BackendState::active) continue;
    active_.push_back(backends_[i]);
    active_set_.insert(backends_[i].get());
    active.push_back(&settings_.backends[i]);
  }
  if (active.empty()) return;
  switch (settings_.policy) {
    case config::Policy::random:
    case config::Policy::least_conn:
      columns_ = balance::alias_table(weights_of(active));
      return;
    case config::Policy::round_robin:
      slots_ = balance::ring_order(weights_of(active));
      return;
    case config::Policy::maglev:
      std::vector<balance::MaglevEntry> entries;
      entries.reserve(active.size());
      for (const auto* backend : active)
        entries.push_back({hash_address(backend->address, backend->port), backend->weight});
      slots_ = balance::maglev_table(entries);
      return;
  }
}

const BackendPointer& Service::draw(Random& random) const {
  const auto [column, position] =
      balance::place(static_cast<std::uint32_t>(random()), static_cast<std::uint32_t>(columns_.size()));
  return active_[position < columns_[column].threshold ? column : columns_[column].alias];
}

const BackendPointer& Service::by_policy(const SocketAddress& client, Random& random) const {
  switch (settings_.policy) {
    case config::Policy::round_robin:
      return active_[slots_[state_->turn.fetch_add(1, std::memory_order_relaxed) % slots_.size()]];
    case config::Policy::maglev:
      return active_[slots_[balance::hash_slot(client_hash(client, settings_.client),
                                               static_cast<std::uint32_t>(slots_.size()))]];
    case config::Policy::least_conn: {
      const BackendPointer& one = draw(random);
      const BackendPointer& other = draw(random);
      return other->live.load(std::memory_order_relaxed) < one->live.load(std::memory_order_relaxed) ? other : one;
    }
    case config::Policy::random:
      break;
  }
  return draw(random);
}

BackendPointer Service::choose(const SocketAddress& client, std::span<const BackendPointer> tried,
                               Random& random) const {
  if (active_.empty()) return {};
  const auto now = Clock::now();
  const auto is_new = [&](const BackendPointer& backend) { return std::ranges::find(tried, backend) == tried.end(); };

  if (settings_.affinity) {
    BackendPointer backend = state_->affinity.find(client_hash(client, settings_.client), now);
    if (backend && is_active(*backend) && is_new(backend) && backend->admits(now)) return backend;
  }
  // The policy's own choice, as a rule. Where chance decides, it may decide again.
  const int tries = settings_.policy == config::Policy::maglev ? 1 : draws;
  for (int i = 0; i < tries; ++i) {
    const BackendPointer& backend = by_policy(client, random);
    if (is_new(backend) && backend->admits(now)) return backend;
  }
  // From a place of the client's own on, so that what one backend leaves is spread over the others, and each client of
  // maglev keeps its second choice.
  const std::size_t start = settings_.policy == config::Policy::maglev ? client_hash(client, settings_.client)
                                                                       : static_cast<std::size_t>(random());
  for (const bool marked : {false, true}) {
    for (std::size_t i = 0; i < active_.size(); ++i) {
      const BackendPointer& backend = active_[(start + i) % active_.size()];
      if (is_new(backend) && (marked || backend->admits(now))) return backend;
    }
  }
  return {};
}

void Service::reached(Backend& backend) const {
  if (!backend.connected() || !state_->report) return;
  // A UDP backend may be one that never answers.
  const bool is_udp = settings_.protocol == config::Protocol::udp;
  state_->report(spdlog::level::info,
                 fmt::format("service {}: backend {} {}", config::printable(settings_.name), backend.address.text(),
                             is_udp ? "does not refuse any more" : "answers again"));
}

void Service::failed(Backend& backend, int error, Clock::time_point now, Clock::time_point began) const {
  const auto pause = backend.failed(now, began);
  if (!pause || !state_->report) return;
  const std::string what =
      fmt::format("service {}: backend {} does not answer", config::printable(settings_.name), backend.address.text());
  state_->report(spdlog::level::warn,
                 fmt::format("{}; tried again in {} s", config::fail_errno(error, what).error().message,
                             std::chrono::ceil<std::chrono::seconds>(*pause).count()));
}

void Service::remember(const SocketAddress& client, const BackendPointer& backend, std::size_t limit) const {
  if (!settings_.affinity) return;
  state_->affinity.remember(client_hash(client, settings_.client), backend, Clock::now(), *settings_.affinity, limit);
}

}  // namespace userspace
