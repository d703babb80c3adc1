// SPDX-License-Identifier: BSD-2-Clause
#include <fmt/format.h>
#include <gmock/gmock.h>

#include <algorithm>
#include <boost/json.hpp>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "kubernetes/store.h"

namespace kubernetes {
namespace {

using boost::json::object;
using testing::ElementsAre;
using testing::IsEmpty;

object service(const std::string& name, int number, std::uint64_t version) {
  return {{"metadata", {{"name", name}, {"namespace", "default"}, {"resourceVersion", std::to_string(version)}}},
          {"spec",
           {{"clusterIP", fmt::format("10.96.{}.{}", number / 250, 1 + number % 250)},
            {"ports", boost::json::array{object{{"port", 80}, {"protocol", "TCP"}}}}}}};
}

object slice(const std::string& name, const std::string& of, const std::vector<int>& pods, std::uint64_t version) {
  boost::json::array endpoints;
  for (const int pod : pods)
    endpoints.emplace_back(
        object{{"addresses", boost::json::array{fmt::format("10.1.{}.{}", pod / 250, 1 + pod % 250)}}});
  return {{"metadata",
           {{"name", name},
            {"namespace", "default"},
            {"resourceVersion", std::to_string(version)},
            {"labels", {{"kubernetes.io/service-name", of}}}}},
          {"addressType", "IPv4"},
          {"ports", boost::json::array{object{{"port", 8080}}}},
          {"endpoints", std::move(endpoints)}};
}

/// "default/web 10.96.0.1 2": its name, its first address, how many backends.
std::vector<std::string> changes(Store& store) {
  std::vector<std::string> seen;
  for (const Change& change : store.take_changes()) {
    seen.push_back(change.services.empty() ? change.name
                                           : fmt::format("{} {} {}", change.name, change.services[0].vip.to_string(),
                                                         change.services[0].backends.size()));
  }
  return seen;
}

class KubernetesStore : public testing::Test {
 protected:
  void list(Kind kind, const std::vector<object>& objects, std::uint64_t version) {
    store_.begin_list(kind);
    for (const object& one : objects) store_.list(kind, one);
    store_.end_list(kind, version);
  }
  void SetUp() override {
    list(Kind::service, {service("web", 0, 5)}, 10);
    list(Kind::slice, {slice("web-a", "web", {1, 2}, 6)}, 10);
    ASSERT_THAT(changes(store_), ElementsAre("default/web 10.96.0.1 2"));
  }
  Store store_{config::Kubernetes{}};
};

TEST_F(KubernetesStore, IsCompleteWithTheFirstListOfBothKinds) {
  Store fresh{config::Kubernetes{}};
  fresh.begin_list(Kind::service);
  fresh.end_list(Kind::service, 1);
  EXPECT_FALSE(fresh.is_complete());
  fresh.begin_list(Kind::slice);
  EXPECT_FALSE(fresh.is_complete());
  fresh.end_list(Kind::slice, 1);
  EXPECT_TRUE(fresh.is_complete());
}

TEST_F(KubernetesStore, EventTouchesItsServiceOnly) {
  list(Kind::service, {service("web", 0, 5), service("db", 1, 8)}, 11);
  EXPECT_THAT(changes(store_), ElementsAre("default/db 10.96.0.2 0"));
  store_.apply(Kind::slice, Event::added, slice("web-b", "web", {3}, 12));
  EXPECT_THAT(changes(store_), ElementsAre("default/web 10.96.0.1 3"));
  store_.apply(Kind::slice, Event::deleted, slice("web-a", "web", {1, 2}, 13));
  EXPECT_THAT(changes(store_), ElementsAre("default/web 10.96.0.1 1"));
}

TEST_F(KubernetesStore, SliceThatComesBeforeItsServiceIsKept) {
  store_.apply(Kind::slice, Event::added, slice("db-a", "db", {7}, 12));
  EXPECT_THAT(changes(store_), IsEmpty());
  store_.apply(Kind::service, Event::added, service("db", 1, 11));
  EXPECT_THAT(changes(store_), ElementsAre("default/db 10.96.0.2 1"));
}

TEST_F(KubernetesStore, SliceThatMovesToAnotherServiceChangesBoth) {
  store_.apply(Kind::service, Event::added, service("db", 1, 11));
  changes(store_);
  store_.apply(Kind::slice, Event::modified, slice("web-a", "db", {1, 2}, 12));
  EXPECT_THAT(changes(store_), ElementsAre("default/db 10.96.0.2 2", "default/web 10.96.0.1 0"));
}

TEST_F(KubernetesStore, WhatDoesNotChangeTheServiceIsNoChange) {
  auto annotated = service("web", 0, 12);
  annotated["metadata"].as_object()["annotations"] = object{{"a", "b"}};
  store_.apply(Kind::service, Event::modified, annotated);
  store_.apply(Kind::slice, Event::modified, slice("web-a", "web", {2, 1}, 12));
  store_.apply(Kind::slice, Event::modified, slice("web-a", "web", {1, 2, 3}, 13));
  store_.apply(Kind::slice, Event::modified, slice("web-a", "web", {1, 2}, 14));
  EXPECT_THAT(changes(store_), IsEmpty());
}

TEST_F(KubernetesStore, OldAndRepeatedEventsChangeNothing) {
  store_.apply(Kind::slice, Event::modified, slice("web-a", "web", {9}, 6));  // in the list already
  store_.apply(Kind::slice, Event::modified, slice("web-a", "web", {1, 2, 3}, 15));
  store_.apply(Kind::slice, Event::modified, slice("web-a", "web", {1}, 14));
  EXPECT_THAT(changes(store_), ElementsAre("default/web 10.96.0.1 3"));
  store_.apply(Kind::slice, Event::deleted, slice("web-a", "web", {1}, 14));
  store_.apply(Kind::slice, Event::modified, slice("web-a", "web", {1, 2, 3}, 15));
  EXPECT_THAT(changes(store_), IsEmpty());
}

TEST_F(KubernetesStore, WhatWasDeletedDoesNotComeBackByAnOldEvent) {
  store_.apply(Kind::service, Event::deleted, service("web", 0, 20));
  store_.apply(Kind::service, Event::modified, service("web", 0, 19));
  EXPECT_THAT(changes(store_), ElementsAre("default/web"));
  store_.bookmark(Kind::service, 30);
  store_.apply(Kind::service, Event::modified, service("web", 0, 29));
  EXPECT_THAT(changes(store_), IsEmpty());
  store_.apply(Kind::service, Event::added, service("web", 0, 31));
  EXPECT_THAT(changes(store_), ElementsAre("default/web 10.96.0.1 2"));
}

TEST_F(KubernetesStore, RelistDropsWhatIsGoneAndNothingBeforeItsEnd) {
  store_.begin_list(Kind::slice);
  EXPECT_THAT(changes(store_), IsEmpty());
  store_.list(Kind::slice, slice("web-b", "web", {4}, 40));
  EXPECT_THAT(changes(store_), ElementsAre("default/web 10.96.0.1 3"));
  store_.end_list(Kind::slice, 41);
  EXPECT_THAT(changes(store_), ElementsAre("default/web 10.96.0.1 1"));
}

TEST_F(KubernetesStore, ListOfAnEarlierTimeIsBelieved) {
  store_.apply(Kind::slice, Event::modified, slice("web-a", "web", {1, 2, 3}, 15));
  list(Kind::slice, {slice("web-a", "web", {1}, 3)}, 4);  // the cluster was restored from a backup
  EXPECT_THAT(changes(store_), ElementsAre("default/web 10.96.0.1 1"));
  store_.apply(Kind::slice, Event::modified, slice("web-a", "web", {1, 2}, 5));
  EXPECT_THAT(changes(store_), ElementsAre("default/web 10.96.0.1 2"));
}

TEST_F(KubernetesStore, ObjectThatTurnsBadIsAsIfItWereNotThereAndIsToldOnce) {
  auto bad = service("web", 0, 20);
  bad["spec"] = "none";
  store_.apply(Kind::service, Event::modified, bad);
  EXPECT_THAT(changes(store_), ElementsAre("default/web"));
  bad["metadata"].as_object()["resourceVersion"] = "21";
  store_.apply(Kind::service, Event::modified, bad);
  EXPECT_THAT(store_.take_problems(),
              ElementsAre("service default/web: spec: expected an object, got \"none\": skipped"));
  store_.apply(Kind::service, Event::modified, service("web", 0, 22));
  EXPECT_THAT(changes(store_), ElementsAre("default/web 10.96.0.1 2"));
  store_.drop(Kind::slice, "default/web-a");
  EXPECT_THAT(changes(store_), ElementsAre("default/web 10.96.0.1 0"));
}

/// A cluster that changes by chance, and a store that hears of it late, twice, in the wrong order and with gaps.
class Cluster {
 public:
  explicit Cluster(unsigned seed) : random_(seed) {}

