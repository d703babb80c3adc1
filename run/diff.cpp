// SPDX-License-Identifier: BSD-2-Clause
#include "run/diff.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <map>
#include <string_view>
#include <utility>
#include <vector>

#include "config/names.h"
#include "config/printable.h"
#include "config/values.h"

namespace run {
namespace {

using Endpoint = std::pair<config::Address, std::uint16_t>;

constexpr std::size_t max_named = 10;

/// The first of them; of the others, how many there are.
std::string join(const std::vector<std::string>& parts) {
  const std::size_t named = std::min(parts.size(), max_named);
  std::string text =
      fmt::format("{}", fmt::join(parts.begin(), parts.begin() + static_cast<std::ptrdiff_t>(named), ", "));
  if (parts.size() > named) text += fmt::format(" and {} more", parts.size() - named);
  return text;
}

std::string text_of(const Endpoint& endpoint) { return config::to_text(endpoint.first, endpoint.second); }

void compare_backends(const config::Service& before, const config::Service& after, std::vector<std::string>& changes) {
  std::map<Endpoint, const config::Backend*> had;
  for (const config::Backend& backend : before.backends) had.emplace(Endpoint(backend.address, backend.port), &backend);
  for (const config::Backend& backend : after.backends) {
    const Endpoint endpoint(backend.address, backend.port);
    const auto found = had.find(endpoint);
    if (found == had.end()) {
      changes.push_back(fmt::format("+ {}", text_of(endpoint)));
      continue;
    }
    const config::Backend& old = *found->second;
    if (old.weight != backend.weight)
      changes.push_back(fmt::format("{} weight {} -> {}", text_of(endpoint), old.weight, backend.weight));
    if ((old.state == config::BackendState::drain) != (backend.state == config::BackendState::drain))
      changes.push_back(fmt::format("{} {} -> {}", text_of(endpoint), config::name_of(config::state_names, old.state),
                                    config::name_of(config::state_names, backend.state)));
    had.erase(found);
  }
  for (const auto& [endpoint, backend] : had) changes.push_back(fmt::format("- {}", text_of(endpoint)));
}

/// What differs between two versions of one service, by the names of the keys.
std::vector<std::string> compare(const config::Service& before, const config::Service& after) {
  std::vector<std::string> changes;
  const auto note = [&](bool differs, std::string_view key) {
    if (differs) changes.emplace_back(key);
  };
  note(before.vip != after.vip || before.port != after.port || before.protocol != after.protocol, "vip");
  note(before.policy != after.policy, "policy");
  note(before.affinity != after.affinity, "affinity");
  note(before.client != after.client, "client");
  note(before.panic != after.panic, "panic");
  note(before.mark != after.mark, "mark");
  note(before.proxy_protocol != after.proxy_protocol, "proxy_protocol");
  note(before.no_backend != after.no_backend, "no_backend");
  note(before.engine != after.engine, "engine");
  note(before.health != after.health, "health");
  note(before.eject != after.eject, "eject");
  note(before.on_remove != after.on_remove, "on_remove");
  compare_backends(before, after, changes);
  return changes;
}

}  // namespace

std::string describe_change(const config::Config& before, const config::Config& after) {
  std::map<std::string_view, const config::Service*> had;
  for (const config::Service& service : before.services) had.emplace(service.name, &service);
  std::vector<std::string> added;
  std::vector<std::string> changed;
  std::vector<std::string> removed;
  for (const config::Service& service : after.services) {
    const auto found = had.find(service.name);
    if (found == had.end()) {
      added.push_back(config::printable(service.name));
      continue;
    }
    if (const auto changes = compare(*found->second, service); !changes.empty())
      changed.push_back(fmt::format("{}: {}", config::printable(service.name), join(changes)));
    had.erase(found);
  }
  for (const auto& [name, service] : had) removed.push_back(config::printable(name));

  std::string text;
  const auto add = [&](std::size_t count, std::string_view verb, const std::vector<std::string>& names) {
    if (count == 0) return;
    if (text.empty())
      text = fmt::format("{} service{} {} ({})", count, count == 1 ? "" : "s", verb, join(names));
    else
      text += fmt::format(", {} {} ({})", count, verb, join(names));
  };
  add(added.size(), "added", added);
  add(changed.size(), "changed", changed);
  add(removed.size(), "removed", removed);
  return text;
}

std::string late_keys(const config::Config& before, const config::Config& after) {
  std::vector<std::string> keys;
  const auto note = [&](bool differs, const char* key) {
    if (differs) keys.emplace_back(key);
  };
  note(before.engine.mode != after.engine.mode, "engine.mode");
  note(before.engine.cgroup != after.engine.cgroup, "engine.cgroup");
  note(before.engine.pin != after.engine.pin, "engine.pin");
  note(before.engine.watch != after.engine.watch, "engine.watch");
  note(before.engine.control != after.engine.control, "engine.control");
  note(before.metrics.listen != after.metrics.listen, "metrics.listen");
  note(before.kubernetes != after.kubernetes, "kubernetes");
  return fmt::format("{}", fmt::join(keys, ", "));
}

}  // namespace run
