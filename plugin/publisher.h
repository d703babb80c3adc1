// SPDX-License-Identifier: BSD-2-Clause
//
// Publishes services into the maps, each by one atomic store, while programs read them. ARCHITECTURE.md, "Publication",
// explains the order of the steps; the torture test in tests/torture shows what happens without it.
#pragma once

#include <boost/unordered/unordered_flat_map.hpp>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "config/config.h"
#include "plugin/grace_period.h"
#include "plugin/map_encoding.h"
#include "plugin/maps.h"
#include "plugin/pools.h"
#include "plugin/system_error.h"

namespace plugin {

/// A service as the maps have it.
struct PublishedService {
  config::Service service;
  std::uint32_t record = 0;
  Block block;
  std::vector<std::uint32_t> backends;  // the Backend_Map index of each of service.backends
  bool intact = true;                   // the block is what this service's would be; adoption finds out
};

/// Everything that is published, read from the maps alone. Safe beside a publisher in another process: what it sees of
/// one service is consistent, unless the service changes again and again during the reading.
std::vector<PublishedService> read_published(const Maps& maps);

/// The only writer of a set of maps. Used by one thread at a time.
class Publisher {
 public:
  /// For fresh maps, with nothing published. With `before`, the publisher of the maps that these take the place of,
  /// services and backends get the indices that they have there, which sockets and clients remember; it must outlive
  /// the first apply(), settle() must follow that, and there must be room.
  static Result<Publisher> create(Maps& maps, const Publisher* before);
  void settle();

  /// For maps that another process has written and left. -EPROTO: what they hold is damaged, and stays as it is.
  static Result<Publisher> adopt(Maps& maps);

  /// Makes `services` what is published: all of them or, on failure, none. Moves from them on success; after a failure
  /// they are as they were. -ENOSPC: the maps have no room, or none in one piece; new maps of that size may have.
  Result<void> apply(std::span<config::Service> services, bool peer_names);

  /// Replaces the backends of one service, at a cost that depends on this service only. -ENOENT: no such service.
  Result<void> set_backends(std::string_view service, std::vector<config::Backend> backends);

  const PublishedService* find_published(const Key& key) const;
  const config::Service* find(std::string_view name) const;
  const config::Service* find(const Key& key) const;
  std::vector<config::Service> services() const;
  /// By record index; those without a port are none.
  std::span<const PublishedService> published() const { return published_; }
  std::size_t backend_count() const { return backend_count_; }
  bool peer_names() const { return peer_names_; }

  /// Backends that have left, but that live connections still count at.
  std::span<const std::uint32_t> held_backends() const { return backends_.held(); }

  /// Whether the last change took away backends whose connected sockets are to be ended.
  struct Left {
    bool udp = false;
    bool tcp = false;
    std::vector<std::uint32_t> backends;
  };
  const Left& left() const { return left_; }

 private:
  /// A service that is written beside what is published, ready to be published.
  struct Staged {
    config::Service* source = nullptr;  // where next.service came from; null: nothing is staged yet
    PublishedService next;
    std::string name;  // a copy for by_name_
    bool is_new = false;
    bool has_record = false;
    std::vector<std::uint32_t> fresh;   // those of next.backends that were taken for it
    std::vector<std::uint32_t> places;  // of each of next.backends
    std::vector<std::size_t> leaving;   // those of the published one's backends that it does not have
  };

  Publisher(Maps& maps, GracePeriod grace, IndexPool records, IndexPool backends, ExtentPool blocks);

  Result<void> publish(std::span<config::Service* const> changed, std::span<const std::uint32_t> removed);
  Result<void> stage(config::Service& service, Staged& staged);
  void unstage(Staged& staged) noexcept;
  void reserve_for_commit(const std::vector<Staged>& staged, std::span<const std::uint32_t> removed);
  void commit(Staged& staged);
  void remove(std::uint32_t record);
  Result<void> insert_new_keys(const std::vector<Staged>& staged);
  void erase_unused_keys();
  void count_vip(const Key& marker);
  void forget_vip(const Key& marker);
  void leave(const PublishedService& published, std::size_t backend);
  void note_left(const config::Service& service, std::uint32_t backend);
  const PublishedService* published_before(const Key& key) const;
  void enter(PublishedService published, std::string name);
  void forget_name(const std::string& name, std::uint32_t record);
  void reclaim_if_worthwhile();

  template <class Pool, class... Size>
  Result<std::uint32_t> take(Pool& pool, Size... size);
  Result<void> reclaim();

  // A pointer, so that a Publisher can be moved; the maps outlive it.
  Maps* maps_;
  GracePeriod grace_;
  IndexPool records_;
  IndexPool backends_;
  ExtentPool blocks_;
  std::vector<PublishedService> published_;  // by record index
  boost::unordered_flat_map<Key, std::uint32_t, KeyHash> by_key_;
  boost::unordered_flat_map<std::string, std::uint32_t> by_name_;
  boost::unordered_flat_map<Key, std::uint32_t, KeyHash> vips_;  // marker -> services with this address
  std::vector<std::uint32_t> filter_counts_;                     // of each bit of Filter_Map: VIPs that it stands for
  // Keys of Service_Map that stand for nothing any more, and the record that becomes free with each.
  std::vector<std::pair<Key, std::uint32_t>> unused_keys_;
  Left left_;
  std::size_t backend_count_ = 0;
  bool peer_names_ = false;
  const Publisher* before_ = nullptr;  // until settle()
};

}  // namespace plugin