  void change() {
    const int number = below(40);
    const std::string name = fmt::format("s{}", below(12));
    const bool is_service = below(4) == 0;
    auto& objects = is_service ? services_ : slices_;
    const std::string own = is_service ? name : fmt::format("slice{}", number);
    ++version_;
    const auto found = objects.find(own);
    if (found != objects.end() && below(3) == 0) {
      object last = found->second;
      last["metadata"].as_object()["resourceVersion"] = std::to_string(version_);
      objects.erase(found);
      send(is_service, Event::deleted, std::move(last));
      return;
    }
    std::vector<int> pods;
    for (int i = below(5); i > 0; --i) pods.push_back(below(100));
    std::ranges::sort(pods);
    const Event event = found == objects.end() ? Event::added : Event::modified;
    objects[own] = is_service ? service(name, below(12) + 12 * number, version_) : slice(own, name, pods, version_);
    send(is_service, event, objects[own]);
  }

  /// Some of what has not come yet, in any order; now and then again.
  void deliver(Store& store, std::size_t count) {
    for (; count > 0 && !pending_.empty(); --count) {
      const auto next = pending_.begin() + below(static_cast<int>(std::min<std::size_t>(pending_.size(), 8)));
      store.apply(next->kind, next->event, next->object);
      if (below(5) != 0) pending_.erase(next);
    }
  }

