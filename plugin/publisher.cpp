// SPDX-License-Identifier: BSD-2-Clause
#include "plugin/publisher.h"

#include <netinet/in.h>

#include <algorithm>
#include <atomic>
#include <boost/unordered/unordered_flat_set.hpp>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <ctime>
#include <map>
#include <new>
#include <unordered_map>
#include <utility>

#include "config/printable.h"
#include "config/values.h"
#include "plugin/ejection.h"
#include "plugin/publication.h"

namespace plugin {

namespace {

/// Meta_Map's generation is odd while this lives: readers in other processes look again.
class Change {
 public:
  explicit Change(const Maps& maps) : generation_(maps.meta().generation) {
    generation_.store(generation_.load() | 1);  // a process that died in a change left it odd
  }
  Change(const Change&) = delete;
  Change& operator=(const Change&) = delete;
  ~Change() { generation_.fetch_add(1); }

 private:
  std::atomic_ref<__u64> generation_;
};

bool same_backend(const config::Backend& a, const config::Backend& b) {
  return a.port == b.port && a.address == b.address && a.weight == b.weight && a.state == b.state;
}

/// Whether the maps would hold the same for both.
bool same_service(const config::Service& a, const config::Service& b) {
  const block_header a_header = encode_header(a, 0, false);
  const block_header b_header = encode_header(b, 0, false);
  const auto same_eject = [&] {
    const Block nowhere{.header = 0, .slots = 0, .more = 1};
    const auto a_eject = encode_eject(a, nowhere);
    const auto b_eject = encode_eject(b, nowhere);
    return !a_eject || std::memcmp(&*a_eject, &*b_eject, sizeof *a_eject) == 0;
  };
  return a.name == b.name && std::memcmp(&a_header, &b_header, sizeof a_header) == 0 && same_eject() &&
         std::ranges::equal(a.backends, b.backends, same_backend);
}

/// Gives an index that no slot names to another backend. Not `live`: a connect() counts itself at its SYN, which may be
/// later than a grace period after a program has chosen for it, and by then the index may be free or another's. What it
/// adds it takes away again.
void write_backend(const backend_record& next, backend_record& at) {
  constexpr std::size_t live = offsetof(backend_record, live);
  constexpr std::size_t behind = live + sizeof next.live;
  std::memcpy(&at, &next, live);
  std::memcpy(reinterpret_cast<std::byte*>(&at) + behind, reinterpret_cast<const std::byte*>(&next) + behind,
              sizeof next - behind);
}

std::vector<PublishedService> read_once(const Maps& maps) {
  const auto records = maps.records();
  const auto slots = maps.slots();
  std::vector<PublishedService> services;
  std::unordered_map<std::uint32_t, std::size_t> by_record;
  std::vector<bool> in_slot(maps.backends().size());

  for (std::uint32_t record = 0; record < records.size(); ++record) {
    const std::uint64_t word = std::atomic_ref(records[record].word).load(std::memory_order_acquire);
    if (word == 0) {
      continue;
    }
    const auto block = find_block(word, slots);
    if (!block) {
      continue;  // damaged; adopt() takes it away
    }
    PublishedService published{
        .service = decode_service(records[record]), .record = record, .block = *block, .backends = {}};
    decode_block(*block, slots, published.service);
    for (const auto& entry : members_of(*block, slots)) {
      if (entry.slot.backend < maps.backends().size() && !in_slot[entry.slot.backend]) {
        in_slot[entry.slot.backend] = true;
        published.backends.push_back(entry.slot.backend);
        published.service.backends.push_back(decode_backend(maps.backends()[entry.slot.backend]));
      }
    }
    by_record.emplace(record, services.size());
    services.push_back(std::move(published));
  }

  // Backends that drain or are down are in no slot; their records name the service. An active one in no slot is left
  // from a change that never ended.
  const auto backends = maps.backends();
  for (std::uint32_t index = 0; index < backends.size(); ++index) {
    if (backends[index].state == BACKEND_UNUSED || backends[index].state == BACKEND_ACTIVE || in_slot[index]) {
      continue;
    }
    const auto owner = by_record.find(backends[index].record);
    if (owner == by_record.end()) {
      continue;
    }
    auto& published = services[owner->second];
    published.backends.push_back(index);
    published.service.backends.push_back(decode_backend(backends[index]));
  }
  return services;
}

/// What belongs to services that are adopted.
struct Taken {
  std::vector<bool> records;
  std::vector<bool> backends;
  ExtentPool blocks;
};

/// A name of a file's service, or the canary's.
bool is_name(const service_record& record, const std::string& name) {
  return record.name[sizeof record.name - 1] == '\0' && (config::parse_name(name) || name == CANARY_NAME);
}

/// Marks what belongs to a service as taken, or says what of it no publisher has written. `leads_to`: what its key
/// does.
const char* claim(const Maps& maps, const PublishedService& published, std::optional<std::uint32_t> leads_to,
                  Taken& taken) {
  const auto& [service, record, block, indices, intact] = published;
  const block_header& header = maps.slots()[block.header].header;
  if (!taken.blocks.take_at(block.header, block.size()) || header.record != record || header.policy > POLICY_MAGLEV ||
      header.no_backend > NO_BACKEND_PASS || header.client > CLIENT_SOCKET) {
    return "the block";
  }
  const Key key = encode_key(service);
  const bool is_service = service.port != 0 && (key.protocol == IPPROTO_TCP || key.protocol == IPPROTO_UDP);
  if (!is_service || !has_key(maps.records()[record], key) || leads_to != record) {
    return "the key";
  }
  if (!is_name(maps.records()[record], service.name)) {
    return "the name";
  }
  for (const std::uint32_t index : indices) {
    const backend_record& backend = maps.backends()[index];
    if (taken.backends[index] || backend.record != record || backend.weight == 0 ||
        backend.weight > config::max_weight) {
      return "a backend";
    }
    taken.backends[index] = true;
  }
  const auto slots = maps.slots().subspan(block.header + 1, block.slots);
  const bool one_each = service.policy == config::Policy::random || service.policy == config::Policy::least_conn;
  if (!std::ranges::all_of(slots,
                           [&](const block_entry& entry) {
                             return entry.slot.backend < taken.backends.size() &&
                                    entry.slot.alias < taken.backends.size();
                           }) ||
      (one_each && block_size(service) != block.size())) {
    return "a slot";
  }
  taken.records[record] = true;
  return nullptr;
}

}  // namespace

std::vector<PublishedService> read_published(const Maps& maps) {
  constexpr int attempts = 200;
  constexpr timespec pause{.tv_sec = 0, .tv_nsec = 1'000'000};
  const std::atomic_ref generation(maps.meta().generation);
  std::vector<PublishedService> services;
  for (int attempt = 0; attempt < attempts; ++attempt) {
    if (const std::uint64_t before = generation.load(); before % 2 == 0) {
      services = read_once(maps);
      std::atomic_thread_fence(std::memory_order_acquire);  // what was read, was read before the next load
      if (generation.load() == before) {
        return services;
      }
    }
    nanosleep(&pause, nullptr);
  }
  return read_once(maps);  // a process died in a change, or they never cease
}

Publisher::Publisher(Maps& maps, GracePeriod grace, IndexPool records, IndexPool backends, ExtentPool blocks)
    : maps_(&maps),
      grace_(std::move(grace)),
      records_(std::move(records)),
      backends_(std::move(backends)),
      blocks_(std::move(blocks)),
      published_(maps.capacity().records()),
      filter_counts_(maps.capacity().filter_bits()) {}

Result<Publisher> Publisher::create(Maps& maps, const Publisher* before) {
  auto grace = GracePeriod::create();
  if (!grace) {
    return std::unexpected(grace.error());
  }
  const Capacity& capacity = maps.capacity();
  std::vector<bool> records;
  std::vector<bool> backends;
  if (before != nullptr) {
    records.resize(capacity.records());
    backends.resize(capacity.backend_records());
    for (const auto& [key, record] : before->by_key_) {
      records[record] = true;
      for (const std::uint32_t index : before->published_[record].backends) {
        backends[index] = true;
      }
    }
    for (const std::uint32_t index : before->held_backends()) {
      backends[index] = true;
    }
  }
  Publisher publisher(maps, std::move(*grace), IndexPool(capacity.records(), records),
                      IndexPool(capacity.backend_records(), backends), ExtentPool(1, capacity.slots() - 1));
  publisher.before_ = before;
  return publisher;
}

/// Indices that were kept free for what has not come along.
void Publisher::settle() {
  if (before_ == nullptr) {
    return;
  }
  std::vector<bool> taken(maps_->backends().size());
  for (const auto& published : published_) {
    for (const std::uint32_t index : published.backends) {
      taken[index] = true;
    }
  }
  const auto retire = [&](std::uint32_t index) {
    if (!taken[index]) {
      backends_.retire(index);  // held on to as long as connections count there
    }
  };
  for (const auto& [key, record] : before_->by_key_) {
    const PublishedService& published = before_->published_[record];
    if (!by_key_.contains(key)) {
      records_.give_back(record);
    }
    for (std::size_t i = 0; i < published.backends.size(); ++i) {
      retire(published.backends[i]);
      if (!taken[published.backends[i]]) {
        note_left(published.service, published.backends[i]);
      }
    }
  }
  std::ranges::for_each(before_->held_backends(), retire);
  before_ = nullptr;
}

const PublishedService* Publisher::published_before(const Key& key) const {
  return before_ == nullptr ? nullptr : before_->find_published(key);
}

void Publisher::note_left(const config::Service& service, std::uint32_t backend) {
  if (service.protocol == config::Protocol::udp) {
    left_.udp |= service.on_remove != config::OnRemove::keep;
  } else {
    left_.tcp |= service.on_remove == config::OnRemove::reset;
  }
  left_.backends.push_back(backend);
}

void Publisher::count_vip(const Key& marker) {
  if (++vips_[marker] > 1) {
    return;
  }
  const std::uint32_t bit = maps_->filter_bit(marker);
  if (++filter_counts_[bit] == 1) {
    maps_->set_filter_bit(bit, true);
  }
}

void Publisher::forget_vip(const Key& marker) {
  if (--vips_[marker] > 0) {
    return;
  }
  vips_.erase(marker);
  const std::uint32_t bit = maps_->filter_bit(marker);
  if (--filter_counts_[bit] == 0) {
    maps_->set_filter_bit(bit, false);
  }
  unused_keys_.emplace_back(marker, MARKER_RECORD);
}

Result<Publisher> Publisher::adopt(Maps& maps) {
  const auto damaged = [](const std::string& what) {
    return fail(-EPROTO, "the pinned state is damaged (" + what + "): run `clusterip unload` and load again");
  };
  auto grace = GracePeriod::create();
  if (!grace) {
    return std::unexpected(grace.error());
  }
  auto keys = maps.all_keys();
  if (!keys) {
    return std::unexpected(keys.error());
  }

  // 1. Look. What is refused stays as it is.
  const Capacity& capacity = maps.capacity();
  const bool peer_names = (maps.meta().flags & META_PEER_NAMES) != 0;
  Taken taken{.records = std::vector<bool>(capacity.records()),
              .backends = std::vector<bool>(capacity.backend_records()),
              .blocks = ExtentPool(1, capacity.slots() - 1)};
  auto services = read_once(maps);
  for (auto& published : services) {
    const auto& [service, record, block, indices, intact] = published;
    const auto leads_to = maps.find_key(encode_key(service));
    if (!leads_to) {
      return std::unexpected(leads_to.error());
    }
    if (const char* fault = claim(maps, published, *leads_to, taken); fault != nullptr) {
      return damaged(std::string(fault) + " of service \"" + config::printable(service.name) + "\"");
    }
    // A process that died before it had noted a new weight leaves such a service; the next load writes it again. So
    // does one whose ring begins with another backend than the file: nothing says in which order they stood there.
    std::vector<block_entry> expected(block_size(service));
    encode_block(service, record, indices, peer_names, expected);
    published.intact = expected.size() == block.size() && std::memcmp(expected.data(), &maps.slots()[block.header],
                                                                      expected.size() * sizeof(block_entry)) == 0;
  }
  // Keys that are no service's: from a change that did not end. Their records are not free before the keys are gone.
  std::vector<bool> records = taken.records;
  std::vector<std::pair<Key, std::uint32_t>> unused;
  std::vector<Key> markers;
  for (const Key& key : *keys) {
    const auto found = maps.find_key(key);
    if (!found) {
      return std::unexpected(found.error());
    }
    const auto record = *found;
    if (is_marker(key)) {
      markers.push_back(key);
    } else if (!record || *record >= records.size()) {
      return damaged("a key of Service_Map");
    } else if (!taken.records[*record] || !has_key(maps.records()[*record], key)) {
      unused.emplace_back(key, records[*record] ? MARKER_RECORD : *record);
      records[*record] = true;
    }
  }

  // 2. What is nobody's becomes free, and may still be read by programs that run now.
  for (std::uint32_t record = 0; record < records.size(); ++record) {
    if (!taken.records[record]) {
      // One that is damaged would name a block again when there is one at its place.
      std::atomic_ref(maps.records()[record].word).store(0, std::memory_order_relaxed);
    }
  }
  if (auto waited = grace->wait(); !waited) {
    return std::unexpected(waited.error());
  }
  std::vector<bool>& backends = taken.backends;
  std::vector<std::uint32_t> held;
  for (std::uint32_t index = 0; index < backends.size(); ++index) {
    if (!backends[index]) {
      std::atomic_ref(maps.backends()[index].state).store(BACKEND_UNUSED, std::memory_order_relaxed);
      if (std::atomic_ref(maps.backends()[index].live).load(std::memory_order_relaxed) != 0) {
        held.push_back(index);
        backends[index] = true;
      }
    }
  }

  Publisher publisher(maps, std::move(*grace), IndexPool(capacity.records(), records),
                      IndexPool(capacity.backend_records(), backends), std::move(taken.blocks));
  publisher.unused_keys_ = std::move(unused);
  publisher.peer_names_ = peer_names;
  std::ranges::for_each(held, [&](std::uint32_t index) { publisher.backends_.retire(index); });
  for (auto& published : services) {
    std::string name = published.service.name;
    if (published.service.eject) {
      limit_ejections(maps, published.block);  // a process that died may not have come to it
    }
    publisher.enter(std::move(published), std::move(name));
  }
  for (std::uint32_t bit = 0; bit < publisher.filter_counts_.size(); ++bit) {
    if (publisher.filter_counts_[bit] == 0) {
      maps.set_filter_bit(bit, false);
    }
  }
  for (const Key& marker : markers) {
    if (!publisher.vips_.contains(marker)) {
      publisher.unused_keys_.emplace_back(marker, MARKER_RECORD);
    }
  }
  // A change that ended between a service's key and its marker.
  std::vector<Key> missing;
  for (const auto& [marker, count] : publisher.vips_) {
    const auto found = maps.find_key(marker);
    if (!found) {
      return std::unexpected(found.error());
    }
    if (!*found) {
      missing.push_back(marker);
    }
  }
  const std::vector<std::uint32_t> values(missing.size(), MARKER_RECORD);
  if (auto inserted = maps.insert_keys(missing, values); !inserted) {
    return std::unexpected(inserted.error());
  }
  publisher.erase_unused_keys();
  return publisher;
}

const PublishedService* Publisher::find_published(const Key& key) const {
  const auto found = by_key_.find(key);
  return found == by_key_.end() ? nullptr : &published_[found->second];
}

const config::Service* Publisher::find(const Key& key) const {
  const auto* published = find_published(key);
  return published == nullptr ? nullptr : &published->service;
}

const config::Service* Publisher::find(std::string_view name) const {
  const auto found = by_name_.find(std::string(name));
  return found == by_name_.end() ? nullptr : &published_[found->second].service;
}

std::vector<config::Service> Publisher::services() const {
  std::vector<config::Service> services;
  services.reserve(by_key_.size());
  for (const auto& [key, record] : by_key_) {
    services.push_back(published_[record].service);
  }
  return services;
}

/// Enters a service into the indices.
void Publisher::enter(PublishedService published, std::string name) {
  const Key key = encode_key(published.service);
  const std::uint32_t record = published.record;
  if (by_key_.emplace(key, record).second) {
    count_vip(marker_of(key));
  }
  by_name_.insert_or_assign(std::move(name), record);
  backend_count_ += published.backends.size();
  published_[record] = std::move(published);
}

Result<void> Publisher::apply(std::span<config::Service> services, bool peer_names) {
  const bool all_change = std::exchange(peer_names_, peer_names) != peer_names;
  std::vector<config::Service*> changed;
  std::vector<bool> stays(published_.size());
  for (auto& service : services) {
    const PublishedService* published = find_published(encode_key(service));
    if (published != nullptr) {
      stays[published->record] = true;
    }
    if (published == nullptr || all_change || !published->intact || !same_service(published->service, service)) {
      changed.push_back(&service);
    }
  }
  std::vector<std::uint32_t> removed;
  for (const auto& [key, record] : by_key_) {
    if (!stays[record]) {
      removed.push_back(record);
    }
  }
  auto done = publish(changed, removed);
  if (!done) {
    peer_names_ = peer_names != all_change;
  } else if (peer_names) {
    maps_->meta().flags |= META_PEER_NAMES;
  } else {
    maps_->meta().flags &= ~META_PEER_NAMES;
  }
  return done;
}

Result<void> Publisher::set_backends(std::string_view name, std::vector<config::Backend> backends) {
  const auto found = by_name_.find(std::string(name));
  if (found == by_name_.end()) {
    return fail(-ENOENT, "there is no service \"" + std::string(name) + "\"");
  }
  const PublishedService& published = published_[found->second];
  if (published.intact && std::ranges::equal(published.service.backends, backends, same_backend)) {
    return {};
  }
  config::Service changed = published.service;
  changed.backends = std::move(backends);
  config::Service* const one[] = {&changed};
  return publish(one, {});
}

Result<void> Publisher::publish(std::span<config::Service* const> changed, std::span<const std::uint32_t> removed) {
  erase_unused_keys();  // those that an earlier change could not delete
  left_.udp = left_.tcp = false;
  left_.backends.clear();

  // 1. Write everything that is new beside what is published. Nobody sees it. Undone by whatever ends this early, an
  // exception for want of memory included.
  struct Staging {
    Publisher& publisher;
    std::vector<Staged> services;
    bool undo = true;
    ~Staging() {
      if (undo) {
        std::ranges::for_each(services, [this](Staged& one) { publisher.unstage(one); });
      }
    }
  } staging{.publisher = *this, .services = {}};
  auto& staged = staging.services;
  staged.reserve(changed.size());
  for (config::Service* service : changed) {
    if (auto one = stage(*service, staged.emplace_back()); !one) {
      return one;
    }
  }
  reserve_for_commit(staged, removed);

  // 2. Insert the keys of new services: the last step that can fail. Their records still say "no service here".
  if (auto inserted = insert_new_keys(staged); !inserted) {
    return inserted;
  }
  staging.undo = false;

  // 3. One store for each service publishes it, or takes it away.
  {
    const Change change(*maps_);
    for (Staged& one : staged) {
      commit(one);
    }
    for (const std::uint32_t record : removed) {
      remove(record);
    }
  }

  // 4. Only now delete keys. Failing here leaves keys that mean nothing; the next change tries again.
  erase_unused_keys();

  // 5. What was replaced becomes free after a grace period, which is waited for once in a while and after publication.
  reclaim_if_worthwhile();
  return {};
}

/// What has been taken so far is in `staged` at each moment, so that unstage() can give it back.
Result<void> Publisher::stage(config::Service& service, Staged& staged) {
  const PublishedService* previous = find_published(encode_key(service));
  auto& next = staged.next;
  staged.name = service.name;
  staged.is_new = previous == nullptr;
  staged.source = &service;
  next.service = std::move(service);

  if (previous != nullptr) {
    next.record = previous->record;
  } else {
    if (const PublishedService* before = published_before(encode_key(next.service)); before != nullptr) {
      next.record = before->record;
    } else {
      auto record = take(records_);
      if (!record) {
        return std::unexpected(record.error());
      }
      next.record = *record;
      staged.has_record = true;
    }
    withdraw(*maps_, encode_key(next.service), next.record);
    encode_record(next.service, maps_->records()[next.record]);
    maps_->clear_counters(next.record);
  }

  // A backend that stays keeps its index, and with it its counters.
  std::map<std::pair<config::Address, std::uint16_t>, std::uint32_t> before;
  const PublishedService* had = previous != nullptr ? previous : published_before(encode_key(next.service));
  if (had != nullptr) {
    for (std::size_t i = 0; i < had->backends.size(); ++i) {
      const auto& backend = had->service.backends[i];
      before.emplace(std::pair(backend.address, backend.port), had->backends[i]);
    }
  }
  next.backends.reserve(next.service.backends.size());
  staged.fresh.reserve(next.service.backends.size());
  for (const auto& backend : next.service.backends) {
    if (const auto found = before.find({backend.address, backend.port}); found != before.end()) {
      next.backends.push_back(found->second);
      before.erase(found);
      if (previous == nullptr) {
        write_backend(encode_backend(backend, next.record), maps_->backends()[next.backends.back()]);
        copy_ejection(before_->maps_->backends()[next.backends.back()], maps_->backends()[next.backends.back()]);
      }
      continue;
    }
    auto index = take(backends_);
    if (!index) {
      return std::unexpected(index.error());
    }
    staged.fresh.push_back(*index);
    next.backends.push_back(*index);
    write_backend(encode_backend(backend, next.record), maps_->backends()[*index]);
    maps_->backends()[*index].state = BACKEND_UNUSED;  // until it is published
    maps_->clear_counters(maps_->backend_stats(*index));
  }
  for (std::size_t i = 0; previous != nullptr && i < previous->backends.size(); ++i) {
    const auto& backend = previous->service.backends[i];
    if (before.contains({backend.address, backend.port})) {
      staged.leaving.push_back(i);
    }
  }

  staged.places = places_of(next.service);
  const Block plan = plan_block(next.service);
  const std::uint32_t size = plan.size();
  auto header = take(blocks_, size);
  if (!header) {
    return std::unexpected(header.error());
  }
  next.block = {.header = *header, .slots = plan.slots, .more = plan.more};
  encode_block(next.service, next.record, next.backends, peer_names_, maps_->slots().subspan(*header, size));
  return {};
}

void Publisher::unstage(Staged& staged) noexcept {
  if (staged.source == nullptr) {
    return;
  }
  for (const std::uint32_t index : staged.fresh) {
    backends_.give_back(index);
  }
  if (staged.has_record) {
    records_.give_back(staged.next.record);
  }
  if (staged.next.block.header != 0) {
    try {
      blocks_.give_back(staged.next.block.header, staged.next.block.size());
    } catch (const std::bad_alloc&) {
      staged.next.block = {};  // these slots are lost until the maps are made anew
    }
  }
  *staged.source = std::move(staged.next.service);
}

Result<void> Publisher::insert_new_keys(const std::vector<Staged>& staged) {
  std::vector<Key> keys;
  std::vector<std::uint32_t> values;
  boost::unordered_flat_set<Key, KeyHash> markers;
  for (const Staged& one : staged) {
    if (!one.is_new) {
      continue;
    }
    const Key key = encode_key(one.next.service);
    keys.push_back(key);
    values.push_back(one.next.record);
    const Key marker = marker_of(key);
    if (!vips_.contains(marker) && markers.insert(marker).second) {
      maps_->set_filter_bit(maps_->filter_bit(marker),
                            true);  // before the key; stays on if that fails, which costs little
      keys.push_back(marker);
      values.push_back(MARKER_RECORD);
    }
  }
  return maps_->insert_keys(keys, values);
}

/// From the first store on, nothing may fail, not even for memory.
void Publisher::reserve_for_commit(const std::vector<Staged>& staged, std::span<const std::uint32_t> removed) {
  std::size_t leaving = 0;
  for (const Staged& one : staged) {
    leaving += one.leaving.size();
  }
  for (const std::uint32_t record : removed) {
    leaving += published_[record].backends.size();
  }
  backends_.reserve_retired(leaving);
  blocks_.reserve_retired(staged.size() + removed.size());
  records_.reserve_retired(unused_keys_.size() + removed.size());
  reserve_more(unused_keys_, 2 * removed.size());
  by_key_.reserve(by_key_.size() + staged.size());
  by_name_.reserve(by_name_.size() + staged.size());
  vips_.reserve(vips_.size() + staged.size());
  left_.backends.reserve(leaving);
}

void Publisher::commit(Staged& staged) {
  auto& next = staged.next;
  plugin::publish(*maps_, encode_key(next.service), next.record, next.block);

  // After the word: a backend that no slot names may still be drained, a new one is not yet asked for its state.
  for (std::size_t i = 0; i < next.backends.size(); ++i) {
    update_backend(next.service.backends[i], next.service, staged.places[i], maps_->backends()[next.backends[i]]);
  }
  if (next.service.eject) {
    limit_ejections(*maps_, next.block);
  }
  if (!staged.is_new) {
    encode_name(next.service.name, maps_->records()[next.record]);
    const PublishedService& previous = published_[next.record];
    blocks_.retire(previous.block.header, previous.block.size());
    for (const std::size_t i : staged.leaving) {
      leave(previous, i);
    }
    backend_count_ -= previous.backends.size();
    forget_name(previous.service.name, next.record);
  }
  enter(std::move(next), std::move(staged.name));
}

/// The backend number `backend` of a service gets nothing any more.
void Publisher::leave(const PublishedService& published, std::size_t backend) {
  const std::uint32_t index = published.backends[backend];
  std::atomic_ref(maps_->backends()[index].state).store(BACKEND_UNUSED, std::memory_order_relaxed);
  backends_.retire(index);
  note_left(published.service, index);
}

void Publisher::remove(std::uint32_t record) {
  const PublishedService published = std::exchange(published_[record], {});
  const Key key = encode_key(published.service);
  withdraw(*maps_, key, record);
  unused_keys_.emplace_back(key, record);
  blocks_.retire(published.block.header, published.block.size());
  for (std::size_t i = 0; i < published.backends.size(); ++i) {
    leave(published, i);
  }
  backend_count_ -= published.backends.size();
  forget_vip(marker_of(key));
  by_key_.erase(key);
  forget_name(published.service.name, record);
}

/// Unless another service has taken the name in the same change.
void Publisher::forget_name(const std::string& name, std::uint32_t record) {
  const auto found = by_name_.find(name);
  if (found != by_name_.end() && found->second == record) {
    by_name_.erase(found);
  }
}

void Publisher::erase_unused_keys() {
  std::erase_if(unused_keys_, [this](const std::pair<Key, std::uint32_t>& unused) {
    const auto& [key, record] = unused;
    const bool in_use_again = is_marker(key) ? vips_.contains(key) : by_key_.contains(key);
    if (!in_use_again && !maps_->erase_key(key)) {
      return false;
    }
    if (record != MARKER_RECORD) {
      records_.retire(record);
    }
    return true;
  });
}

template <class Pool, class... Size>
Result<std::uint32_t> Publisher::take(Pool& pool, Size... size) {
  auto taken = pool.take(size...);
  if (!taken) {
    if (auto reclaimed = reclaim(); !reclaimed) {
      return std::unexpected(reclaimed.error());
    }
    taken = pool.take(size...);
  }
  if (!taken) {
    return fail(-ENOSPC, "the maps have no room for this change");
  }
  return *taken;
}

Result<void> Publisher::reclaim() {
  if (auto waited = grace_.wait(); !waited) {
    return waited;
  }
  const auto never = [](std::uint32_t) { return false; };
  records_.reclaim(never);
  backends_.reclaim([this](std::uint32_t index) {
    return std::atomic_ref(maps_->backends()[index].live).load(std::memory_order_relaxed) != 0;
  });
  blocks_.reclaim();
  return {};
}

void Publisher::reclaim_if_worthwhile() {
  // After the publication, so that it does not wait; a failure shows again where room is needed.
  const auto worth = [](const auto& pool) { return GracePeriod::is_worth_it(pool.retired(), pool.capacity()); };
  if (worth(records_) || worth(backends_) || worth(blocks_)) {
    (void)reclaim();
  }
}

}  // namespace plugin
