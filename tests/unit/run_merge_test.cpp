// SPDX-License-Identifier: BSD-2-Clause
#include <gmock/gmock.h>

#include <string>
#include <vector>

#include "config/read_config.h"
#include "run/merge.h"

namespace run {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

constexpr const char* file = R"([limits]
services = 3
backends = 4
[[service]]
name = "fixed"
vip = "10.96.200.1"
port = 80
backends = ["10.1.0.9:80"])";  // without an end of line

config::Service service(const std::string& name, const std::string& vip, const std::vector<std::string>& backends,
                        config::Protocol protocol = config::Protocol::tcp) {
  config::Service one;
  one.name = name;
  one.vip = boost::asio::ip::make_address(vip);
  one.port = 80;
  one.protocol = protocol;
  one.client = config::Client::netns;
  for (const std::string& address : backends) {
    config::Backend backend;
    backend.address = boost::asio::ip::make_address(address);
    backend.port = 80;
    one.backends.push_back(backend);
  }
  return one;
}

Merged merged(const ClusterServices& cluster, const std::vector<config::Service>& serving = {}) {
  const auto own = config::read_config(file);
  return merge(own.value(), file, cluster, serving);
}

/// What the text says is what the model has, but for positions.
void expect_text_says_the_same(const Merged& merged) {
  const auto read = config::read_config(merged.text);
  ASSERT_TRUE(read) << read.error().front().message;
  ASSERT_EQ(read->services.size(), merged.config.services.size());
  for (std::size_t i = 0; i < read->services.size(); ++i) {
    config::Service said = read->services[i];
    config::Service meant = merged.config.services[i];
    said.position = meant.position = {};
    for (auto* backends : {&said.backends, &meant.backends})
      for (config::Backend& backend : *backends) backend.position = {};
    EXPECT_EQ(said, meant) << meant.name;
  }
}

std::vector<std::string> names(const Merged& merged) {
  std::vector<std::string> result;
  for (const config::Service& one : merged.config.services) result.push_back(one.name);
  return result;
}

TEST(Merge, TextAndModelSayTheSame) {
  auto sticky = service("default/web:80/tcp", "10.96.0.1", {"10.1.0.1", "10.1.0.2"});
  sticky.affinity = std::chrono::hours(3);
  sticky.backends[1].state = config::BackendState::drain;
  const Merged result = merged({{"default/web", {sticky, service("default/web:80/tcp@ipv6", "fd00::1", {"fd01::1"})}}});
  EXPECT_THAT(result.problems, IsEmpty());
  EXPECT_THAT(names(result), ElementsAre("fixed", "default/web:80/tcp", "default/web:80/tcp@ipv6"));
  expect_text_says_the_same(result);
}

TEST(Merge, CollisionNamesBothAndTheFileWins) {
  const Merged result = merged({{"default/a", {service("default/a:80/tcp", "10.96.200.1", {})}},
                                {"default/b", {service("default/b:80/tcp", "10.96.0.2", {})}},
                                {"default/c", {service("default/c:80/tcp", "10.96.0.2", {})}},
                                {"default/d", {service("default/d:80/udp", "10.96.0.2", {}, config::Protocol::udp)}}});
  EXPECT_THAT(names(result), ElementsAre("fixed", "default/b:80/tcp", "default/d:80/udp"));
  EXPECT_THAT(
      result.problems,
      ElementsAre("service default/a:80/tcp of Kubernetes: its vip 10.96.200.1:80/tcp is that of service fixed of "
                  "the file, line 4: it is not served",
                  "service default/c:80/tcp of Kubernetes: its vip 10.96.0.2:80/tcp is that of service "
                  "default/b:80/tcp of Kubernetes: it is not served"));
  expect_text_says_the_same(result);
}

TEST(Merge, NameOfTheFileIsTheFilesAndTheVipIsFree) {
  const Merged result = merged({{"default/a", {service("fixed", "10.96.0.2", {})}},
                                {"default/b", {service("default/b:80/tcp", "10.96.0.2", {})}}});
  EXPECT_THAT(names(result), ElementsAre("fixed", "default/b:80/tcp"));
  EXPECT_THAT(result.problems,
              ElementsAre("service fixed of Kubernetes: a service of the file has its name: it is not served"));
  expect_text_says_the_same(result);
}

