// SPDX-License-Identifier: BSD-2-Clause
#include "plugin/bpf_engine.h"

#include <arpa/inet.h>
#include <bpf/bpf.h>
#include <sys/random.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <map>
#include <set>
#include <utility>

#include "balance/alias_table.h"
#include "config/read_config.h"
#include "plugin/bpf_object.h"
#include "plugin/carry_counts.h"
#include "plugin/ejection.h"
#include "plugin/socket_sweep.h"

namespace plugin {

namespace {

/// The service behind the canary's VIP. Its name is none that a configuration could use.
config::Service canary_service() {
  config::Service service;
  service.name = CANARY_NAME;
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

/// Where the programs' random choices begin. Chance matters, secrecy does not: early in a boot, the time will do.
std::uint64_t random_seed() {
  std::uint64_t seed = 0;
  if (getrandom(&seed, sizeof seed, GRND_NONBLOCK) != sizeof seed) {
    timespec now{};
    clock_gettime(CLOCK_REALTIME, &now);
    seed = static_cast<std::uint64_t>(now.tv_sec) << 32 ^ static_cast<std::uint64_t>(now.tv_nsec);
  }
  return seed;
}

/// Below 0 for a moment while counts move to new maps.
std::uint32_t read_live(const backend_record& record) {
  const auto live = static_cast<std::int32_t>(std::atomic_ref(record.live).load(std::memory_order_relaxed));
  return static_cast<std::uint32_t>(std::max(live, 0));
}

/// What is published for a service that the userspace engine carries: without it, a VIP that it shares with another
/// service would refuse its port. One that asks for the engine bpf nobody carries: it is refused.
config::Service pass_entry(const config::Service& service) {
  config::Service entry = service;
  entry.no_backend = service.engine == config::EngineMode::bpf ? config::NoBackend::refuse : config::NoBackend::pass;
  entry.engine = config::EngineMode::userspace;
  entry.backends.clear();
  return entry;
}

bool is_left_out(const config::Service& service) { return service.engine == config::EngineMode::userspace; }

/// Of one that is left out, as it is published: refuse_left_out().
bool is_refused(const config::Service& service) { return service.no_backend == config::NoBackend::refuse; }

constexpr const char* mode_userspace = "engine.mode is \"userspace\"";

std::string refusal_of(const config::Service& service, const std::string& reason) {
  return "service \"" + service.name + "\": " + reason +
         "; the userspace engine can carry it (clusterip run, by mode = \"auto\")";
}

bool wants_eject(std::span<const PublishedService> published) {
  return std::ranges::any_of(published, [](const PublishedService& one) { return one.service.eject.has_value(); });
}

/// Different backends that the slots of a block name and that are not ejected.
std::uint32_t count_choices(const Maps& maps, const Block& block) {
  const std::uint64_t now = monotonic_now();
  std::set<std::uint32_t> backends;
  for (const auto& entry : maps.slots().subspan(block.header + 1, block.slots)) {
    if (entry.slot.backend < maps.backends().size() && !is_ejected(maps.backends()[entry.slot.backend], now)) {
      backends.insert(entry.slot.backend);
    }
  }
  return static_cast<std::uint32_t>(backends.size());
}

/// The same rule as apply_policy() of clusterip.bpf.c; to Maglev and affinity, each call is a client of its own.
std::uint32_t apply_policy(const Maps& maps, const service_record& record, const Block& block) {
  const auto slot = [&](std::uint32_t at) { return maps.slots()[block.header + 1 + at].slot; };
  const auto [column, position] = balance::place(arc4random(), block.slots);
  const auto& drawn = slot(column);
  switch (maps.slots()[block.header].header.policy) {
    case POLICY_ROUND_ROBIN: {
      const auto turn = std::atomic_ref(const_cast<__u32&>(record.turn)).load(std::memory_order_relaxed);
      return slot(turn % block.slots).backend;
    }
    case POLICY_MAGLEV:
      return drawn.backend;
    default:
      break;
  }
  const std::uint32_t first = position < drawn.threshold ? drawn.backend : drawn.alias;
  if (maps.slots()[block.header].header.policy != POLICY_LEAST_CONN || block.slots < 2) {
    return first;
  }
  std::uint32_t other = balance::place(arc4random(), block.slots).column;
  if (slot(other).backend == first) {
    other = (other + 1) % block.slots;
  }
  const std::uint32_t second = slot(other).backend;
  const auto backends = maps.backends();
  if (first >= backends.size() || second >= backends.size()) {
    return first;
  }
  const std::uint64_t first_load = std::uint64_t{read_live(backends[first])} * backends[second].weight;
  const std::uint64_t second_load = std::uint64_t{read_live(backends[second])} * backends[first].weight;
  return second_load < first_load ? second : first;
}

/// The same rule as choose() of clusterip.bpf.c.
std::uint32_t choose(const Maps& maps, const service_record& record, const Block& block) {
  const std::uint32_t chosen = apply_policy(maps, record, block);
  const auto backends = maps.backends();
  const std::uint64_t now = monotonic_now();
  const auto can_be = [&](std::uint32_t index) { return index < backends.size() && !is_ejected(backends[index], now); };
  const auto& header = maps.slots()[block.header].header;
  if (chosen >= backends.size() || can_be(chosen) || (header.flags & BLOCK_EJECT) == 0) {
    return chosen;
  }
  for (int i = 0; i < EJECT_REDRAWS; ++i) {
    const auto [column, position] = balance::place(arc4random(), block.slots);
    const slot& drawn = maps.slots()[block.header + 1 + column].slot;
    const bool has_sides = header.policy == POLICY_RANDOM || header.policy == POLICY_LEAST_CONN;
    const std::uint32_t other = has_sides && position >= drawn.threshold ? drawn.alias : drawn.backend;
    if (can_be(other)) {
      return other;
    }
  }
  const auto members = members_of(block, maps.slots());
  const std::uint32_t place = std::atomic_ref(backends[chosen].place).load(std::memory_order_relaxed);
  if (place >= members.size()) {
    return chosen;
  }
  const eject_group group = eject_group_of(place, static_cast<std::uint32_t>(members.size()));
  const std::uint32_t first = arc4random_uniform(group.size);
  for (std::uint32_t i = 0; i < group.size; ++i) {
    const std::uint32_t other = members[group.first + (first + i) % group.size].slot.backend;
    if (can_be(other)) {
      return other;
    }
  }
  return chosen;
}

/// For how long a backend is still ejected, rounded up.
std::chrono::milliseconds ejected_for(const backend_record& backend) {
  const std::uint64_t now = monotonic_now();
  const std::uint64_t until =
      std::atomic_ref(const_cast<__u64&>(backend.ejected_until)).load(std::memory_order_relaxed);
  return std::chrono::ceil<std::chrono::milliseconds>(std::chrono::nanoseconds(until > now ? until - now : 0));
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
  if (attachment_.is_attached() && !attachment_.has_link() && !pins_) {
    (void)attachment_.detach();
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

  attachment_ = attachment ? std::move(*attachment) : Attachment{};
  limits_.services = state->maps.meta().limit_services;
  limits_.backends = state->maps.meta().limit_backends;
  limits_.flows = state->maps.meta().limit_flows;
  state_ = std::move(state);
  return {};
}

Result<std::unique_ptr<BpfEngine::State>> BpfEngine::fresh_state(std::span<config::Service> services, bool peer_names) {
  Need need = Need::of(services, limits_);
  Capacity capacity = Capacity::for_need(need);
  if (state_) {
    // Indices stay what they are, and those that connections still count at are not free.
    need.backends += state_->publisher->held_backends().size();
    const Capacity& before = state_->maps.capacity();
    capacity = Capacity::for_need(need);
    capacity.services = std::max(capacity.services, before.services);
    capacity.backends = std::max(capacity.backends, before.backends);
    capacity.entries = std::max(capacity.entries, before.entries);
    if (need.affinities == 0) {
      capacity.affinities = before.affinities;
    }
  }
  auto maps = Maps::create(capacity, state_ ? &state_->maps : nullptr);
  if (!maps) {
    return std::unexpected(maps.error());
  }
  auto state = std::make_unique<State>(std::move(*maps));
  auto publisher = Publisher::create(state->maps, state_ ? &*state_->publisher : nullptr);
  if (!publisher) {
    return std::unexpected(publisher.error());
  }
  state->publisher.emplace(std::move(*publisher));
  if (auto applied = state->publisher->apply(services, peer_names); !applied) {
    return std::unexpected(applied.error());
  }
  state->publisher->settle();
  return state;
}

Result<void> BpfEngine::publish(std::span<config::Service> services, bool peer_names) {
  if (state_ && state_->maps.capacity().has_room_for(Need::of(services, limits_))) {
    auto applied = state_->publisher->apply(services, peer_names);
    if (applied || applied.error().code != -ENOSPC) {
      return applied;
    }
  }
  // Too small, or free only in pieces: new maps beside the old ones, made live by exchanging the programs.
  auto next = fresh_state(services, peer_names);
  if (!next) {
    return std::unexpected(next.error());
  }
  return adopt_replacement(std::move(*next));
}

Result<void> BpfEngine::adopt_replacement(std::unique_ptr<State> next) {
  if (attachment_.is_attached()) {
    if (auto live = make_live(*next); !live) {
      return live;
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
  if (auto dropped = attachment_.drop_dead(); !dropped) {
    return dropped;
  }
  if (attachment_.is_attached()) {  // what is published now is live at once: not for another cgroup
    if (const auto cgroup = own_cgroup(); !cgroup) {
      return std::unexpected(cgroup.error());
    }
  }
  auto left_out = leave_out_unsupported(config);
  if (!left_out) {
    return std::unexpected(left_out.error());
  }
  keep_down(config.services);
  config.services.push_back(canary_service());
  // Which hooks are missing follows from what is published. If they cannot be attached, what served serves again.
  std::vector<config::Service> served;
  const bool is_live = state_ && attachment_.is_attached();
  const bool served_names = is_live && state_->publisher->peer_names();
  if (is_live) {
    served = state_->publisher->services();
  }
  const config::Limits before = std::exchange(limits_, config.limits);
  if (auto published = publish(config.services, config.engine.peer_names); !published) {
    limits_ = before;
    return published;
  }
  if (auto attached = attach_missing(); !attached) {
    limits_ = before;
    if (auto restored = publish(served, served_names); !restored) {
      attached.error().message += "; and what served before could not be restored: " + restored.error().message;
    }
    return attached;
  }
  left_out_.clear();
  for (auto& service : *left_out) {
    std::string name = service.name;
    left_out_.emplace(std::move(name), std::move(service));
  }
  mode_ = config.engine.mode;
  note_limits();
  end_sockets_of_left();
  return {};
}

/// After the change, and not a part of it: what fails here is told by status().
void BpfEngine::end_sockets_of_left() {
  sweep_obstacle_.clear();
  const auto& left = state_->publisher->left();
  if ((!left.udp && !left.tcp) || !attachment_.is_attached()) {
    return;
  }
  // Connects that had begun before the change have chosen, and counted, by now.
  if (const auto grace = GracePeriod::create(); grace) {
    (void)grace->wait();
  }
  const auto has_sockets = [this](std::uint32_t index) { return read_live(state_->maps.backends()[index]) != 0; };
  if (std::ranges::any_of(left.backends, has_sockets) && can_end_sockets()) {
    sweep_obstacle_ = end_sockets(state_->maps, {.udp = left.udp, .tcp = left.tcp});
  }
}

/// Backends that are known to be down stay so where something checks them: a load is no news of them.
void BpfEngine::keep_down(std::span<config::Service> services) const {
  for (auto& service : services) {
    const config::Service* before = service.health && state_ ? state_->publisher->find(encode_key(service)) : nullptr;
    if (before == nullptr) {
      continue;
    }
    std::set<std::pair<config::Address, std::uint16_t>> down;
    for (const auto& backend : before->backends) {
      if (backend.state == config::BackendState::down) {
        down.emplace(backend.address, backend.port);
      }
    }
    for (auto& backend : service.backends) {
      if (backend.state == config::BackendState::active && down.contains({backend.address, backend.port})) {
        backend.state = config::BackendState::down;
      }
    }
  }
}

/// Replaces services that this engine is not to carry, or that this kernel cannot, by their pass entries, if that is
/// allowed; returns them.
Result<std::vector<config::Service>> BpfEngine::leave_out_unsupported(config::Config& config) const {
  std::vector<config::Service> left_out;
  const bool none = !options_.any_mode && config.engine.mode == config::EngineMode::userspace;
  if (none && !options_.allow_partial) {
    return fail(-EOPNOTSUPP, std::string(mode_userspace) + ": the userspace engine (fallback_proxy) carries it all");
  }
  for (auto& service : config.services) {
    const std::string reason = can_.reason_against(service);
    if (reason.empty() && !none) {
      continue;
    }
    if (!options_.allow_partial) {
      return fail(-EOPNOTSUPP, refusal_of(service, reason));
    }
    left_out.push_back(std::exchange(service, pass_entry(service)));
  }
  return left_out;
}

/// The hooks that what is published needs; others would only cost those who do not use us.
Hooks BpfEngine::needed_hooks(std::span<const PublishedService> published_services, bool peer_names) const {
  Hooks needed;
  needed.insert(Hook::connect4);
  needed.insert(Hook::connect6);  // also for IPv6 sockets that connect to an IPv4 address
  needed.insert(Hook::sendmsg4);  // also to refuse what is sent to a port that no service has
  needed.insert(Hook::sendmsg6);
  for (const auto& published : published_services) {
    const config::Service& service = published.service;
    if (service.port == 0 || is_canary(service) || is_left_out(service)) {
      continue;
    }
    const block_header header = encode_header(service, 0, peer_names);
    if (service.protocol == config::Protocol::udp) {
      needed.insert(Hook::recvmsg4);
      needed.insert(Hook::recvmsg6);
    }
    if ((header.flags & BLOCK_NAMED) != 0) {
      needed.insert(Hook::getpeer4);
      needed.insert(Hook::getpeer6);
    }
    if ((header.flags & BLOCK_SESSION) != 0) {
      needed.insert(Hook::release);
      if (service.protocol == config::Protocol::tcp) {
        needed.insert(Hook::sock_ops);
      }
    }
  }
  return needed & can_.hooks;
}

/// A change may need hooks that those before did without.
Result<void> BpfEngine::attach_missing() {
  const Publisher& publisher = *state_->publisher;
  const bool can_eject = (state_->maps.meta().flags & META_EJECTS) != 0 || !wants_eject(publisher.published());
  if (!attachment_.is_attached() ||
      (can_eject && attachment_.hooks().includes(needed_hooks(publisher.published(), publisher.peer_names())))) {
    return {};
  }
  return make_live(*state_);
}

/// Why a service, as it is published, is left to the userspace engine. Another process may have found that, with fewer
/// privileges.
std::string BpfEngine::reason_left_out(const config::Service& service) const {
  if (!options_.any_mode && mode_ == config::EngineMode::userspace) {
    return mode_userspace;
  }
  const auto whole = left_out_.find(service.name);
  if (whole == left_out_.end() && is_refused(service)) {
    return "no userspace engine carries it now: connects are refused";
  }
  config::Service loaded = whole != left_out_.end() ? whole->second : service;
  if (whole == left_out_.end()) {
    loaded.engine = config::EngineMode::automatic;  // what is published does not tell what the file said
  }
  const std::string reason = can_.reason_against(loaded);
  return reason.empty()
             ? "left to the userspace engine by the process that loaded it; the pins do not tell whether one runs"
             : reason;
}

void BpfEngine::note_limits() const {
  state_->maps.meta().limit_services = limits_.services;
  state_->maps.meta().limit_backends = limits_.backends;
  state_->maps.meta().limit_flows = limits_.flows;
}

Result<void> BpfEngine::set_backends(std::string_view name, std::vector<config::Backend> backends) {
  if (auto writer = become_writer(); !writer) {
    return writer;
  }
  const config::Service* service = state_ ? state_->publisher->find(name) : nullptr;
  if (service == nullptr || is_canary(*service)) {
    return fail(-ENOENT, "there is no service \"" + std::string(name) + "\"");
  }
  if (is_left_out(*service)) {
    return fail(-EOPNOTSUPP, refusal_of(*service, reason_left_out(*service)));
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
  config::Service changed = *service;
  changed.backends = backends;
  const bool peer_names = state_->publisher->peer_names();
  const std::size_t total = state_->publisher->backend_count() - service->backends.size() + backends.size();
  const std::size_t limit = std::size_t{limits_.backends} + canary_service().backends.size();
  if (total > limit) {
    return fail(-EBADMSG, "limits.backends: at most " + std::to_string(limits_.backends) + ", got " +
                              std::to_string(total - canary_service().backends.size()));
  }

  if (total <= state_->maps.capacity().backends && block_size(changed) <= state_->maps.capacity().entries) {
    auto set = state_->publisher->set_backends(name, backends);
    if (set) {
      end_sockets_of_left();
    }
    if (set || set.error().code != -ENOSPC) {
      return set;
    }
  }
  auto services = state_->publisher->services();
  std::ranges::find(services, name, &config::Service::name)->backends = std::move(backends);
  auto next = fresh_state(services, peer_names);
  if (!next) {
    return std::unexpected(next.error());
  }
  if (auto adopted = adopt_replacement(std::move(*next)); !adopted) {
    return adopted;
  }
  note_limits();
  end_sockets_of_left();
  return {};
}

Result<void> BpfEngine::set_backend_state(std::string_view name, const config::Address& address, std::uint16_t port,
                                          config::BackendState state) {
  if (auto writer = become_writer(); !writer) {
    return writer;
  }
  const config::Service* service = state_ ? state_->publisher->find(name) : nullptr;
  if (service == nullptr || is_canary(*service)) {
    return fail(-ENOENT, "there is no service \"" + std::string(name) + "\"");
  }
  if (is_left_out(*service)) {
    return fail(-EOPNOTSUPP, refusal_of(*service, reason_left_out(*service)));
  }
  auto backends = service->backends;
  const auto backend = std::ranges::find_if(
      backends, [&](const config::Backend& one) { return one.address == address && one.port == port; });
  if (backend == backends.end()) {
    return fail(-ENOENT, "service \"" + std::string(name) + "\" has no backend " + address.to_string() + " with port " +
                             std::to_string(port));
  }
  backend->state = state;
  return set_backends(name, std::move(backends));
}

Result<void> BpfEngine::refuse_left_out() {
  if (auto writer = become_writer(); !writer || !state_) {
    return writer;
  }
  auto services = state_->publisher->services();
  bool is_any_left = false;
  for (config::Service& service : services) {
    if (is_left_out(service) && !is_refused(service)) {
      service.no_backend = config::NoBackend::refuse;
      is_any_left = true;
    }
  }
  if (!is_any_left) {
    return {};
  }
  auto published = publish(services, state_->publisher->peer_names());
  if (published) {
    left_out_.clear();
  }
  return published;
}

Result<void> BpfEngine::attach() {
  if (auto writer = become_writer(); !writer) {
    return writer;
  }
  if (auto dropped = attachment_.drop_dead(); !dropped) {
    return dropped;
  }
  if (!state_) {
    config::Service canary[] = {canary_service()};
    auto state = fresh_state(canary, config::Engine{}.peer_names);
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
  if (cgroup && attachment_.is_attached() && state_->maps.meta().cgroup_id != cgroup->id) {
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
  // What is attached but not needed any more goes on, over the same maps as the rest.
  const Hooks hooks = needed_hooks(next.publisher->published(), next.publisher->peer_names()) | attachment_.hooks();
  // A kernel without sock_release cannot say by its hooks whether sockets are remembered.
  const bool has_sessions = hooks.contains(Hook::release) || !can_.hooks.contains(Hook::release);
  const bool has_eject = wants_eject(next.publisher->published());
  auto programs = load_programs(hooks, Maps::names(), next.maps.fds(),
                                {.can_set_errno = can_.set_errno,
                                 .can_mark = can_.mark,
                                 .can_netns_cookie = can_.netns_client,
                                 .can_cgroup_id = can_.cgroup_client,
                                 .can_events = can_.events && next.maps.events(),
                                 .can_comm = can_.comm,
                                 .has_udp = hooks.contains(Hook::recvmsg4),
                                 .has_sessions = has_sessions,
                                 .has_sock_ops = hooks.contains(Hook::sock_ops),
                                 .has_eject = has_eject,
                                 .filter_mask = capacity.filter_bits() - 1,
                                 .stats_shard_mask = capacity.shards - 1,
                                 .stats_per_shard = capacity.stats_per_shard(),
                                 .stats_backends = next.maps.backend_stats(0),
                                 .draw_seed = random_seed()});
  if (!programs) {
    return std::unexpected(programs.error());
  }
  auto& meta = next.maps.meta();
  meta.cgroup_id = cgroup->id;
  std::memset(meta.cgroup_path, 0, sizeof meta.cgroup_path);
  std::memcpy(meta.cgroup_path, cgroup->path.data(), cgroup->path.size());

  if (pins_) {
    if (auto staged = pins_->stage(next.maps, *programs); !staged) {
      return staged;
    }
  }
  const auto pin_link = [this](Hook hook, const Fd& link) {
    return pins_ ? pins_->stage_link(hook, link) : Result<void>{};
  };
  if (auto switched = attachment_.switch_to(*cgroup, *programs, can_.link, pin_link); !switched) {
    if (pins_) {
      pins_->discard_staged();
    }
    return switched;
  }
  // Behind the exchange: a process that is killed in between leaves one exchange too many to the next.
  meta.flags = has_eject ? meta.flags | META_EJECTS : meta.flags & ~META_EJECTS;
  // Before the old maps lose their pins: a process that is killed now leaves them to the next one.
  if (state_ && state_.get() != &next) {
    carry_counts(state_->maps, next.maps);
  }
  // No reason to fail: it runs, and a caller that took what ran before to go on would change the wrong maps. What stays
  // in next/ is moved up by the next exchange, or by the next process.
  if (pins_) {
    (void)pins_->commit_staged();
  }
  return {};
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
  if (!attachment_.is_attached() && pins_ && pins_->has_state()) {
    auto attachment = pins_->attachment();
    if (attachment) {
      attachment_ = std::move(*attachment);
    } else if (attachment.error().code != -ENOENT) {
      return std::unexpected(attachment.error());
    }
  }
  if (auto detached = attachment_.detach(); !detached) {
    return detached;
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
    const auto services = maps.records();
    constexpr int lookups = 4;
    std::optional<std::uint32_t> record;
    bool is_its_own = false;
    for (int looked = 0; looked < lookups && !is_its_own; ++looked) {
      const auto found_key = maps.find_key(key);
      if (!found_key) {
        return std::unexpected(found_key.error());
      }
      record = *found_key;
      is_its_own = !record || (*record < services.size() && has_key(services[*record], key));
    }
    if (!is_its_own) {
      return fail(-EPROTO, "the pinned state is damaged: run `clusterip unload` and load again");
    }
    const std::uint64_t word =
        record ? std::atomic_ref(services[*record].word).load(std::memory_order_acquire) : std::uint64_t{0};
    if (word == 0) {
      const bool route_only = port == 0 && protocol == config::Protocol::udp;
      const auto marker = maps.find_key(marker_of(key));
      if (!marker) {
        return std::unexpected(marker.error());
      }
      resolution.verdict = !route_only && *marker ? Verdict::no_service : Verdict::pass;
      return {};
    }
    const auto found = find_block(word, maps.slots());
    if (!found) {
      return fail(-EPROTO, "the pinned state is damaged: run `clusterip unload` and load again");
    }
    const Block& block = *found;
    resolution.service = decode_service(services[*record]).name;
    const block_header& header = maps.slots()[block.header].header;
    if ((header.flags & BLOCK_LEFT) != 0) {
      resolution.is_left_out = true;
      if (header.no_backend == NO_BACKEND_REFUSE) {
        resolution.verdict = Verdict::no_backend;
      }
      return {};
    }
    resolution.backends = count_choices(maps, block);
    if (block.slots == 0) {
      resolution.verdict = Verdict::no_backend;
      return {};
    }
    const std::uint32_t index = choose(maps, services[*record], block);
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
  std::optional<bool> found;
  const auto ends = [&found] {
    if (!found) {
      found = can_end_sockets();
    }
    return *found;
  };
  auto done = for_reading([&](const Maps& maps) -> Result<void> {
    for (auto& published : read_published(maps)) {
      if (is_canary(published.service)) {
        continue;
      }
      ServiceStatus one{.service = std::move(published.service),
                        .total = maps.read_counters(published.record),
                        .backends = {},
                        .reason = {},
                        .is_carried = true};
      if (is_left_out(one.service)) {
        one.is_carried = false;
        one.reason = reason_left_out(one.service);
        if (const auto whole = left_out_.find(one.service.name); whole != left_out_.end()) {
          one.service = whole->second;
          one.backends.resize(one.service.backends.size());
        }
        status.push_back(std::move(one));
        continue;
      }
      const bool peer_names = (maps.meta().flags & META_PEER_NAMES) != 0;
      one.reason = can_.shortcoming(one.service, peer_names, ends);
      if (one.reason.empty() && one.service.protocol == config::Protocol::udp) {
        one.reason = sweep_obstacle_;
      }
      for (const std::uint32_t index : published.backends) {
        const backend_record& backend = maps.backends()[index];
        one.backends.push_back({.counted = maps.read_counters(maps.backend_stats(index)),
                                .live = read_live(backend),
                                .ejected = ejected_for(backend)});
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
  if (pins_ && pins_->is_locked()) {
    if (const auto owned = pins_->check_owned(); !owned) {
      return std::unexpected(owned.error());
    }
  }
  std::string path;
  std::uint64_t id = 0;
  Hooks needed;
  auto done = for_reading([&](const Maps& maps) -> Result<void> {
    path = maps.meta().cgroup_path;
    id = maps.meta().cgroup_id;
    needed = needed_hooks(read_published(maps), (maps.meta().flags & META_PEER_NAMES) != 0);
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
    auto error = std::move(cgroup.error());
    // Removed, and what was attached to it has ended: the same to a host as one that was made again.
    if (error.code == -ENOENT || error.code == -ENOTDIR || error.code == -EINVAL) {
      error.code = -ENOTCONN;
    }
    return std::unexpected(std::move(error));
  }
  if (cgroup->id != id) {
    return fail(-ENOTCONN, "the cgroup " + path + " is not the one that was attached to: that one is gone");
  }
  // Whichever of two was attached first decides, and the canary would not know whom it has met.
  if (const auto other = pins_ ? pins_->neighbour_of(id) : std::nullopt; other) {
    return fail(-EEXIST,
                "another fast path is attached to " + path +
                    " as well, and whichever was attached first decides: remove one (this is the other: `clusterip "
                    "unload --pin " +
                    *other + "`)");
  }
  auto seen = run_canary(*cgroup);
  // It sees sock4_connect at work; of the others, whether they are attached. Their links are gone with their pins.
  const auto attached = pins_ ? pins_->attachment() : Result<Attachment>(fail(-ENOENT, "not pinned"));
  if (!seen || seen->rewrite_errno != 0 || !attached) {
    return seen;
  }
  for (const HookInfo& info : all_hooks) {
    if (needed.contains(info.hook) && !attached->hooks().contains(info.hook)) {
      return fail(-ENOTCONN, std::string(info.program) + " is not attached: load again");
    }
  }
  return seen;
}

Result<Destination> BpfEngine::original_destination(int socket) {
  Destination destination;
  auto done = for_reading([&](const Maps& maps) -> Result<void> {
    session session{};
    if (bpf_map_lookup_elem(maps.sessions().get(), &socket, &session) != 0) {
      const int error = errno;
      return fail_errno(error, "looking for what the socket has asked for");
    }
    if (session.asked.protocol == 0) {
      return fail(-ENOENT, "the socket's last connect() was not to a VIP");
    }
    destination = {.vip = decode_address(session.asked.address), .port = ntohs(session.asked.port)};
    return {};
  });
  if (!done) {
    return std::unexpected(done.error());
  }
  return destination;
}

Result<int> BpfEngine::enable_events(std::chrono::seconds time) {
  if (!can_.events) {
    return fail(-EOPNOTSUPP, "this kernel has no ring buffers (Linux 5.8), or does not tell programs who calls");
  }
  auto done = for_reading([&](const Maps& maps) -> Result<void> {
    if (!maps.events()) {
      return fail(-EOPNOTSUPP, "the fast path was loaded without events: load it again");
    }
    if (!events_) {
      auto reader = EventReader::open(maps.events());
      if (!reader) {
        return std::unexpected(reader.error());
      }
      events_.emplace(std::move(*reader));
    }
    timespec now{};
    clock_gettime(CLOCK_MONOTONIC, &now);
    const auto until = std::chrono::seconds(now.tv_sec) + std::chrono::nanoseconds(now.tv_nsec) + time;
    std::atomic_ref(maps.meta().events_until)
        .store(time.count() == 0 ? 0 : static_cast<std::uint64_t>(until.count()), std::memory_order_relaxed);
    return {};
  });
  if (!done) {
    return std::unexpected(done.error());
  }
  return events_->descriptor();
}

Result<int> BpfEngine::read_events(const std::function<int(const event&)>& visit) {
  if (!events_) {
    return fail(-ENOENT, "events are not enabled: call clusterip_event_fd first");
  }
  return events_->read(visit);
}

}  // namespace plugin
