// SPDX-License-Identifier: BSD-2-Clause
#include "plugin/maps.h"

#include <bpf/bpf.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <cstring>
#include <utility>

#include "plugin/bpf_object.h"

namespace plugin {

namespace {

enum MapIndex : std::uint8_t {
  service_map,
  record_map,
  slot_map,
  backend_map,
  stats_map,
  filter_map,
  session_map,
  flow_map,
  affinity_map,
  event_ring,
  meta_map,
};

constexpr const char* map_names[] = {"Service_Map",  "Record_Map", "Slot_Map",    "Backend_Map",
                                     "Stats_Map",    "Filter_Map", "Session_Map", "Flow_Map",
                                     "Affinity_Map", "Event_Ring", "Meta_Map"};

constexpr std::uint32_t min_services = 64;
constexpr std::uint32_t min_backends = 1024;
constexpr std::uint32_t min_affinities = 64;  // where no service has any
constexpr std::uint32_t max_shards = 8;
constexpr std::uint32_t ring_bytes = 256 * 1024;  // about 900 events

struct Shape {
  MapSize size;
  bpf_map_type type;
  std::uint32_t flags;
  std::uint32_t key_size;
  std::uint32_t value_size;
};

std::vector<Shape> shapes(const Capacity& capacity) {
  constexpr std::uint32_t index = sizeof(std::uint32_t);
  const auto array = [](MapIndex map, std::uint32_t entries, std::size_t value_size) -> Shape {
    return {{map_names[map], entries, false},
            BPF_MAP_TYPE_ARRAY,
            BPF_F_MMAPABLE,
            index,
            static_cast<std::uint32_t>(value_size)};
  };
  const auto storage = [](MapIndex map, std::size_t value_size) -> Shape {
    return {{map_names[map], 0, false},
            BPF_MAP_TYPE_SK_STORAGE,
            BPF_F_NO_PREALLOC,
            index,
            static_cast<std::uint32_t>(value_size)};
  };
  // In the order of MapIndex.
  return {{{map_names[service_map], capacity.keys(), false}, BPF_MAP_TYPE_HASH, 0, sizeof(service_key), index},
          array(record_map, capacity.records(), sizeof(service_record)),
          array(slot_map, capacity.slots(), sizeof(block_entry)),
          array(backend_map, capacity.backend_records(), sizeof(backend_record)),
          array(stats_map, capacity.stats(), sizeof(counters)),
          array(filter_map, capacity.filter_words(), sizeof(std::uint64_t)),
          storage(session_map, sizeof(session)),
          storage(flow_map, sizeof(flows)),
          {{map_names[affinity_map], capacity.affinities, false},
           BPF_MAP_TYPE_LRU_HASH,
           0,
           sizeof(affinity_key),
           sizeof(affinity)},
          {{map_names[event_ring], ring_bytes, true}, BPF_MAP_TYPE_RINGBUF, 0, 0, 0},
          array(meta_map, 1, sizeof(meta_record))};
}

bool is_unsupported_batch(int error) {
  constexpr int kernel_enotsupp = 524;  // not in <errno.h>; what a map type without the operation answers
  return error == EINVAL || error == kernel_enotsupp;
}

/// Memory or a bucket lock that was not to be had this moment (kernel/bpf/hashtab.c, memalloc.c).
bool is_passing(int error) { return error == ENOMEM || error == EBUSY || error == EAGAIN; }

}  // namespace

Need Need::of(std::span<const config::Service> services, const config::Limits& limits) {
  Need need{.services = services.size()};
  for (const auto& service : services) {
    need.backends += service.backends.size();
    need.entries += block_size(service);
    if (service.affinity) {
      need.affinities = limits.flows;
    }
  }
  return need;
}

Capacity Capacity::for_need(const Need& need) {
  const auto cpus = static_cast<std::uint32_t>(std::max(1L, sysconf(_SC_NPROCESSORS_CONF)));
  Capacity capacity{.services = std::bit_ceil(std::max(min_services, static_cast<std::uint32_t>(need.services))),
                    .backends = std::bit_ceil(std::max(min_backends, static_cast<std::uint32_t>(need.backends))),
                    .entries = static_cast<std::uint32_t>(need.entries),
                    .affinities = std::max(min_affinities, static_cast<std::uint32_t>(need.affinities)),
                    .shards = std::bit_ceil(std::min(cpus, max_shards))};
  // A header and a slot for each backend, unless there are rings and Maglev tables.
  const std::uint32_t usual = capacity.services + capacity.backends;
  capacity.entries = capacity.entries <= usual ? usual : std::bit_ceil(capacity.entries);
  return capacity;
}

bool Capacity::has_room_for(const Need& need) const {
  return need.services <= services && need.backends <= backends && need.entries <= entries &&
         (need.affinities == 0 || std::max<std::size_t>(min_affinities, need.affinities) == affinities);
}

MappedArray::MappedArray(MappedArray&& other) noexcept
    : address_(std::exchange(other.address_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

MappedArray& MappedArray::operator=(MappedArray&& other) noexcept {
  std::swap(address_, other.address_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

MappedArray::~MappedArray() {
  if (address_ != nullptr) {
    munmap(address_, bytes_);
  }
}

Result<MappedArray> MappedArray::map(int fd, std::size_t bytes) {
  void* address = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (address == MAP_FAILED) {
    return fail_errno(errno, "mapping a BPF array into memory");
  }
  // A handle does not survive fork: no stray write of a child of the host reaches what the kernel reads.
  madvise(address, bytes, MADV_DONTFORK);
  MappedArray array;
  array.address_ = address;
  array.bytes_ = bytes;
  return array;
}

std::span<const char* const> Maps::names() { return map_names; }

const Fd& Maps::sessions() const { return fds_[session_map]; }

const Fd& Maps::backend_fd() const { return fds_[backend_map]; }

const Fd& Maps::events() const { return fds_[event_ring]; }

Result<Maps> Maps::create(const Capacity& capacity, const Maps* before) {
  Maps maps;
  maps.capacity_ = capacity;
  for (const auto& shape : shapes(capacity)) {
    const std::size_t index = maps.fds_.size();
    const bool stays =
        index == session_map || index == flow_map || index == event_ring ||
        (index == affinity_map && before != nullptr && before->capacity_.affinities == capacity.affinities);
    if (before != nullptr && stays) {
      Fd copy(before->fds_[index] ? fcntl(before->fds_[index].get(), F_DUPFD_CLOEXEC, 0) : -1);
      if (before->fds_[index] && !copy) {
        return fail_errno(errno, std::string("keeping ") + shape.size.name);
      }
      maps.fds_.push_back(std::move(copy));
      continue;
    }
    auto fd = create_map(shape.size);
    if (!fd) {
      return std::unexpected(fd.error());
    }
    maps.fds_.push_back(std::move(*fd));
  }
  if (auto mapped = maps.map_arrays(); !mapped) {
    return std::unexpected(mapped.error());
  }
  auto& meta = maps.meta();
  meta.magic = LAYOUT_MAGIC;
  meta.version = LAYOUT_VERSION;
  meta.services = capacity.services;
  meta.backends = capacity.backends;
  meta.entries = capacity.entries;
  meta.affinities = capacity.affinities;
  meta.shards = capacity.shards;
  if (before != nullptr) {
    meta.events_until = std::atomic_ref(before->meta().events_until).load(std::memory_order_relaxed);
  }
  return maps;
}

Result<Maps> Maps::open(const std::string& directory) {
  const auto damaged = [&directory](const std::string& reason) {
    return fail(-EPROTO, directory + ": the pinned state " + reason + ": run `clusterip unload --pin " + directory +
                             "` and load again");
  };
  Maps maps;
  for (const char* name : map_names) {
    Fd fd(bpf_obj_get((directory + "/" + name).c_str()));
    if (!fd && errno == ENOENT && name == map_names[event_ring]) {
      maps.fds_.emplace_back();  // this kernel has none
      continue;
    }
    if (!fd && errno == ENOENT && name != map_names[meta_map]) {
      return damaged(std::string("is damaged (") + name + " is missing)");
    }
    if (!fd) {
      return fail_errno(errno, "opening " + directory + "/" + name);
    }
    maps.fds_.push_back(std::move(fd));
  }

  // Meta_Map's head is the same in every version, and is read by look-up: a later version may have another size.
  bpf_map_info info{};
  std::uint32_t length = sizeof info;
  if (bpf_obj_get_info_by_fd(maps.fds_[meta_map].get(), &info, &length) != 0) {
    return fail_errno(errno, "asking about " + directory + "/Meta_Map");
  }
  if (info.type != BPF_MAP_TYPE_ARRAY || info.key_size != sizeof(std::uint32_t) ||
      info.value_size < sizeof(std::uint64_t)) {
    return damaged("is not ours");
  }
  std::vector<char> value(info.value_size);
  const std::uint32_t first = 0;
  if (bpf_map_lookup_elem(maps.fds_[meta_map].get(), &first, value.data()) != 0) {
    return fail_errno(errno, "reading " + directory + "/Meta_Map");
  }
  struct {
    std::uint32_t magic;
    std::uint32_t version;
  } head{};
  std::memcpy(&head, value.data(), sizeof head);
  if (head.magic != LAYOUT_MAGIC) {
    return damaged("is not ours");
  }
  if (head.version != LAYOUT_VERSION) {
    return damaged("has layout version " + std::to_string(head.version) + ", this clusterip writes version " +
                   std::to_string(LAYOUT_VERSION));
  }
  if (value.size() != sizeof(meta_record)) {
    return damaged("is damaged (Meta_Map)");
  }
  meta_record meta{};
  std::memcpy(&meta, value.data(), sizeof meta);
  constexpr std::uint32_t largest = 1u << 24;  // far above any limit of a configuration; keeps the products in range
  constexpr std::uint32_t largest_entries = 1u << 30;
  if (meta.services == 0 || meta.services > largest || meta.backends == 0 || meta.backends > largest ||
      meta.entries == 0 || meta.entries > largest_entries || meta.affinities == 0 || meta.affinities > largest ||
      meta.shards > max_shards || !std::has_single_bit(meta.shards) || !std::has_single_bit(meta.services)) {
    return damaged("is damaged (Meta_Map)");
  }
  maps.capacity_ = {.services = meta.services,
                    .backends = meta.backends,
                    .entries = meta.entries,
                    .affinities = meta.affinities,
                    .shards = meta.shards};

  std::size_t i = 0;
  for (const auto& shape : shapes(maps.capacity_)) {
    if (!maps.fds_[i]) {
      ++i;
      continue;
    }
    info = {};
    length = sizeof info;
    if (bpf_obj_get_info_by_fd(maps.fds_[i++].get(), &info, &length) != 0) {
      return fail_errno(errno, "asking about " + directory + "/" + shape.size.name);
    }
    if (info.type != shape.type || info.map_flags != shape.flags || info.max_entries != shape.size.max_entries ||
        info.key_size != shape.key_size || info.value_size != shape.value_size) {
      return damaged(std::string("is damaged (") + shape.size.name + ")");
    }
  }
  if (auto mapped = maps.map_arrays(); !mapped) {
    return std::unexpected(mapped.error());
  }
  return maps;
}

Result<void> Maps::map_arrays() {
  const struct {
    MappedArray& array;
    MapIndex map;
    std::size_t bytes;
  } arrays[] = {{filter_, filter_map, std::size_t{capacity_.filter_words()} * sizeof(std::uint64_t)},
                {records_, record_map, std::size_t{capacity_.records()} * sizeof(service_record)},
                {slots_, slot_map, std::size_t{capacity_.slots()} * sizeof(block_entry)},
                {backends_, backend_map, std::size_t{capacity_.backend_records()} * sizeof(backend_record)},
                {stats_, stats_map, std::size_t{capacity_.stats()} * sizeof(counters)},
                {meta_, meta_map, sizeof(meta_record)}};
  for (const auto& [array, map, bytes] : arrays) {
    auto mapped = MappedArray::map(fds_[map].get(), bytes);
    if (!mapped) {
      return std::unexpected(mapped.error());
    }
    array = std::move(*mapped);
  }
  return {};
}

Result<void> Maps::pin(const std::string& directory) const {
  for (std::size_t i = 0; i < fds_.size(); ++i) {
    const std::string path = directory + "/" + map_names[i];
    if (fds_[i] && bpf_obj_pin(fds_[i].get(), path.c_str()) != 0) {
      return fail_errno(errno, "pinning " + path);
    }
  }
  return {};
}

counters Maps::read_counters(std::uint32_t index) const {
  counters sum{};
  for (std::uint32_t shard = 0; shard < capacity_.shards; ++shard) {
    counters& at = counters_at(shard, index);
    sum.connects += std::atomic_ref(at.connects).load(std::memory_order_relaxed);
    sum.refused += std::atomic_ref(at.refused).load(std::memory_order_relaxed);
    sum.reversed += std::atomic_ref(at.reversed).load(std::memory_order_relaxed);
    sum.failures += std::atomic_ref(at.failures).load(std::memory_order_relaxed);
  }
  return sum;
}

void Maps::clear_counters(std::uint32_t index) const {
  for (std::uint32_t shard = 0; shard < capacity_.shards; ++shard) {
    counters_at(shard, index) = {};
  }
}

void Maps::set_filter_bit(std::uint32_t bit, bool on) const {
  constexpr std::uint32_t word_bits = 64;
  const std::atomic_ref word(filter()[bit / word_bits]);
  const std::uint64_t mask = std::uint64_t{1} << (bit % word_bits);
  if (on) {
    word.fetch_or(mask, std::memory_order_release);
  } else {
    word.fetch_and(~mask, std::memory_order_release);
  }
}

std::size_t Maps::insert_some(std::span<const Key> keys, std::span<const std::uint32_t> values, int& error) const {
  const int fd = fds_[service_map].get();
  if (keys.size() > 1) {
    auto count = static_cast<std::uint32_t>(keys.size());
    if (bpf_map_update_batch(fd, keys.data(), values.data(), &count, nullptr) == 0) {
      return keys.size();
    }
    error = errno;
    // The kernel says in `count` how many it did; if it refused the call as a whole, it left `count` as it was.
    const std::size_t done = count < keys.size() ? count : 0;
    if (done > 0 || !is_unsupported_batch(error)) {
      return done;
    }
  }
  for (std::size_t i = 0; i < keys.size(); ++i) {
    if (bpf_map_update_elem(fd, &keys[i], &values[i], BPF_ANY) != 0) {
      error = errno;
      return i;
    }
  }
  return keys.size();
}

Result<void> Maps::insert_keys(std::span<const Key> keys, std::span<const std::uint32_t> values) const {
  constexpr int attempts = 5;
  std::size_t done = 0;
  int error = 0;
  for (int attempt = 0; attempt < attempts && done < keys.size(); ++attempt) {
    error = 0;
    const std::size_t before = done;
    done += insert_some(keys.subspan(done), values.subspan(done), error);
    if (done < keys.size() && !is_passing(error)) {
      break;
    }
    if (done > before) {
      attempt = 0;  // it goes on
    }
  }
  if (done == keys.size()) {
    return {};
  }
  for (const Key& key : keys.first(done)) {
    (void)erase_key(key);
  }
  return fail_errno(error == E2BIG ? ENOSPC : error, "inserting into Service_Map");
}

Result<void> Maps::erase_key(const Key& key) const {
  if (bpf_map_delete_elem(fds_[service_map].get(), &key) != 0 && errno != ENOENT) {
    return fail_errno(errno, "deleting from Service_Map");
  }
  return {};
}

Result<std::optional<std::uint32_t>> Maps::find_key(const Key& key) const {
  std::uint32_t value = 0;
  if (bpf_map_lookup_elem(fds_[service_map].get(), &key, &value) == 0) {
    return value;
  }
  if (errno != ENOENT) {
    return fail_errno(errno, "reading Service_Map");
  }
  return std::nullopt;
}

Result<std::vector<Key>> Maps::all_keys() const {
  std::vector<Key> keys;
  const Key* last = nullptr;
  Key next{};
  while (bpf_map_get_next_key(fds_[service_map].get(), last, &next) == 0) {
    keys.push_back(next);
    last = &keys.back();
    if (keys.size() > capacity_.keys()) {
      return fail(-EPROTO, "Service_Map has more keys than it has room for: somebody else is changing it");
    }
  }
  if (errno != ENOENT) {
    return fail_errno(errno, "listing Service_Map");
  }
  return keys;
}

}  // namespace plugin
