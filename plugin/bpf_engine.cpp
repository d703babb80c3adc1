// SPDX-License-Identifier: BSD-2-Clause
#include "plugin/bpf_engine.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <map>
#include <utility>

#include "balance/alias_table.h"
#include "config/read_config.h"
#include "plugin/bpf_object.h"

namespace plugin {

namespace {

/// The service behind the canary's VIP. Its name is none that a configuration could use.
config::Service canary_service() {
  config::Service service;
  service.name = "(canary)";
  service.vip = boost::asio::ip::make_address_v4(CANARY_VIP);
  service.port = CANARY_PORT;
  service.protocol = config::Protocol::udp;
  service.backends.push_back({.address = boost::asio::ip::make_address_v4(CANARY_BACKEND),
                              .port = CANARY_PORT,
                              .weight = 1,
                              .state = config::BackendState::active,
                              .position = {}});
  return service;
}

bool is_canary(const config::Service& service) {
  return service.vip.is_v4() && service.vip.to_v4().to_uint() == CANARY_VIP;
}

std::size_t count_backends(std::span<const config::Service> services) {
  std::size_t count = 0;
  for (const auto& service : services) {
    count += service.backends.size();
  }
  return count;
}

/// What has been counted so far goes on counting when new maps take the place of the old.
void carry_counters(const Maps& from, const Maps& to, const Publisher& publisher) {
  for (const auto& old : read_published(from)) {
    const PublishedService* now = publisher.find_published(encode_key(old.service));
    if (now == nullptr) {
      continue;
    }
    to.add_counters(now->record, from.read_counters(old.record));
    std::map<std::pair<config::Address, std::uint16_t>, std::uint32_t> index_now;
    for (std::size_t i = 0; i < now->backends.size(); ++i) {
      index_now.emplace(std::pair(now->service.backends[i].address, now->service.backends[i].port), now->backends[i]);
    }
    for (std::size_t i = 0; i < old.backends.size(); ++i) {
      const auto& backend = old.service.backends[i];
      if (const auto same = index_now.find({backend.address, backend.port}); same != index_now.end()) {
        to.add_counters(to.backend_stats(same->second), from.read_counters(from.backend_stats(old.backends[i])));
      }
    }
  }
}

}  // namespace

Result<std::unique_ptr<BpfEngine>> BpfEngine::open(EngineOptions options) {
  auto can = probe();
  if (!can) {
    return std::unexpected(can.error());
  }
  if (!can->fast_path()) {
    return fail(-EOPNOTSUPP, can->reason);
  }
  std::unique_ptr<BpfEngine> engine(new BpfEngine(std::move(options), std::move(*can)));
  if (auto opened = engine->open_paths(); !opened) {
    return std::unexpected(opened.error());
  }
  return engine;
}

BpfEngine::~BpfEngine() {
  // A link ends with its descriptor; without bpf_link the program would stay.
  if (attachment_ && !attachment_->link() && !pins_) {
    (void)attachment_->detach();
  }
}

Result<void> BpfEngine::open_paths() {
  if (!options_.cgroup.empty()) {
    if (auto cgroup = open_cgroup(options_.cgroup); !cgroup) {
      return std::unexpected(cgroup.error());
    }
  }
  if (!options_.pin.empty() && !pins_) {
    auto pins = PinDirectory::open(options_.pin);
    if (!pins) {
      return std::unexpected(pins.error());
    }
    pins_ = std::move(*pins);
  }
  return {};
}

Result<void> BpfEngine::become_writer() {
  if (!pins_ || pins_->is_locked()) {
    return {};
  }
  auto adopted = pins_->lock();
  if (adopted && pins_->has_state()) {
    adopted = adopt();
  }
  if (!adopted) {
    pins_->unlock();  // locked means adopted
  }
  return adopted;
}

Result<void> BpfEngine::adopt() {
  auto maps = pins_->open_maps();
  if (!maps) {
    return std::unexpected(maps.error());
  }
  auto state = std::make_unique<State>(std::move(*maps));
  auto publisher = Publisher::adopt(state->maps);
  if (!publisher) {
    return std::unexpected(publisher.error());
  }
  state->publisher.emplace(std::move(*publisher));
  auto attachment = pins_->attachment();
  if (!attachment && attachment.error().code != -ENOENT) {
    return std::unexpected(attachment.error());
  }

  attachment_.reset();
  if (attachment) {
    attachment_ = std::move(*attachment);
  }
  limits_.services = state->maps.meta().limit_services;
  limits_.backends = state->maps.meta().limit_backends;
  state_ = std::move(state);
  return {};
}

/// A link ends with its cgroup; what is left of it is not an attachment.
Result<void> BpfEngine::drop_dead_attachment() {
  if (attachment_ && attachment_->link()) {
    const auto id = attachment_->cgroup_id();
    if (!id) {
      return std::unexpected(id.error());
    }
    if (*id == 0) {
      attachment_.reset();
    }
  }
  return {};
}

Result<std::unique_ptr<BpfEngine::State>> BpfEngine::fresh_state(std::span<config::Service> services) {
  auto maps = Maps::create(Capacity::for_services(services.size(), count_backends(services)));
  if (!maps) {
    return std::unexpected(maps.error());
  }
  auto state = std::make_unique<State>(std::move(*maps));
  auto publisher = Publisher::create(state->maps);
  if (!publisher) {
    return std::unexpected(publisher.error());
  }
  state->publisher.emplace(std::move(*publisher));
  if (auto applied = state->publisher->apply(services); !applied) {
    return std::unexpected(applied.error());
  }
  return state;
}

Result<void> BpfEngine::publish(std::span<config::Service> services) {
  if (state_) {
    const Capacity& capacity = state_->maps.capacity();
    if (services.size() <= capacity.services && count_backends(services) <= capacity.backends) {
      auto applied = state_->publisher->apply(services);
      if (applied || applied.error().code != -ENOSPC) {
        return applied;
      }
    }
  }
  // Too small, or free only in pieces: new maps beside the old ones, made live by exchanging the program.
  auto next = fresh_state(services);
  if (!next) {
    return std::unexpected(next.error());
  }
  return adopt_replacement(std::move(*next));
}

Result<void> BpfEngine::adopt_replacement(std::unique_ptr<State> next) {
  if (attachment_) {
    if (auto live = make_live(*next); !live) {
      return live;
    }
    // Nothing counts in the old maps any more once the programs that run now have ended.
    if (const auto grace = GracePeriod::create(); grace && grace->wait()) {
      carry_counters(state_->maps, next->maps, *next->publisher);
    }
  }
  state_ = std::move(next);
  return {};
}

Result<void> BpfEngine::load(config::Config config) {
  // Paths from [engine] stay only if the load succeeds.
  const EngineOptions before = options_;
  const bool had_pins = pins_.has_value();
  if (options_.cgroup.empty()) {
    options_.cgroup = config.engine.cgroup;
  }
  if (options_.pin.empty() && options_.engine_table) {
    options_.pin = config.engine.pin;
  }
  auto loaded = load_services(config);
  if (!loaded) {
    options_ = before;
    if (!had_pins && !state_) {
      pins_.reset();
    }
  }
  return loaded;
}

Result<void> BpfEngine::load_services(config::Config& config) {
  if (auto opened = open_paths(); !opened) {
    return opened;
  }
  if (auto writer = become_writer(); !writer) {
    return writer;
  }
  if (auto dropped = drop_dead_attachment(); !dropped) {
    return dropped;
  }
  if (attachment_) {  // what is published now is live at once: not for another cgroup
    if (const auto cgroup = own_cgroup(); !cgroup) {
      return std::unexpected(cgroup.error());
    }
  }
  config.services.push_back(canary_service());
  if (auto published = publish(config.services); !published) {
    return published;
  }
  limits_ = config.limits;
  note_limits();
  return {};
}

void BpfEngine::note_limits() const {
  state_->maps.meta().limit_services = limits_.services;
  state_->maps.meta().limit_backends = limits_.backends;
}

Result<void> BpfEngine::set_backends(std::string_view name, std::vector<config::Backend> backends) {
  if (auto writer = become_writer(); !writer) {
    return writer;
  }
  const config::Service* service = state_ ? state_->publisher->find(name) : nullptr;
  if (service == nullptr || is_canary(*service)) {
    return fail(-ENOENT, "there is no service \"" + std::string(name) + "\"");
  }
  if (const auto mistakes = config::check_backends(*service, backends); !mistakes.empty()) {
    return fail(-EBADMSG, mistakes.front().message);
  }
  for (const auto& backend : backends) {
    if (const auto* other = state_->publisher->find(encode_key(backend.address, backend.port, service->protocol))) {
      return fail(-EBADMSG,
                  "a backend of service \"" + std::string(name) + "\" is the VIP of service \"" + other->name + "\"");
    }
  }
  const std::size_t total = state_->publisher->backend_count() - service->backends.size() + backends.size();
  const std::size_t limit = std::size_t{limits_.backends} + canary_service().backends.size();
  if (total > limit) {
    return fail(-EBADMSG, "limits.backends: at most " + std::to_string(limits_.backends) + ", got " +
                              std::to_string(total - canary_service().backends.size()));
  }

  if (total <= state_->maps.capacity().backends) {
    auto set = state_->publisher->set_backends(name, backends);
    if (set || set.error().code != -ENOSPC) {
      return set;
    }
  }
  auto services = state_->publisher->services();
  std::ranges::find(services, name, &config::Service::name)->backends = std::move(backends);
  auto next = fresh_state(services);
  if (!next) {
    return std::unexpected(next.error());
  }
  if (auto adopted = adopt_replacement(std::move(*next)); !adopted) {
    return adopted;
  }
  note_limits();
  return {};
}

Result<void> BpfEngine::attach() {
  if (auto writer = become_writer(); !writer) {
    return writer;
  }
  if (auto dropped = drop_dead_attachment(); !dropped) {
    return dropped;
  }
  if (!state_) {
    config::Service canary[] = {canary_service()};
    auto state = fresh_state(canary);
    if (!state) {
      return std::unexpected(state.error());
    }
    state_ = std::move(*state);
    note_limits();
  }
  return make_live(*state_);
}

/// The cgroup to attach to; an error when this handle, or its pin path, is attached to another one.
Result<Cgroup> BpfEngine::own_cgroup() const {
  auto cgroup = open_cgroup(options_.cgroup);
  if (cgroup && attachment_ && state_->maps.meta().cgroup_id != cgroup->id) {
    return fail(-EEXIST, (pins_ ? pins_->path() + " is" : "this handle is") + " attached to another cgroup, " +
                             state_->maps.meta().cgroup_path + ": detach it first" +
                             (pins_ ? " (`clusterip unload --pin " + pins_->path() + "`)" : ""));
  }
  return cgroup;
}

Result<void> BpfEngine::make_live(State& next) {
  const auto cgroup = own_cgroup();
  if (!cgroup) {
    return std::unexpected(cgroup.error());
  }
  const Capacity& capacity = next.maps.capacity();
  auto program = load_program(Maps::names(), next.maps.fds(),
                              {.can_set_errno = can_.set_errno,
                               .stats_shard_mask = capacity.shards - 1,
                               .stats_per_shard = capacity.stats_per_shard(),
                               .stats_backends = next.maps.backend_stats(0)});
  if (!program) {
    return std::unexpected(program.error());
  }
  auto& meta = next.maps.meta();
  meta.cgroup_id = cgroup->id;
  std::memset(meta.cgroup_path, 0, sizeof meta.cgroup_path);
  std::memcpy(meta.cgroup_path, cgroup->path.data(), cgroup->path.size());

  if (pins_) {
    if (auto staged = pins_->stage(next.maps, *program); !staged) {
      return staged;
    }
  }
  if (attachment_) {
    if (auto replaced = attachment_->replace(*program); !replaced) {
      if (pins_) {
        pins_->discard_staged();
      }
      return replaced;
    }
  } else {
    auto attached = Attachment::attach(*cgroup, *program, can_.link);
    if (attached && pins_ && attached->link()) {
      if (auto pinned = pins_->stage_link(attached->link()); !pinned) {
        (void)attached->detach();
        attached = std::unexpected(pinned.error());
      }
    }
    if (!attached) {
      if (pins_) {
        pins_->discard_staged();
      }
      return std::unexpected(attached.error());
    }
    attachment_ = std::move(*attached);
  }
  return pins_ ? pins_->commit_staged() : Result<void>{};
}

Result<void> BpfEngine::detach() {
  // Not become_writer(): state that cannot be adopted can be removed all the same.
  const bool was_writer = !pins_ || pins_->is_locked();
  if (!was_writer) {
    if (auto locked = pins_->lock(); !locked) {
      return locked;
    }
  }
  auto detached = detach_and_unpin();
  if (!detached && !was_writer) {
    pins_->unlock();
  }
  return detached;
}

Result<void> BpfEngine::detach_and_unpin() {
  if (pins_) {
    if (auto owned = pins_->check_owned(); !owned) {
      return owned;
    }
  }
  if (!attachment_ && pins_ && pins_->has_state()) {
    auto attachment = pins_->attachment();
    if (attachment) {
      attachment_ = std::move(*attachment);
    } else if (attachment.error().code != -ENOENT) {
      return std::unexpected(attachment.error());
    }
  }
  if (attachment_) {
    if (auto detached = attachment_->detach(); !detached) {
      return detached;
    }
    attachment_.reset();
  }
  if (state_) {
    state_->maps.meta().cgroup_id = 0;
  }
  return pins_ ? pins_->remove() : Result<void>{};
}

Result<void> BpfEngine::for_reading(const std::function<Result<void>(const Maps&)>& read) {
  if (state_) {
    return read(state_->maps);
  }
  if (!pins_) {
    return fail(-ENOENT, "nothing is loaded");
  }
  const auto maps = pins_->open_maps();
  if (!maps) {
    return std::unexpected(maps.error());
  }
  return read(*maps);
}

Result<Resolution> BpfEngine::resolve(const config::Address& vip, std::uint16_t port, config::Protocol protocol) {
  Resolution resolution;
  auto done = for_reading([&](const Maps& maps) -> Result<void> {
    // The same steps as decide() of clusterip.bpf.c.
    const Key key = encode_key(vip, port, protocol);
    const auto record = maps.find_key(key);
    const auto services = maps.records();
    const std::uint64_t word = record && *record < services.size()
                                   ? std::atomic_ref(services[*record].word).load(std::memory_order_acquire)
                                   : 0;
    if (word == 0) {
      const bool route_only = port == 0 && protocol == config::Protocol::udp;
      resolution.verdict = !route_only && maps.find_key(marker_of(key)) ? Verdict::no_service : Verdict::pass;
      return {};
    }
    const Block block = decode_word(word);
    if (!block.is_within(maps.slots().size())) {
      return fail(-EPROTO, "the pinned state is damaged: run `clusterip unload` and load again");
    }
    resolution.service = decode_service(services[*record]).name;
    resolution.backends = block.slots;
    if (block.slots == 0) {
      resolution.verdict = Verdict::no_backend;
      return {};
    }
    const auto [column, position] = balance::place(arc4random(), block.slots);
    const auto& slot = maps.slots()[block.header + 1 + column].slot;
    const std::uint32_t index = position < slot.threshold ? slot.backend : slot.alias;
    if (index >= maps.backends().size()) {
      return fail(-EPROTO, "the pinned state is damaged: run `clusterip unload` and load again");
    }
    resolution.verdict = Verdict::rewritten;
    resolution.backend = decode_backend(maps.backends()[index]);
    return {};
  });
  if (!done) {
    return std::unexpected(done.error());
  }
  return resolution;
}

Result<std::vector<ServiceStatus>> BpfEngine::status() {
  std::vector<ServiceStatus> status;
  auto done = for_reading([&status](const Maps& maps) -> Result<void> {
    for (auto& published : read_published(maps)) {
      if (is_canary(published.service)) {
        continue;
      }
      ServiceStatus one{
          .service = std::move(published.service), .total = maps.read_counters(published.record), .connects = {}};
      for (const std::uint32_t index : published.backends) {
        one.connects.push_back(maps.read_counters(maps.backend_stats(index)).connects);
      }
      status.push_back(std::move(one));
    }
    return {};
  });
  if (!done) {
    return std::unexpected(done.error());
  }
  return status;
}

Result<CanaryResult> BpfEngine::canary() {
  std::string path;
  std::uint64_t id = 0;
  auto done = for_reading([&](const Maps& maps) -> Result<void> {
    path = maps.meta().cgroup_path;
    id = maps.meta().cgroup_id;
    return {};
  });
  if (!done && done.error().code != -ENOENT) {
    return std::unexpected(done.error());
  }
  if (id == 0) {
    return fail(-ENOTCONN, done ? "not attached" : "not attached: " + done.error().message);
  }
  auto cgroup = open_cgroup(path);
  if (!cgroup) {
    return std::unexpected(cgroup.error());
  }
  if (cgroup->id != id) {
    return fail(-ENOTCONN, "the cgroup " + path + " is not the one that was attached to: that one is gone");
  }
  return run_canary(*cgroup);
}

}  // namespace plugin
