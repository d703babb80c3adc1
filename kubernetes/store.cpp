// SPDX-License-Identifier: BSD-2-Clause
#include "kubernetes/store.h"

#include <fmt/format.h>

#include <array>
#include <bit>
#include <boost/container_hash/hash.hpp>
#include <utility>

#include "kubernetes/translate.h"

namespace kubernetes {
namespace {

// Deletions that are remembered until a bookmark or a list makes them old. One that is forgotten could be undone only
// by an event that is later than thousands of others.
constexpr std::size_t max_deleted = 65536;
constexpr std::size_t max_problems = 1000;  // that nobody has taken

template <class Object>
constexpr std::string_view kind_of = std::is_same_v<Object, Service> ? "a service" : "an endpointslice";

void mix_in(std::size_t& sum, const config::Address& address) {
  if (address.is_v4()) return boost::hash_combine(sum, address.to_v4().to_uint());
  for (const std::uint64_t half : std::bit_cast<std::array<std::uint64_t, 2>>(address.to_v6().to_bytes()))
    boost::hash_combine(sum, half);
}

/// Of all that translate() says of services. That two of one name have the same by chance is not to be expected in the
/// lifetime of a cluster; who makes them so on purpose has an own service that is out of date.
std::uint64_t fingerprint(const std::vector<config::Service>& services) {
  std::size_t sum = services.size();
  for (const config::Service& one : services) {
    boost::hash_combine(sum, one.name);
    mix_in(sum, one.vip);
    boost::hash_combine(sum, one.port);
    boost::hash_combine(sum, std::to_underlying(one.protocol));
    boost::hash_combine(sum, one.affinity ? one.affinity->count() : -1);
    boost::hash_combine(sum, one.backends.size());
    for (const config::Backend& backend : one.backends) {
      mix_in(sum, backend.address);
      boost::hash_combine(sum, backend.port);
      boost::hash_combine(sum, std::to_underlying(backend.state));
    }
  }
  return sum;
}

}  // namespace

void Store::index(const std::string& name, const Slice* before, const Slice* after) {
  if (before != nullptr && (after == nullptr || before->service != after->service)) {
    const auto found = slices_of_.find(before->service);
    found->second.erase(name);
    if (found->second.empty()) slices_of_.erase(found);
  }
  if (after != nullptr) slices_of_[after->service].insert(name);
}

template <class Object>
void Store::put(Objects<Object>& all, const boost::json::object& object, const std::string& name) {
  auto reading = read(all, object);
  const auto [found, is_new] = all.objects.try_emplace(name);
  Known<Object>& known = found->second;
  if (is_new) known.first_list = all.list;
  known.version = version_of(object);
  known.list = all.list;
  if (reading.problem != known.problem && !reading.problem.empty() && problems_.size() < max_problems)
    problems_.push_back(reading.problem);
  known.problem = std::move(reading.problem);
  if (known.object == reading.object) return;
  if (known.object) touch(name, *known.object);
  if (reading.object) touch(name, *reading.object);
  index(name, known.object ? &*known.object : nullptr, reading.object ? &*reading.object : nullptr);
  known.object = std::move(reading.object);
}

template <class Object>
void Store::erase(Objects<Object>& all, const std::string& name) {
  const auto found = all.objects.find(name);
  if (found == all.objects.end()) return;
  if (found->second.object) {
    touch(name, *found->second.object);
    index(name, &*found->second.object, nullptr);
  }
  all.objects.erase(found);
}

template <class Object>
void Store::apply(Objects<Object>& all, Event event, const boost::json::object& object) {
  const auto name = name_of(object);
  if (!name) {
    if (problems_.size() < max_problems)
      problems_.push_back(fmt::format("{}: {}: skipped", kind_of<Object>, name.error().message));
    return;
  }
  // Versions are numbers that grow with time. An API server that has others sends its events in order at least.
  const std::uint64_t version = version_of(object);
  if (version != 0) {
    const auto known = all.objects.find(*name);
    const auto deleted = all.deleted.find(*name);
    if (version <= all.floor || (known != all.objects.end() && version <= known->second.version) ||
        (deleted != all.deleted.end() && version <= deleted->second))
      return;
  }
  if (event != Event::deleted) {
    put(all, object, *name);
    return;
  }
  erase(all, *name);
  if (version == 0) return;
  if (!all.deleted.contains(*name)) all.deleted_order.push_back(*name);
  all.deleted[*name] = version;
  if (all.deleted_order.size() > max_deleted) {
    all.deleted.erase(all.deleted_order.front());
    all.deleted_order.pop_front();
  }
}

template <class Object>
void Store::raise_floor(Objects<Object>& all, std::uint64_t version) {
  all.floor = version;
  std::erase_if(all.deleted, [version](const auto& one) { return one.second <= version; });
  std::erase_if(all.deleted_order, [&all](const std::string& name) { return !all.deleted.contains(name); });
}

template <class Object>
void Store::end_list(Objects<Object>& all, std::uint64_t version) {
  std::vector<std::string> gone;
  for (const auto& [name, known] : all.objects)
    if (known.list != all.list) gone.push_back(name);
  for (const std::string& name : gone) erase(all, name);
  // A list is the truth, also when it is older than an event was: the cluster's data may have been restored.
  all.deleted.clear();
  all.deleted_order.clear();
  all.floor = version;
  all.is_listed = true;
}

template <class Object>
void Store::give_up_list(Objects<Object>& all) {
  std::vector<std::string> gone;
  for (const auto& [name, known] : all.objects)
    if (known.first_list == all.list) gone.push_back(name);
  for (const std::string& name : gone) erase(all, name);
}

void Store::begin_list(Kind kind) { kind == Kind::service ? ++services_.list : ++slices_.list; }

void Store::list(Kind kind, const boost::json::object& object) {
  const auto put_in = [&](auto& all, std::string_view what) {
    if (const auto name = name_of(object))
      put(all, object, *name);
    else if (problems_.size() < max_problems)
      problems_.push_back(fmt::format("{}: {}: skipped", what, name.error().message));
  };
  kind == Kind::service ? put_in(services_, kind_of<Service>) : put_in(slices_, kind_of<Slice>);
}

void Store::end_list(Kind kind, std::uint64_t version) {
  kind == Kind::service ? end_list(services_, version) : end_list(slices_, version);
}

void Store::give_up_list(Kind kind) { kind == Kind::service ? give_up_list(services_) : give_up_list(slices_); }

void Store::apply(Kind kind, Event event, const boost::json::object& object) {
  kind == Kind::service ? apply(services_, event, object) : apply(slices_, event, object);
}

void Store::bookmark(Kind kind, std::uint64_t version) {
  if (kind == Kind::service ? version > services_.floor : version > slices_.floor)
    kind == Kind::service ? raise_floor(services_, version) : raise_floor(slices_, version);
}

void Store::drop(Kind kind, const std::string& name) {
  kind == Kind::service ? erase(services_, name) : erase(slices_, name);
}

std::vector<Change> Store::take_changes() {
  std::vector<Change> changes;
  for (const std::string& name : std::exchange(touched_, {})) {
    Translation translation;
    const auto service = services_.objects.find(name);
    if (service != services_.objects.end() && service->second.object) {
      std::vector<const Slice*> slices;
      if (const auto found = slices_of_.find(name); found != slices_of_.end()) {
        for (const std::string& slice : found->second) slices.push_back(&*slices_.objects.at(slice).object);
      }
      translation = translate(*service->second.object, slices);
    }
    const auto told_problems = told_problems_.find(name);
    if (translation.problems.empty()) {
      if (told_problems != told_problems_.end()) told_problems_.erase(told_problems);
    } else if (told_problems == told_problems_.end() || told_problems->second != translation.problems) {
      problems_.insert(problems_.end(), translation.problems.begin(), translation.problems.end());
      told_problems_.insert_or_assign(name, std::move(translation.problems));
    }
    const auto told = told_.find(name);
    const bool is_served = !translation.services.empty();
    const std::uint64_t print = fingerprint(translation.services);
    if (told == told_.end() ? !is_served : is_served && told->second == print) continue;
    changes.push_back({.name = name, .services = std::move(translation.services)});
    if (is_served)
      told_.insert_or_assign(name, print);
    else
      told_.erase(told);
  }
  return changes;
}

std::vector<std::string> Store::take_problems() { return std::exchange(problems_, {}); }

}  // namespace kubernetes