TEST(Merge, BackendThatIsAVipIsLeftOut) {
  const Merged result =
      merged({{"default/a", {service("default/a:80/tcp", "10.96.0.1", {"10.96.200.1", "10.1.0.1"})}}});
  EXPECT_THAT(result.problems,
              ElementsAre("service default/a:80/tcp of Kubernetes: its backend 10.96.200.1:80 is the vip "
                          "of service fixed of the file, line 4: it is left out"));
  EXPECT_EQ(result.config.services.at(1).backends.size(), 1U);
  expect_text_says_the_same(result);
}

TEST(Merge, BackendOfTheFileIsNoVip) {
  const Merged result = merged({{"default/a", {service("default/a:80/tcp", "10.1.0.9", {})}}});
  EXPECT_THAT(
      result.problems,
      ElementsAre("service default/a:80/tcp of Kubernetes: its vip 10.1.0.9:80/tcp is a backend of service fixed "
                  "of the file, line 4: it is not served"));
  expect_text_says_the_same(result);
}

TEST(Merge, ExternalAddressTakesNoClusterIpAndNoEndpoint) {
  const Merged result =
      merged({{"a/a",
               {service("a/a:80/tcp@10.96.0.2", "10.96.0.2", {}), service("a/a:80/tcp@10.1.0.1", "10.1.0.1", {}),
                service("a/a:80/tcp@ipv6", "fd00::1", {})}},
              {"b/b", {service("b/b:80/tcp", "10.96.0.2", {"10.1.0.1"})}}},
             {service("a/a:80/tcp@10.96.0.2", "10.96.0.2", {})});  // it had it while there was no b/b
  EXPECT_THAT(names(result), ElementsAre("fixed", "a/a:80/tcp@ipv6", "b/b:80/tcp"));
  EXPECT_THAT(result.problems,
              ElementsAre("service a/a:80/tcp@10.96.0.2 of Kubernetes: its vip 10.96.0.2:80/tcp is that of service "
                          "b/b:80/tcp of Kubernetes: it is not served",
                          "service a/a:80/tcp@10.1.0.1 of Kubernetes: its vip 10.1.0.1:80/tcp is a backend of service "
                          "b/b:80/tcp of Kubernetes: it is not served"));
  EXPECT_EQ(result.left_out, 2U);
  EXPECT_EQ(result.config.services.back().backends.size(), 1U);
  expect_text_says_the_same(result);
}

TEST(Merge, WhatThereIsNoRoomForIsLeftOut) {
  const Merged many = merged({{"default/a", {service("default/a:80/tcp", "10.96.0.1", {"10.1.0.1", "10.1.0.2"})}},
                              {"default/b", {service("default/b:80/tcp", "10.96.0.2", {"10.1.0.1", "10.1.0.2"})}},
                              {"default/c", {service("default/c:80/tcp", "10.96.0.3", {})}},
                              {"default/d", {service("default/d:80/tcp", "10.96.0.4", {})}}});
  EXPECT_THAT(names(many), ElementsAre("fixed", "default/a:80/tcp", "default/c:80/tcp"));
  EXPECT_THAT(many.problems, ElementsAre("service default/b:80/tcp of Kubernetes: there would be more than 4 backends "
                                         "(limits.backends): it is not served",
                                         "service default/d:80/tcp of Kubernetes: there are 3 services already "
                                         "(limits.services): it is not served"));
  EXPECT_EQ(many.left_out, 2U);
  expect_text_says_the_same(many);
}

TEST(Merge, VipOfWhatThereIsNoRoomForMayBeABackend) {
  const Merged result = merged({{"a/a", {service("a/a:80/tcp", "10.96.0.1", {"10.96.0.2"})}},
                                {"b/b", {service("b/b:80/tcp", "10.96.0.2", {"10.1.0.1", "10.1.0.2", "10.1.0.3"})}}});
  EXPECT_THAT(names(result), ElementsAre("fixed", "a/a:80/tcp"));
  EXPECT_EQ(result.config.services.back().backends.size(), 1U);
  expect_text_says_the_same(result);
}

