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

/// "10 s", "1500 ms".
std::string text_of(Clock::duration time) {
  const auto ms = std::chrono::ceil<std::chrono::milliseconds>(time).count();
  return ms % 1000 == 0 ? fmt::format("{} s", ms / 1000) : fmt::format("{} ms", ms);
}

}  // namespace

std::uint64_t client_hash(const SocketAddress& client, config::Client kind) {
  return hash_address(client.address(), kind == config::Client::socket ? client.port() : std::uint16_t{0});
}

Service::Service(config::Service settings, std::vector<BackendPointer> backends, std::shared_ptr<ServiceState> state)
    : settings_(std::move(settings)), backends_(std::move(backends)), state_(std::move(state)) {
  use(config::BackendState::active);
  if (active_.empty() && settings_.panic) use(config::BackendState::down);
  if (active_.empty()) return;
  switch (settings_.policy) {
    case config::Policy::random:
    case config::Policy::least_conn:
      columns_ = balance::alias_table(weights_);
      return;
    case config::Policy::round_robin:
      slots_ = balance::ring_order(weights_);
      return;
    case config::Policy::maglev:
      std::vector<balance::MaglevEntry> entries;
      entries.reserve(active_.size());
      for (std::size_t i = 0; i < active_.size(); ++i)
        entries.push_back({hash_address(active_[i]->address.address(), active_[i]->address.port()), weights_[i]});
      slots_ = balance::maglev_table(entries);
      return;
  }
}

void Service::use(config::BackendState state) {
  for (std::size_t i = 0; i < backends_.size(); ++i) {
    if (settings_.backends[i].state != state) continue;
    active_.push_back(backends_[i]);
    active_set_.insert(backends_[i].get());
    weights_.push_back(settings_.backends[i].weight);
  }
}

std::size_t Service::draw(Random& random) const {
  const auto [column, position] =
      balance::place(static_cast<std::uint32_t>(random()), static_cast<std::uint32_t>(columns_.size()));
  return position < columns_[column].threshold ? column : columns_[column].alias;
}

/// Two different backends, the first by weight: the second is taken only when it has fewer live connections for its
/// weight. choose_less_loaded() of clusterip.bpf.c does the same.
const BackendPointer& Service::choose_less_loaded(Random& random) const {
  const std::size_t first = draw(random);
  if (active_.size() < 2) return active_[first];
  std::size_t second =
      balance::place(static_cast<std::uint32_t>(random()), static_cast<std::uint32_t>(active_.size())).column;
  if (second == first) second = (second + 1) % active_.size();
  const auto live = [&](std::size_t i) { return std::uint64_t{active_[i]->live.load(std::memory_order_relaxed)}; };
  return active_[live(second) * weights_[first] < live(first) * weights_[second] ? second : first];
}

const BackendPointer& Service::by_policy(const SocketAddress& client, Random& random) const {
  switch (settings_.policy) {
    case config::Policy::round_robin:
      return active_[slots_[state_->turn.fetch_add(1, std::memory_order_relaxed) % slots_.size()]];
    case config::Policy::maglev:
      return active_[slots_[balance::hash_slot(client_hash(client, settings_.client),
                                               static_cast<std::uint32_t>(slots_.size()))]];
    case config::Policy::least_conn:
      return choose_less_loaded(random);
    case config::Policy::random:
      break;
  }
  return active_[draw(random)];
}

BackendPointer Service::choose(const SocketAddress& client, std::span<const BackendPointer> tried,
                               Random& random) const {
  if (active_.empty()) return {};
  const auto now = Clock::now();
  const auto is_new = [&](const BackendPointer& backend) { return std::ranges::find(tried, backend) == tried.end(); };

  if (settings_.affinity) {
    BackendPointer backend = state_->affinity.find(client_hash(client, settings_.client), now);
    if (backend && is_active(*backend) && is_new(backend) && admits(*backend, now)) return backend;
  }
  // The policy's own choice, as a rule. Where chance decides, it may decide again.
  const int tries = settings_.policy == config::Policy::maglev ? 1 : draws;
  for (int i = 0; i < tries; ++i) {
    const BackendPointer& backend = by_policy(client, random);
    if (is_new(backend) && admits(*backend, now)) return backend;
  }
  // From a place of the client's own on, so that what one backend leaves is spread over the others, and each client of
  // maglev keeps its second choice.
  const std::size_t start = settings_.policy == config::Policy::maglev ? client_hash(client, settings_.client)
                                                                       : static_cast<std::size_t>(random());
  for (const bool marked : {false, true}) {
    for (std::size_t i = 0; i < active_.size(); ++i) {
      const BackendPointer& backend = active_[(start + i) % active_.size()];
      if (is_new(backend) && (marked || admits(*backend, now))) return backend;
    }
  }
  return {};
}

bool Service::admits(Backend& backend, Clock::time_point now) const {
  return settings_.eject ? !backend.is_marked(now) : backend.admits(now);
}

void Service::reached(Backend& backend) const {
  const bool is_news = settings_.eject ? backend.connected_unless_ejected(Clock::now()) : backend.connected();
  if (!is_news || !state_->report) return;
  // A UDP backend may be one that never answers.
  const bool is_udp = settings_.protocol == config::Protocol::udp;
  state_->report(spdlog::level::info,
                 fmt::format("service {}: backend {} {}", config::printable(settings_.name), backend.address.text(),
                             is_udp ? "does not refuse any more" : "answers again"));
}

void Service::failed(Backend& backend, int error, Clock::time_point now, Clock::time_point began) const {
  const auto pause = settings_.eject ? eject(backend, now) : backend.failed(now, began);
  if (!pause || !state_->report) return;
  const std::string what =
      fmt::format("service {}: backend {} does not answer", config::printable(settings_.name), backend.address.text());
  state_->report(spdlog::level::warn, fmt::format("{}; {} {}", config::fail_errno(error, what).error().message,
                                                  settings_.eject ? "ejected for" : "tried again in", text_of(*pause)));
}

/// After so many failures in a row, but never more than half of the backends. The row goes on beyond the ejection: one
/// failure more, and it is ejected again.
std::optional<Clock::duration> Service::eject(Backend& backend, Clock::time_point now) const {
  if (!backend.failed_too_often(now, settings_.eject->failures)) return {};
  const std::lock_guard lock(state_->ejecting);
  if (!is_active(backend) || backend.is_marked(now)) return {};
  const auto ejected = std::ranges::count_if(active_, [&](const auto& each) { return each->is_marked(now); });
  if (2 * (static_cast<std::size_t>(ejected) + 1) > active_.size()) return {};
  return backend.eject(now, settings_.eject->time);
}

void Service::remember(const SocketAddress& client, const BackendPointer& backend, std::size_t limit) const {
  if (!settings_.affinity) return;
  state_->affinity.remember(client_hash(client, settings_.client), backend, Clock::now(), *settings_.affinity, limit);
}

}  // namespace userspace
