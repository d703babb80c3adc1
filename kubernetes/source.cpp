// SPDX-License-Identifier: BSD-2-Clause
#include "kubernetes/source.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <climits>
#include <cstdlib>
#include <iterator>
#include <utility>

namespace kubernetes {
namespace {

// A rollout changes an EndpointSlice several times within moments; what came meanwhile is handed on together.
constexpr auto coalescing_time = std::chrono::milliseconds(1);

/// What a DaemonSet says (NODE_NAME), else the host's name, by which kubelets register.
std::string this_node() {
  if (const char* told = std::getenv("NODE_NAME"); told != nullptr) return told;
  std::array<char, HOST_NAME_MAX + 1> name{};
  ::gethostname(name.data(), name.size() - 1);
  std::string node = name.data();
  std::ranges::transform(node, node.begin(), [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return node;
}

}  // namespace

config::Result<std::unique_ptr<Source>> Source::create(boost::asio::io_context& io, const config::Kubernetes& choices,
                                                       const Pace& pace, Handlers handlers) {
  const auto access = find_access(choices);
  if (!access) return std::unexpected(access.error());
  std::unique_ptr<Source> source(new Source(io, std::move(handlers)));
  source->server_ = access->origin;
  config::Kubernetes resolved = choices;
  if (resolved.node.empty()) resolved.node = this_node();
  std::vector<std::string> spaces = choices.namespaces;
  if (spaces.empty()) spaces.emplace_back();
  const auto plugin = access->exec ? std::make_shared<Plugin>(io, *access->exec, pace.exec_time) : nullptr;
  for (const std::string& space : spaces) {
    Part& part = source->parts_.emplace_back(space, resolved);
    auto client = Client::create(io, *access, plugin, space, choices.selector, pace, part.store,
                                 {.changed = [whole = source.get()] { whole->note_change(); },
                                  .resolved = source->handlers_.resolved,
                                  .tell = source->handlers_.tell});
    if (!client) return std::unexpected(client.error());
    part.client = std::move(*client);
  }
  return source;
}

bool Source::is_complete() const {
  return std::ranges::all_of(parts_, [](const Part& part) { return part.store.is_complete(); });
}

void Source::note_change() {
  if (is_waiting_) return;
  is_waiting_ = true;
  coalescing_.expires_after(coalescing_time);
  coalescing_.async_wait([this](const boost::system::error_code& cancelled) {
    is_waiting_ = false;
    if (!cancelled) hand_on();
  });
}

void Source::hand_on() {
  std::vector<Change> changes;
  bool is_news = false;
  for (Part& part : parts_) {
    if (part.store.is_complete()) {
      if (!std::exchange(part.is_handed_on, true)) {
        is_news = true;
        handlers_.listed(part.space);
      }
      std::ranges::move(part.store.take_changes(), std::back_inserter(changes));
    }
    for (const std::string& problem : part.store.take_problems()) handlers_.tell(true, "kubernetes: " + problem);
  }
  if (is_news || !changes.empty()) handlers_.changed(std::move(changes));
}

SourceStatus Source::status() const {
  SourceStatus status{.server = server_,
                      .is_complete = is_complete(),
                      .is_current = true,
                      .last_current = std::chrono::steady_clock::time_point::max(),
                      .problem = {},
                      .counts = {}};
  for (const Part& part : parts_) {
    status.is_current = status.is_current && part.client->is_current();
    status.last_current = std::min(status.last_current, part.client->last_current());
    if (status.problem.empty()) status.problem = part.client->problem();
    status.services += part.store.services();
    status.slices += part.store.slices();
    const Counts counts = part.client->counts();
    status.counts.lists += counts.lists;
    status.counts.events += counts.events;
    status.counts.failures += counts.failures;
    status.counts.bytes += counts.bytes;
  }
  return status;
}

}  // namespace kubernetes
