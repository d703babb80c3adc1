// SPDX-License-Identifier: BSD-2-Clause
//
// kube-proxy's documented behaviour, as a table: objects as the API server sends them, and the backends that are
// expected.
#include <fmt/format.h>
#include <gmock/gmock.h>

#include <boost/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "config/names.h"
#include "config/values.h"
#include "kubernetes/objects.h"
#include "kubernetes/translate.h"

namespace kubernetes {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

boost::json::object parse(std::string text) {
  std::ranges::replace(text, '\'', '"');
  return boost::json::parse(text).as_object();
}

/// "default/web:80/tcp 10.96.0.1: 10.1.0.1:8080, 10.1.0.2:8080 drain"
std::string shown(const config::Service& service) {
  std::string text = fmt::format("{} {}:", service.name, service.vip.to_string());
  for (const config::Backend& backend : service.backends) {
    text += fmt::format("{} {}{}", &backend == &service.backends.front() ? "" : ",",
                        config::to_text(backend.address, backend.port),
                        backend.state == config::BackendState::drain ? " drain" : "");
  }
  return text;
}

/// `spec` beside a name: what follows the braces of "spec".
std::string service(const std::string& spec, const std::string& more = "") {
  return fmt::format(
      "{{'metadata': {{'name': 'web', 'namespace': 'default', 'resourceVersion': '7'{}}}, 'spec': {{{}}}}}", more,
      spec);
}

/// A ClusterIP service of one port.
std::string web(const std::string& more = "") {
  return service("'clusterIP': '10.96.0.1', 'clusterIPs': ['10.96.0.1'], 'ports': [{'port': 80, 'protocol': 'TCP'}]" +
                 more);
}

std::string slice(const std::string& endpoints,
                  const std::string& ports = "{'name': '', 'port': 8080, 'protocol': 'TCP'}",
                  const std::string& type = "IPv4") {
  return fmt::format(
      "{{'metadata': {{'name': 'web-1', 'namespace': 'default', 'labels': {{'kubernetes.io/service-name': 'web'}}}}, "
      "'addressType': '{}', 'ports': [{}], 'endpoints': [{}]}}",
      type, ports, endpoints);
}

/// An endpoint: conditions as letters. R ready, r not ready, S serving, s not serving, T terminating.
std::string at(const std::string& address, const std::string& conditions = "", const std::string& more = "") {
  std::string text;
  const auto add = [&](char letter, const char* condition) {
    if (conditions.contains(letter)) text += fmt::format("{}{}", text.empty() ? "" : ", ", condition);
  };
  add('R', "'ready': true");
  add('r', "'ready': false");
  add('S', "'serving': true");
  add('s', "'serving': false");
  add('T', "'terminating': true");
  return fmt::format("{{'addresses': ['{}'], 'conditions': {{{}}}{}}}", address, text, more);
}

std::string on(const std::string& node) { return fmt::format(", 'nodeName': '{}'", node); }
std::string for_zones(const std::string& zone) {
  return fmt::format(", 'hints': {{'forZones': [{{'name': '{}'}}]}}", zone);
}
std::string for_nodes(const std::string& node, const std::string& zone) {
  return fmt::format(", 'hints': {{'forNodes': [{{'name': '{}'}}], 'forZones': [{{'name': '{}'}}]}}", node, zone);
}

config::Kubernetes choose(const std::string& node, const std::string& zone, const std::string& proxy_name = {}) {
  config::Kubernetes choices;
  choices.node = node;
  choices.zone = zone;
  choices.proxy_name = proxy_name;
  return choices;
}

config::Kubernetes with_external_ips() {
  config::Kubernetes choices = choose("here", "east");
  choices.external_ips = true;
  return choices;
}

const config::Kubernetes here = choose("here", "east");

struct Case {
  const char* fact;
  std::string service;
  std::vector<std::string> slices;
  std::vector<std::string> expected;
  config::Kubernetes choices = here;
};

// clang-format off
const std::vector<Case> cases = {
  // Addresses and ports
  {"a service without endpoints has no backend", web(), {}, {"default/web:80/tcp 10.96.0.1:"}},
  {"the slice's port is the pods', resolved from a name already", web(), {slice(at("10.1.0.1", "R"))},
   {"default/web:80/tcp 10.96.0.1: 10.1.0.1:8080"}},
  {"ports are matched by name and protocol, not by number",
   service("'clusterIP': '10.96.0.10', 'ports': [{'name': 'dns', 'port': 53, 'protocol': 'UDP'}, {'name': 'dns-tcp', 'port': 53, 'protocol': 'TCP'},"
           " {'name': 'metrics', 'port': 9153}]"),
   {slice(at("10.1.0.1", "R"), "{'name': 'dns', 'port': 5353, 'protocol': 'UDP'}, {'name': 'dns-tcp', 'port': 5354, 'protocol': 'TCP'}")},
   {"default/web:53/udp 10.96.0.10: 10.1.0.1:5353", "default/web:53/tcp 10.96.0.10: 10.1.0.1:5354", "default/web:9153/tcp 10.96.0.10:"}},
  {"pods of one service may have different ports by one name",
   web(), {slice(at("10.1.0.1", "R")), slice(at("10.1.0.2", "R"), "{'port': 9090}")},
   {"default/web:80/tcp 10.96.0.1: 10.1.0.1:8080, 10.1.0.2:9090"}},
  {"both families are served, each by slices of its own",
   service("'clusterIP': '10.96.0.1', 'clusterIPs': ['10.96.0.1', 'fd00::1'], 'ports': [{'port': 80}]"),
   {slice(at("10.1.0.1", "R")), slice(at("fd01::1", "R"), "{'port': 8080}", "IPv6")},
   {"default/web:80/tcp 10.96.0.1: 10.1.0.1:8080", "default/web:80/tcp@ipv6 fd00::1: [fd01::1]:8080"}},
  {"SCTP is left out", service("'clusterIP': '10.96.0.1', 'ports': [{'name': 'a', 'port': 80}, {'name': 'b', 'port': 81, 'protocol': 'SCTP'}]"),
   {}, {"default/web:80/tcp 10.96.0.1:"}},
  {"only the first of an endpoint's addresses counts", web(), {slice("{'addresses': ['10.1.0.1', '10.1.0.2']}")},
   {"default/web:80/tcp 10.96.0.1: 10.1.0.1:8080"}},
  {"slices of names are left out", web(), {slice(at("example.org", "R"), "{'port': 80}", "FQDN")}, {"default/web:80/tcp 10.96.0.1:"}},
  {"a slice's port without a number is none", web(), {slice(at("10.1.0.1", "R"), "{'name': ''}")}, {"default/web:80/tcp 10.96.0.1:"}},

  // Whose service it is
  {"a headless service is left out", service("'clusterIP': 'None', 'clusterIPs': ['None'], 'ports': [{'port': 80}]"), {slice(at("10.1.0.1"))}, {}},
  {"an ExternalName service is left out", service("'type': 'ExternalName', 'externalName': 'example.org'"), {}, {}},
  {"a service without an address yet is left out", service("'clusterIP': '', 'ports': [{'port': 80}]"), {}, {}},
  {"a service of another proxy is left out",
   service("'clusterIP': '10.96.0.1', 'ports': [{'port': 80}]", ", 'labels': {'service.kubernetes.io/service-proxy-name': 'other'}"), {}, {}},
  {"with proxy_name, services of this name are served",
   service("'clusterIP': '10.96.0.1', 'ports': [{'port': 80}]", ", 'labels': {'service.kubernetes.io/service-proxy-name': 'clusterip'}"), {},
   {"default/web:80/tcp 10.96.0.1:"}, choose("here", "", "clusterip")},
  {"with proxy_name, services without one are another's", web(), {}, {}, choose("here", "", "clusterip")},
  {"a NodePort service has its cluster address",
   service("'type': 'NodePort', 'clusterIP': '10.96.0.1', 'ports': [{'port': 80, 'nodePort': 30080}]"), {}, {"default/web:80/tcp 10.96.0.1:"}},

  // Conditions
  {"an unknown ready means ready", web(), {slice(at("10.1.0.1"))}, {"default/web:80/tcp 10.96.0.1: 10.1.0.1:8080"}},
  {"an endpoint that is not ready is left out", web(), {slice(at("10.1.0.1", "R") + "," + at("10.1.0.2", "rs"))},
   {"default/web:80/tcp 10.96.0.1: 10.1.0.1:8080"}},
  {"one that is serving but not ready, and does not terminate, is left out", web(), {slice(at("10.1.0.2", "rS"))}, {"default/web:80/tcp 10.96.0.1:"}},
  {"a terminating endpoint drains", web(), {slice(at("10.1.0.1", "RS") + "," + at("10.1.0.2", "rST"))},
   {"default/web:80/tcp 10.96.0.1: 10.1.0.1:8080, 10.1.0.2:8080 drain"}},
  {"when all terminate, those that serve are used", web(), {slice(at("10.1.0.1", "rST") + "," + at("10.1.0.2", "rsT"))},
   {"default/web:80/tcp 10.96.0.1: 10.1.0.1:8080, 10.1.0.2:8080 drain"}},
  {"an unknown serving is what ready is", web(), {slice(at("10.1.0.1", "rT"))}, {"default/web:80/tcp 10.96.0.1: 10.1.0.1:8080 drain"}},
  {"publishNotReadyAddresses: the controller says ready, also of what terminates", web(", 'publishNotReadyAddresses': true"),
   {slice(at("10.1.0.1", "RsT") + "," + at("10.1.0.2", "R"))}, {"default/web:80/tcp 10.96.0.1: 10.1.0.1:8080, 10.1.0.2:8080"}},
  {"an endpoint in two slices is one backend, ready if one of them says so", web(), {slice(at("10.1.0.1", "rsT")), slice(at("10.1.0.1", "R"))},
   {"default/web:80/tcp 10.96.0.1: 10.1.0.1:8080"}},

  // internalTrafficPolicy
  {"Local: endpoints of this node alone", web(", 'internalTrafficPolicy': 'Local'"),
   {slice(at("10.1.0.1", "R", on("here")) + "," + at("10.1.0.2", "R", on("there")) + "," + at("10.1.0.3", "R"))},
   {"default/web:80/tcp 10.96.0.1: 10.1.0.1:8080"}},
  {"Local without an endpoint here: no backend, not another node's", web(", 'internalTrafficPolicy': 'Local'"),
   {slice(at("10.1.0.2", "R", on("there")))}, {"default/web:80/tcp 10.96.0.1:"}},
  {"Local falls back to what terminates and serves here", web(", 'internalTrafficPolicy': 'Local'"),
   {slice(at("10.1.0.1", "rST", on("here")) + "," + at("10.1.0.2", "R", on("there")))}, {"default/web:80/tcp 10.96.0.1: 10.1.0.1:8080"}},
  {"Local knows no hints", web(", 'internalTrafficPolicy': 'Local'"),
   {slice(at("10.1.0.1", "R", on("here") + for_zones("west")) + "," + at("10.1.0.2", "R", on("here") + for_zones("east")))},
   {"default/web:80/tcp 10.96.0.1: 10.1.0.1:8080, 10.1.0.2:8080"}},
  {"Local on a node without a name has no endpoint", web(", 'internalTrafficPolicy': 'Local'"),
   {slice(at("10.1.0.1", "R", on("here")) + "," + at("10.1.0.3", "R"))}, {"default/web:80/tcp 10.96.0.1:"}, choose("", "")},

  // Hints
  {"hints for this zone keep to it", web(), {slice(at("10.1.0.1", "R", for_zones("east")) + "," + at("10.1.0.2", "R", for_zones("west")))},
   {"default/web:80/tcp 10.96.0.1: 10.1.0.1:8080"}},
  {"hints count only when all ready endpoints have them", web(),
   {slice(at("10.1.0.1", "R", for_zones("east")) + "," + at("10.1.0.2", "R") + "," + at("10.1.0.3", "R", for_zones("west")))},
   {"default/web:80/tcp 10.96.0.1: 10.1.0.1:8080, 10.1.0.2:8080, 10.1.0.3:8080"}},
  {"an endpoint that is not ready needs no hint", web(),
   {slice(at("10.1.0.1", "R", for_zones("east")) + "," + at("10.1.0.2", "rST") + "," + at("10.1.0.3", "R", for_zones("west")))},
   {"default/web:80/tcp 10.96.0.1: 10.1.0.1:8080, 10.1.0.2:8080 drain"}},
  {"hints for other zones alone do not count", web(), {slice(at("10.1.0.1", "R", for_zones("west")) + "," + at("10.1.0.2", "R", for_zones("north")))},
   {"default/web:80/tcp 10.96.0.1: 10.1.0.1:8080, 10.1.0.2:8080"}},
  {"a node without a zone takes all", web(), {slice(at("10.1.0.1", "R", for_zones("east")) + "," + at("10.1.0.2", "R", for_zones("west")))},
   {"default/web:80/tcp 10.96.0.1: 10.1.0.1:8080, 10.1.0.2:8080"}, choose("here", "")},
  {"hints for this node go before those for the zone", web(),
   {slice(at("10.1.0.1", "R", for_nodes("here", "east")) + "," + at("10.1.0.2", "R", for_nodes("there", "east")))},
   {"default/web:80/tcp 10.96.0.1: 10.1.0.1:8080"}},
  {"hints for other nodes leave it to the zone", web(),
   {slice(at("10.1.0.1", "R", for_nodes("there", "east")) + "," + at("10.1.0.2", "R", for_nodes("there", "west")))},
   {"default/web:80/tcp 10.96.0.1: 10.1.0.1:8080"}},
  {"when all terminate, hints do not matter", web(),
   {slice(at("10.1.0.1", "rST", for_zones("west")) + "," + at("10.1.0.2", "rST", for_zones("east")))},
   {"default/web:80/tcp 10.96.0.1: 10.1.0.1:8080, 10.1.0.2:8080"}},

  // External addresses
  {"external addresses are left out unless chosen",
   web(", 'externalIPs': ['192.0.2.1']"), {}, {"default/web:80/tcp 10.96.0.1:"}},
  {"externalIPs by choice; the traffic policies do not apply from here",
   web(", 'externalIPs': ['192.0.2.1'], 'internalTrafficPolicy': 'Local', 'externalTrafficPolicy': 'Local'"), {slice(at("10.1.0.2", "R", on("there")))},
   {"default/web:80/tcp 10.96.0.1:", "default/web:80/tcp@192.0.2.1 192.0.2.1: 10.1.0.2:8080"}, with_external_ips()},
};
// clang-format on

class Rule : public testing::TestWithParam<Case> {};

TEST_P(Rule, IsKubeProxys) {
  const Case& row = GetParam();
  const auto read = read_service(parse(row.service), row.choices);
  std::vector<Slice> slices;
  for (const std::string& text : row.slices) {
    auto reading = read_slice(parse(text), row.choices);
    EXPECT_EQ(reading.problem, "") << row.fact;
    if (reading.object) slices.push_back(std::move(*reading.object));
  }
  const auto expect = [&] {
    std::vector<const Slice*> given;
    for (const Slice& one : slices) given.push_back(&one);
    std::vector<std::string> seen;
    if (read.object) {
      for (const config::Service& one : translate(*read.object, given).services) seen.push_back(shown(one));
    }
    EXPECT_EQ(seen, row.expected) << row.fact;
  };
  expect();
  std::ranges::reverse(slices);  // the order is the API server's whim
  for (Slice& one : slices) std::ranges::reverse(one.endpoints);
  expect();
}

INSTANTIATE_TEST_SUITE_P(Kubernetes, Rule, testing::ValuesIn(cases), [](const auto& row) {
  std::string name;
  for (const char c : std::string(row.param.fact)) name += std::isalnum(static_cast<unsigned char>(c)) != 0 ? c : '_';
  return name;
});

config::Service only(const std::string& text, const config::Kubernetes& choices = here) {
  const auto read = read_service(parse(text), choices);
  EXPECT_EQ(read.problem, "");
  return translate(read.object.value(), {}).services.at(0);
}

TEST(KubernetesService, HasKubeProxysDefaults) {
  const config::Service one = only(web());
  EXPECT_EQ(one.policy, config::Policy::random);
  EXPECT_EQ(one.no_backend, config::NoBackend::refuse);
  EXPECT_EQ(one.affinity, std::nullopt);
}

TEST(KubernetesService, AffinityIsByNetworkNamespaceAndLastsThreeHoursUnlessTold) {
  EXPECT_EQ(only(web(", 'sessionAffinity': 'ClientIP'")).affinity, std::chrono::hours(3));
  const config::Service one =
      only(web(", 'sessionAffinity': 'ClientIP', 'sessionAffinityConfig': {'clientIP': {'timeoutSeconds': 60}}"));
  EXPECT_EQ(one.affinity, std::chrono::seconds(60));
  EXPECT_EQ(one.client, config::Client::netns);
  EXPECT_EQ(only(web(", 'sessionAffinity': 'None'")).affinity, std::nullopt);
}

TEST(KubernetesService, LoadBalancersByChoiceUnlessTheyProxyOrAreRestricted) {
  const auto vips = [](const std::string& ingress, const std::string& spec = "") {
    auto choices = here;
    choices.load_balancer_ips = true;
    auto object = parse(web(spec));
    object["status"] = parse("{'loadBalancer': {'ingress': [" + ingress + "]}}");
    const auto read = read_service(object, choices);
    std::vector<std::string> seen{read.problem};
    for (const config::Service& one : translate(read.object.value(), {}).services) seen.push_back(one.vip.to_string());
    return seen;
  };
  EXPECT_THAT(vips("{'ip': '192.0.2.9'}"), ElementsAre("", "10.96.0.1", "192.0.2.9"));
  EXPECT_THAT(vips("{'ip': '192.0.2.9', 'ipMode': 'VIP'}"), ElementsAre("", "10.96.0.1", "192.0.2.9"));
  EXPECT_THAT(vips("{'ip': '192.0.2.9', 'ipMode': 'Proxy'}"), ElementsAre("", "10.96.0.1"));
  EXPECT_THAT(vips("{'hostname': 'lb.example.org'}"), ElementsAre("", "10.96.0.1"));
  EXPECT_THAT(vips("{'ip': '192.0.2.9'}", ", 'loadBalancerSourceRanges': ['192.0.2.0/24']"),
              ElementsAre(HasSubstr("spec.loadBalancerSourceRanges"), "10.96.0.1"));
  // Whoever writes the status of services would reach what is this machine's own, as with externalIPs.
  for (const char* own : {"127.0.0.1", "127.9.9.9", "::1", "169.254.169.254", "fe80::1", "0.0.0.9", "224.0.0.1"})
    EXPECT_THAT(vips(fmt::format("{{'ip': '{}'}}, {{'ip': '192.0.2.9'}}", own)),
                ElementsAre(HasSubstr("status.loadBalancer.ingress[0].ip: expected "), "10.96.0.1", "192.0.2.9"))
        << own;
}

TEST(KubernetesService, NamesThatAreTooLongAreSkippedByThemselves) {
  auto choices = here;
  choices.external_ips = true;
  auto object = parse(web(", 'externalIPs': ['2001:db8:1111:2222:3333:4444:5555:6666']"));
  object["metadata"].as_object()["name"] = std::string(63, 'a');
  object["metadata"].as_object()["namespace"] = std::string(63, 'b');
  const auto translation = translate(read_service(object, choices).object.value(), {});
  EXPECT_EQ(translation.services.size(), 1U);
  EXPECT_THAT(translation.problems, ElementsAre(HasSubstr("expected a name of at most 159 characters")));
}

struct Mistake {
  std::string object;
  const char* problem;
};

TEST(KubernetesService, MistakesSkipItAndNameIt) {
  // clang-format off
  const std::vector<Mistake> mistakes = {
    {"{}", "a service: metadata.name: expected a name, got nothing: skipped"},
    {"{'metadata': {'name': 7}}", "a service: metadata.name: expected a name, got 7: skipped"},
    {"{'metadata': {'name': 'web'}}", "a service: metadata.namespace: expected a namespace, got nothing (name \"web\"): skipped"},
    {"{'metadata': {'name': 'web', 'namespace': 'a/b'}}", "a service: metadata.namespace: expected a namespace, got \"a/b\" (name \"web\"): skipped"},
    {"{'metadata': {'name': 'web', 'namespace': 'default'}}", "service default/web: spec: expected an object, got nothing: skipped"},
    {"{'metadata': {'name': 'web', 'namespace': 'default'}, 'spec': []}", "service default/web: spec: expected an object, got an array: skipped"},
    {service("'clusterIP': 'x', 'ports': [{'port': 80}]"), "service default/web: spec.clusterIP: expected a numeric IPv4 or IPv6 address, got \"x\": skipped"},
    {service("'clusterIP': '224.0.0.1', 'ports': [{'port': 80}]"), "service default/web: spec.clusterIP: expected a unicast address, not a multicast one, got \"224.0.0.1\": skipped"},
    {service("'clusterIPs': ['10.96.0.1', 7]"), "service default/web: spec.clusterIPs[1]: expected a numeric IPv4 or IPv6 address, got 7: skipped"},
    {service("'clusterIPs': ['10.96.0.1', '10.96.0.2']"), "service default/web: spec.clusterIPs: expected one address of each family, got an array: skipped"},
    {web(", 'sessionAffinity': 'Cookie'"), "service default/web: spec.sessionAffinity: expected None or ClientIP, got \"Cookie\": skipped"},
    {web(", 'internalTrafficPolicy': 'Near'"), "service default/web: spec.internalTrafficPolicy: expected Cluster or Local, got \"Near\": skipped"},
    {web(", 'sessionAffinity': 'ClientIP', 'sessionAffinityConfig': {'clientIP': {'timeoutSeconds': 0}}"),
     "service default/web: spec.sessionAffinityConfig.clientIP.timeoutSeconds: expected an integer from 1 to 86400, got 0: skipped"},
  };
  // clang-format on
  for (const auto& [object, problem] : mistakes) {
    const auto read = read_service(parse(object), here);
    EXPECT_EQ(read.problem, problem);
    EXPECT_FALSE(read.object) << problem;
  }
}

TEST(KubernetesService, MistakesInOnePortLeaveTheOthers) {
  const auto read =
      read_service(parse(service("'clusterIP': '10.96.0.1', 'ports': [{'port': 80}, {'port': 99999}, 7, {'port': 81, "
                                 "'protocol': 'SCTP'}, {'port': 80, 'name': 'again'}]")),
                   here);
  EXPECT_EQ(
      read.problem,
      "service default/web: spec.ports[1].port: expected an integer from 1 to 65535, got 99999 (and 3 more): that "
      "part of it is skipped");
  ASSERT_TRUE(read.object);
  EXPECT_EQ(read.object->ports.size(), 1U);
  const auto sctp =
      read_service(parse(service("'clusterIP': '10.96.0.1', 'ports': [{'port': 80, 'protocol': 'SCTP'}]")), here);
  EXPECT_EQ(
      sctp.problem,
      "service default/web: spec.ports[0].protocol: expected TCP or UDP, got \"SCTP\": that part of it is skipped");
}

TEST(KubernetesSlice, MistakesSkipWhatTheyAreIn) {
  const std::string good = at("10.1.0.1", "R");
  const std::string part = ": that part of it is skipped";
  const auto problem = [](const std::string& text) { return read_slice(parse(text), here).problem; };
  EXPECT_EQ(problem("{'metadata': {'namespace': 'default'}}"),
            "an endpointslice: metadata.name: expected a name, got nothing: skipped");
  EXPECT_EQ(problem(slice(good, "{'port': 80}", "IPX")),
            "endpointslice default/web-1: addressType: expected IPv4, IPv6 or FQDN, got \"IPX\": skipped");
  EXPECT_EQ(problem(slice(good, "{'port': 0}")),
            "endpointslice default/web-1: ports[0].port: expected an integer from 1 to 65535, got 0" + part);
  EXPECT_EQ(
      problem(slice(good + ",{'addresses': []}")),
      "endpointslice default/web-1: endpoints[1].addresses[0]: expected a numeric IPv4 or IPv6 address, got nothing" +
          part);
  EXPECT_EQ(problem(slice(good + "," + at("fd00::1", "R"))),
            "endpointslice default/web-1: endpoints[1].addresses[0]: expected an IPv4 address, got \"fd00::1\"" + part);
  EXPECT_EQ(problem(slice("{'addresses': ['10.1.0.1'], 'conditions': {'ready': 'yes'}}")),
            "endpointslice default/web-1: endpoints[0].conditions.ready: expected true or false, got \"yes\"" + part);
  const auto read = read_slice(parse(slice(good + "," + at("0.0.0.0", "R") + "," + at("10.1.0.2", "R"))), here);
  ASSERT_TRUE(read.object);
  EXPECT_EQ(read.object->endpoints.size(), 2U);
}

TEST(KubernetesSlice, AddressesThatAreNoPodsAreSkippedAsTheApiServerRefusesThem) {
  const auto read = [](const std::string& address, const std::string& type) {
    return read_slice(
        parse(slice(at(address, "R") + "," + at(type == "IPv4" ? "10.1.0.1" : "fd01::1", "R"), "{'port': 8080}", type)),
        here);
  };
  for (const char* address : {"0.0.0.0", "0.1.2.3", "127.0.0.1", "127.255.0.9", "169.254.169.254", "169.254.0.1",
                              "224.0.0.1", "239.1.1.1", "255.255.255.255", "192.0.0.8"}) {
    const auto seen = read(address, "IPv4");
    EXPECT_THAT(seen.problem, HasSubstr("endpointslice default/web-1: endpoints[0].addresses[0]: expected a"))
        << address;
    EXPECT_THAT(seen.problem, HasSubstr(fmt::format("got \"{}\": that part of it is skipped", address)));
    ASSERT_TRUE(seen.object);
    EXPECT_EQ(seen.object->endpoints.size(), 1U) << address;
  }
  for (const char* address : {"::", "::1", "fe80::1", "ff02::1", "ff0e::1", "::ffff:127.0.0.1", "::ffff:10.1.0.1"}) {
    const auto seen = read(address, "IPv6");
    EXPECT_THAT(seen.problem, HasSubstr("endpoints[0].addresses[0]: expected ")) << address;
    ASSERT_TRUE(seen.object);
    EXPECT_EQ(seen.object->endpoints.size(), 1U) << address;
  }
  for (const char* address : {"1.0.0.1", "126.255.255.255", "128.0.0.1", "169.253.1.1", "169.255.1.1", "240.0.0.1"})
    EXPECT_EQ(read(address, "IPv4").problem, "") << address;
}

TEST(KubernetesService, ExternalAddressesOfThisMachineAloneAreSkipped) {
  const auto read = read_service(parse(web(", 'externalIPs': ['127.0.0.1', '192.0.2.1', '169.254.169.254', '::1']")),
                                 with_external_ips());
  EXPECT_THAT(read.problem,
              HasSubstr("service default/web: spec.externalIPs[0]: expected an address that other machines "
                        "reach, not a loopback one, got \"127.0.0.1\" (and 2 more)"));
  ASSERT_TRUE(read.object);
  EXPECT_THAT(read.object->external_ips, ElementsAre(config::parse_address("192.0.2.1").value()));
}

TEST(KubernetesSlice, APortsNameIsThereOncePerProtocol) {
  const auto read = read_slice(parse(slice(at("10.1.0.1"),
                                           "{'name': 'a', 'port': 1}, {'name': 'a', 'port': 2},"
                                           "{'name': 'a', 'port': 3, 'protocol': 'UDP'}")),
                               here);
  EXPECT_EQ(read.problem,
            "endpointslice default/web-1: ports[1].name: expected each name once per protocol, got \"a\": "
            "that part of it is skipped");
  EXPECT_EQ(read.object.value().ports.size(), 2U);
}

/// Of objects that no cluster has; each would take minutes and gigabytes if one were looked for in the other.
TEST(KubernetesService, AbsurdObjectsCostWhatTheyAreLarge) {
  constexpr int many = 50000;
  Service one;
  Slice other;
  one.name = other.service = "default/web";
  one.cluster_ips = {config::parse_address("10.96.0.1").value()};
  for (int i = 0; i < many; ++i) {
    const auto port = static_cast<std::uint16_t>(1 + i);
    one.ports.push_back({.name = fmt::format("port{}", i), .protocol = config::Protocol::tcp, .port = port});
    other.ports.push_back({.name = fmt::format("port{}", many - i), .protocol = config::Protocol::tcp, .port = port});
    one.external_ips.emplace_back(boost::asio::ip::address_v4(0xc0000000U + static_cast<std::uint32_t>(i)));
    one.load_balancer_ips.emplace_back(boost::asio::ip::address_v4(0xc6000000U + static_cast<std::uint32_t>(i)));
  }
  for (std::uint32_t i = 0; i < 1000; ++i) {
    Endpoint endpoint;
    endpoint.address = boost::asio::ip::address_v4(0x0a010000U + i);
    other.endpoints.push_back(endpoint);
  }
  const std::vector<const Slice*> slices(20, &other);
  const Translation all = translate(one, slices);
  EXPECT_THAT(all.problems, ElementsAre("service default/web: expected at most 16384 addresses times ports, and 65536 "
                                        "endpoints of them all: default/web:5/tcp and the rest of them are skipped"));
  EXPECT_EQ(all.services.size(), 4U);
  const Translation without_endpoints = translate(one, {});
  EXPECT_EQ(without_endpoints.services.size(), 16384U);
  EXPECT_EQ(without_endpoints.problems.size(), 1U);
}

/// The bound is about what is kept of a service: endpoints of the other family are no part of an address.
TEST(KubernetesService, LargeOnesAreServedForBothFamilies) {
  Service one;
  one.name = "default/web";
  one.cluster_ips = {config::parse_address("10.96.0.1").value(), config::parse_address("fd00::1").value()};
  one.ports.push_back({.name = "", .protocol = config::Protocol::tcp, .port = 80});
  Slice v4;
  Slice v6;
  v4.ports = v6.ports = one.ports;
  for (std::uint32_t i = 0; i < 20000; ++i) {
    Endpoint endpoint;
    endpoint.address = boost::asio::ip::address_v4(0x0a010000U + i);
    v4.endpoints.push_back(endpoint);
    endpoint.address = config::parse_address(fmt::format("fd00:1::{:x}", i + 1)).value();
    v6.endpoints.push_back(endpoint);
  }
  const std::vector<const Slice*> both{&v4, &v6};
  const Translation served = translate(one, both);
  EXPECT_THAT(served.problems, IsEmpty());
  ASSERT_EQ(served.services.size(), 2U);
  EXPECT_EQ(served.services[0].backends.size(), 20000U);
  EXPECT_EQ(served.services[1].backends.size(), 20000U);
}

TEST(KubernetesService, OfTheFirstPortAsMuchIsServedAsThereIsRoomFor) {
  Service one;
  one.name = "default/web";
  one.cluster_ips = {config::parse_address("10.96.0.1").value()};
  one.ports.push_back({.name = "", .protocol = config::Protocol::tcp, .port = 80});
  Slice slice;
  slice.ports = one.ports;
  for (std::uint32_t i = 0; i < 70000; ++i) {
    Endpoint endpoint;
    endpoint.address = boost::asio::ip::address_v4(0x0a010000U + i);
    slice.endpoints.push_back(endpoint);
  }
  const std::vector<const Slice*> slices{&slice};
  const Translation served = translate(one, slices);
  EXPECT_THAT(served.problems,
              ElementsAre(HasSubstr("default/web:80/tcp: expected at most 65535 endpoints, got 70000")));
  ASSERT_EQ(served.services.size(), 1U);
  EXPECT_EQ(served.services[0].backends.size(), 65535U);
}

TEST(KubernetesSlice, AbsurdSizesAndForeignBytesAreSkippedWithAName) {
  std::string many = at("10.1.0.1", "R");
  for (std::size_t i = 0; i < max_endpoints_per_slice; ++i) many += "," + at("10.1.0.1", "R");
  const auto read = read_slice(parse(slice(many)), here);
  EXPECT_FALSE(read.object);
  EXPECT_EQ(read.problem, "endpointslice default/web-1: endpoints: expected at most 1000 endpoints, got 1001: skipped");
  boost::json::parse_options options;
  options.allow_invalid_utf8 = true;
  const auto foreign =
      boost::json::parse("{\"metadata\": {\"namespace\": \"default\", \"name\": \"we\xff\"}}", {}, options);
  EXPECT_EQ(read_slice(foreign.as_object(), here).problem,
            "an endpointslice: metadata.name: expected a name, got \"we\\xff\": skipped");
}

TEST(KubernetesSlice, OfNoServiceIsNoneOfOurs) {
  const auto read =
      read_slice(parse("{'metadata': {'name': 'x', 'namespace': 'default'}, 'addressType': 'IPv4'}"), here);
  EXPECT_FALSE(read.object);
  EXPECT_THAT(read.problem, IsEmpty());
}

}  // namespace
}  // namespace kubernetes