TEST(Merge, NewExternalAddressTakesNoEndpointAndOneThatServesIsNotTakenByOne) {
  const auto shop = service("a/shop:80/tcp@192.0.2.1", "192.0.2.1", {"10.1.0.1"});
  const ClusterServices cluster = {{"a/shop", {shop}},
                                   {"b/evil", {service("b/evil:80/tcp", "10.96.0.2", {"192.0.2.1"})}}};
  const Merged before = merged(cluster);
  EXPECT_THAT(names(before), ElementsAre("fixed", "b/evil:80/tcp"));
  EXPECT_THAT(before.contested, ElementsAre(MergedKey(shop.vip, 80, config::Protocol::tcp)));
  const Merged later = merged(cluster, {shop});
  EXPECT_THAT(names(later), ElementsAre("fixed", "a/shop:80/tcp@192.0.2.1", "b/evil:80/tcp"));
  EXPECT_THAT(later.problems, ElementsAre("service b/evil:80/tcp of Kubernetes: its backend 192.0.2.1:80 is the vip of "
                                          "service a/shop:80/tcp@192.0.2.1 of Kubernetes: it is left out"));
  EXPECT_THAT(later.contested, IsEmpty());
}

TEST(Merge, NamespacesComeInTurns) {
  const ClusterServices greedy = {{"a/1", {service("a/1:80/tcp", "10.96.0.1", {"10.1.0.1"})}},
                                  {"a/2", {service("a/2:80/tcp", "10.96.0.2", {})}},
                                  {"a/3", {service("a/3:80/tcp", "10.96.0.3", {})}},
                                  {"b/1", {service("b/1:80/tcp", "10.96.1.1", {"10.1.1.1"})}}};
  EXPECT_THAT(names(merged(greedy)), ElementsAre("fixed", "a/1:80/tcp", "b/1:80/tcp"));
  // One of many backends has its turn behind those of few, in whatever namespace.
  const ClusterServices fat = {{"a/1", {service("a/1:80/tcp", "10.96.0.1", {"10.1.0.1", "10.1.0.2", "10.1.0.3"})}},
                               {"b/1", {service("b/1:80/tcp", "10.96.1.1", {"10.1.1.1"})}}};
  EXPECT_THAT(names(merged(fat)), ElementsAre("fixed", "b/1:80/tcp"));
}

TEST(Merge, WhatServesStaysUpToTheShareOfItsNamespace) {
  const auto one = service("b/1:80/tcp", "10.96.1.1", {"10.1.1.1"});
  const auto two = service("b/2:80/tcp", "10.96.1.2", {"10.1.1.1"});
  const auto late = service("a/1:80/tcp", "10.96.0.1", {});
  const ClusterServices alone = {{"b/0", {service("b/0:80/tcp", "10.96.1.2", {})}}, {"b/1", {one}}, {"b/2", {two}}};
  EXPECT_THAT(names(merged(alone)), ElementsAre("fixed", "b/0:80/tcp", "b/1:80/tcp"));
  EXPECT_THAT(names(merged(alone, {one, two})), ElementsAre("fixed", "b/1:80/tcp", "b/2:80/tcp"));
  // There is room for two services: one for each of two namespaces.
  const ClusterServices both = {{"a/1", {late}}, {"b/1", {one}}, {"b/2", {two}}};
  EXPECT_THAT(names(merged(both, {one, two})), ElementsAre("fixed", "a/1:80/tcp", "b/1:80/tcp"));
}

TEST(Merge, WhatServesAndGrowsKeepsAsManyBackendsAsThereIsRoomFor) {
  auto grown = service("a/1:80/tcp", "10.96.0.1", {"10.1.0.1", "10.1.0.2", "10.1.0.3", "10.1.0.4"});
  grown.backends[0].state = config::BackendState::drain;
  const Merged result = merged({{"a/1", {grown}}}, {grown});
  EXPECT_THAT(result.problems, ElementsAre("service a/1:80/tcp of Kubernetes: there would be more than 4 backends "
                                           "(limits.backends): 1 of its 4 are left out"));
  ASSERT_EQ(result.config.services.back().backends.size(), 3U);
  EXPECT_EQ(result.config.services.back().backends.front(), grown.backends[1]);
  EXPECT_TRUE(result.is_short);
  EXPECT_EQ(result.left_out, 0U);
  expect_text_says_the_same(result);
}

TEST(Merge, KnowsTheNamesOfClusters) {
  for (const char* name : {"default/web:80/tcp", "a/b:65535/udp", "a/b:80/tcp@ipv6", "a/b:80/tcp@192.0.2.1"})
    EXPECT_TRUE(is_cluster_name(name)) << name;
  for (const char* name : {"", "web", "default/web", "web:80/tcp", "/web:80/tcp", "a/:80/tcp", "a/b:/tcp", "a/b:x/tcp",
                           "a/b:80/sctp", "a/b:80", "(canary)"})
    EXPECT_FALSE(is_cluster_name(name)) << name;
}

}  // namespace
}  // namespace run