  /// What was on its way is lost; a list tells.
  void relist(Store& store) {
    pending_.clear();
    for (const Kind kind : {Kind::service, Kind::slice}) {
      store.begin_list(kind);
      for (const auto& [name, one] : kind == Kind::service ? services_ : slices_) store.list(kind, one);
      store.end_list(kind, version_);
    }
  }

  bool is_quiet() const { return pending_.empty(); }
  int below(int bound) { return std::uniform_int_distribution(0, bound - 1)(random_); }

 private:
  struct Sent {
    Kind kind;
    Event event;
    boost::json::object object;
  };
  void send(bool is_service, Event event, object changed) {
    pending_.push_back({is_service ? Kind::service : Kind::slice, event, std::move(changed)});
  }

  std::mt19937 random_;
  std::uint64_t version_ = 100;
  std::map<std::string, object> services_;
  std::map<std::string, object> slices_;
  std::vector<Sent> pending_;
};

using State = std::map<std::string, std::vector<config::Service>>;

void follow(Store& store, State& state) {
  for (Change& change : store.take_changes()) {
    if (change.services.empty()) {
      EXPECT_EQ(state.erase(change.name), 1U) << change.name << " was not there";
    } else {
      EXPECT_NE(state[change.name], change.services) << change.name << " has not changed";
      state[change.name] = std::move(change.services);
    }
  }
}

TEST(KubernetesStoreByChance, FinalStateIsThatOfAFreshList) {
  for (unsigned seed = 1; seed <= 60; ++seed) {
    Cluster cluster(seed);
    Store store{config::Kubernetes{}};
    State state;
    cluster.relist(store);
    for (int step = 0; step < 400; ++step) {
      cluster.change();
      if (cluster.below(3) == 0) cluster.deliver(store, 4);
      if (cluster.below(100) == 0) cluster.relist(store);
      if (cluster.below(3) == 0) follow(store, state);
    }
    while (!cluster.is_quiet()) cluster.deliver(store, 100);
    follow(store, state);

    Store fresh{config::Kubernetes{}};
    State expected;
    cluster.relist(fresh);
    follow(fresh, expected);
    ASSERT_EQ(state, expected) << "seed " << seed;
    ASSERT_EQ(store.services(), fresh.services());
    ASSERT_EQ(store.slices(), fresh.slices());
  }
}

}  // namespace
}  // namespace kubernetes
