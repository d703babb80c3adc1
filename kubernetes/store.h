// SPDX-License-Identifier: BSD-2-Clause
//
// What the API server has told so far, and which services differ from what was told on. The state depends on the latest
// version of each object alone: not on the order in which events came, nor on how often. Used by one thread.
#pragma once

#include <boost/json/object.hpp>
#include <cstdint>
#include <deque>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "config/config.h"
#include "kubernetes/objects.h"

namespace kubernetes {

enum class Kind : std::uint8_t { service, slice };
enum class Event : std::uint8_t { added, modified, deleted };

/// A service of Kubernetes as it is now: `services` empty when there is nothing of it to serve any more.
struct Change {
  std::string name;  // "namespace/name"
  std::vector<config::Service> services;
};

class Store {
 public:
  explicit Store(config::Kubernetes choices) : choices_(std::move(choices)) {}

  /// A list, page by page. end_list() drops what was not in it: `version` is the list's, and events up to it are old.
  void begin_list(Kind kind);
  void list(Kind kind, const boost::json::object& object);
  void end_list(Kind kind, std::uint64_t version);
  /// The list is none: what nothing else has told of goes.
  void give_up_list(Kind kind);

  void apply(Kind kind, Event event, const boost::json::object& object);
  /// All events up to `version` have come.
  void bookmark(Kind kind, std::uint64_t version);
  /// An object that was too large to be read, or is no JSON: as if it were not there. `name` is "namespace/name".
  void drop(Kind kind, const std::string& name);

  /// Both kinds were listed to the end once: what is not here is not there.
  [[nodiscard]] bool is_complete() const { return services_.is_listed && slices_.is_listed; }

  /// Services that differ from what take_changes() returned before, by name.
  std::vector<Change> take_changes();
  [[nodiscard]] bool has_touched() const { return !touched_.empty(); }
  /// What was skipped, a line each, and each once.
  std::vector<std::string> take_problems();

  [[nodiscard]] std::size_t services() const { return services_.objects.size(); }
  [[nodiscard]] std::size_t slices() const { return slices_.objects.size(); }

 private:
  template <class Object>
  struct Known {
    std::uint64_t version = 0;
    std::uint64_t list = 0;        // the last list that had it
    std::uint64_t first_list = 0;  // or that was begun when it was new
    std::optional<Object> object;  // empty: it is there, and none of ours
    std::string problem;           // as it was told
  };

  template <class Object>
  struct Objects {
    std::unordered_map<std::string, Known<Object>> objects;  // by name
    std::uint64_t list = 0;                                  // counts them
    std::uint64_t floor = 0;                                 // events up to this version are old
    std::map<std::string, std::uint64_t> deleted;            // since then, by version
    std::deque<std::string> deleted_order;
    bool is_listed = false;
  };

  template <class Object>
  void put(Objects<Object>& all, const boost::json::object& object, const std::string& name);
  template <class Object>
  void apply(Objects<Object>& all, Event event, const boost::json::object& object);
  template <class Object>
  void erase(Objects<Object>& all, const std::string& name);
  template <class Object>
  void end_list(Objects<Object>& all, std::uint64_t version);
  template <class Object>
  void give_up_list(Objects<Object>& all);
  template <class Object>
  void raise_floor(Objects<Object>& all, std::uint64_t version);

  Reading<Service> read(Objects<Service>&, const boost::json::object& object) { return read_service(object, choices_); }
  Reading<Slice> read(Objects<Slice>&, const boost::json::object& object) { return read_slice(object, choices_); }
  void touch(const std::string& name, const Service&) { touched_.insert(name); }
  void touch(const std::string&, const Slice& slice) { touched_.insert(slice.service); }
  void index(const std::string& name, const Slice* before, const Slice* after);
  void index(const std::string&, const Service*, const Service*) {}

  const config::Kubernetes choices_;
  Objects<Service> services_;
  Objects<Slice> slices_;
  std::unordered_map<std::string, std::set<std::string>> slices_of_;  // a service's slices, by name
  std::set<std::string> touched_;
  std::unordered_map<std::string, std::uint64_t> told_;  // fingerprints: whoever was told keeps the services
  std::unordered_map<std::string, std::vector<std::string>> told_problems_;  // of translations
  std::vector<std::string> problems_;
};

}  // namespace kubernetes
