// SPDX-License-Identifier: BSD-2-Clause
//
// The maps of one fast path: made, pinned, opened again, and mapped into this process.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "bpf/map_layout.h"
#include "config/config.h"
#include "plugin/fd.h"
#include "plugin/map_encoding.h"
#include "plugin/system_error.h"

namespace plugin {

/// What services ask of the maps.
struct Need {
  std::size_t services = 0;
  std::size_t backends = 0;
  std::size_t entries = 0;     // of Slot_Map: the sizes of all blocks
  std::size_t affinities = 0;  // clients that may have one; 0: no service has affinity

  static Need of(std::span<const config::Service> services, const config::Limits& limits);
};

/// What the maps have room for. They hold twice as much, since during a change the old and the new exist side by side.
struct Capacity {
  std::uint32_t services = 0;
  std::uint32_t backends = 0;
  std::uint32_t entries = 0;
  std::uint32_t affinities = 0;
  std::uint32_t shards = 1;  // of the counters

  /// Room for this, rounded up so that small growth needs no new maps. One shard per CPU, 8 at most.
  static Capacity for_need(const Need& need);

  bool has_room_for(const Need& need) const;

  std::uint32_t keys() const { return 4 * services; }  // a marker for each VIP as well
  std::uint32_t filter_bits() const { return 8 * keys(); }
  std::uint32_t filter_words() const { return filter_bits() / 64; }
  std::uint32_t records() const { return 2 * services; }
  std::uint32_t backend_records() const { return 2 * backends; }
  std::uint32_t slots() const { return 1 + 2 * entries; }  // slot 0 is not used
  std::uint32_t stats_per_shard() const { return records() + backend_records(); }
  std::uint32_t stats() const { return shards * stats_per_shard(); }
};

/// A shared mapping of a BPF array.
class MappedArray {
 public:
  MappedArray() = default;
  MappedArray(MappedArray&& other) noexcept;
  MappedArray& operator=(MappedArray&& other) noexcept;
  ~MappedArray();

  static Result<MappedArray> map(int fd, std::size_t bytes);

  template <class T>
  std::span<T> as() const {
    return {static_cast<T*>(address_), bytes_ / sizeof(T)};
  }

 private:
  void* address_ = nullptr;
  std::size_t bytes_ = 0;
};

class Maps {
 public:
  /// `before`, if there is one, are the maps that these take the place of: what sockets and clients have been given
  /// stays known.
  static Result<Maps> create(const Capacity& capacity, const Maps* before);

  /// Opens what pin() left in `directory`. -ENOENT: nothing is pinned there. -EPROTO: the state is of another layout
  /// version, or damaged.
  static Result<Maps> open(const std::string& directory);

  /// Pins every map in `directory` by its name.
  Result<void> pin(const std::string& directory) const;

  /// The names of the maps, which are also the names of their pins.
  static std::span<const char* const> names();

  const Capacity& capacity() const { return capacity_; }
  std::span<service_record> records() const { return records_.as<service_record>(); }
  std::span<block_entry> slots() const { return slots_.as<block_entry>(); }
  std::span<backend_record> backends() const { return backends_.as<backend_record>(); }
  std::span<std::uint64_t> filter() const { return filter_.as<std::uint64_t>(); }
  meta_record& meta() const { return meta_.as<meta_record>()[0]; }

  /// The file descriptors, in the order of names(). That of an optional map may be empty.
  std::span<const Fd> fds() const { return fds_; }
  const Fd& sessions() const;
  const Fd& backend_fd() const;
  const Fd& events() const;

  /// Sum over the shards. `index` is a record index, or backend_stats() of a backend index.
  counters read_counters(std::uint32_t index) const;
  void clear_counters(std::uint32_t index) const;
  counters& counters_at(std::uint32_t shard, std::uint32_t index) const {
    return stats()[std::size_t{shard} * capacity_.stats_per_shard() + index];
  }
  std::uint32_t backend_stats(std::uint32_t backend) const { return capacity_.records() + backend; }

  /// Filter_Map: which bit stands for the address of `key`, and setting it.
  std::uint32_t filter_bit(const Key& key) const { return vip_hash(key.address) & (capacity_.filter_bits() - 1); }
  void set_filter_bit(std::uint32_t bit, bool on) const;

  /// Service_Map. Inserting is all or nothing; -ENOSPC when the map is full.
  Result<void> insert_keys(std::span<const Key> keys, std::span<const std::uint32_t> values) const;
  Result<void> erase_key(const Key& key) const;
  Result<std::optional<std::uint32_t>> find_key(const Key& key) const;
  Result<std::vector<Key>> all_keys() const;

 private:
  Maps() = default;
  Result<void> map_arrays();
  std::size_t insert_some(std::span<const Key> keys, std::span<const std::uint32_t> values, int& error) const;
  std::span<counters> stats() const { return stats_.as<counters>(); }

  Capacity capacity_;
  std::vector<Fd> fds_;
  MappedArray filter_;
  MappedArray records_;
  MappedArray slots_;
  MappedArray backends_;
  MappedArray stats_;
  MappedArray meta_;
};

}  // namespace plugin
