// SPDX-License-Identifier: BSD-2-Clause
#include "kubernetes/objects.h"

#include <fmt/format.h>

#include <algorithm>
#include <boost/json/array.hpp>
#include <boost/json/string.hpp>
#include <boost/json/value.hpp>
#include <cerrno>
#include <charconv>
#include <set>
#include <utility>

#include "config/fail.h"
#include "config/printable.h"
#include "config/values.h"

namespace kubernetes {
namespace {

namespace json = boost::json;

constexpr std::int64_t default_affinity = 10800;  // seconds
constexpr std::int64_t max_affinity = 86400;
constexpr std::size_t max_label = 63;
constexpr std::size_t max_name = 253;

constexpr std::string_view proxy_name_label = "service.kubernetes.io/service-proxy-name";
constexpr std::string_view headless_label = "service.kubernetes.io/headless";
constexpr std::string_view service_name_label = "kubernetes.io/service-name";

/// Null is as good as missing.
const json::value* find(const json::object& object, std::string_view key) {
  const json::value* value = object.if_contains(key);
  return value != nullptr && !value->is_null() ? value : nullptr;
}

std::string shown(const json::value* value) {
  if (value == nullptr) return "nothing";
  if (const auto* text = value->if_string()) return config::quoted(*text);
  if (value->is_object()) return "an object";
  if (value->is_array()) return "an array";
  if (const auto* number = value->if_int64()) return fmt::format("{}", *number);
  if (value->is_bool()) return value->get_bool() ? "true" : "false";
  return "a number";
}

bool is_name(std::string_view text, std::size_t max_length) {
  return !text.empty() && text.size() <= max_length &&
         text.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789-.") == std::string_view::npos;
}

std::string_view text_in(const json::object& object, std::string_view key) {
  const json::value* value = find(object, key);
  return value != nullptr && value->is_string() ? std::string_view(value->get_string()) : std::string_view();
}

const json::object& object_in(const json::object& object, std::string_view key) {
  static const json::object none;
  const json::value* value = find(object, key);
  return value != nullptr && value->is_object() ? value->get_object() : none;
}

const json::value* label(const json::object& object, std::string_view key) {
  return find(object_in(object_in(object, "metadata"), "labels"), key);
}

/// Reads the fields of one object, and keeps what is wrong with them.
class Reader {
 public:
  Reader(std::string_view kind, std::string_view name) : object_(fmt::format("{} {}", kind, name)) {}

  void mistake(std::string_view path, std::string_view expected, std::string_view got) {
    if (count_++ == 0) first_ = fmt::format("{}: expected {}, got {}", path, expected, got);
  }
  void mistake(std::string_view path, std::string_view expected, const json::value* got) {
    mistake(path, expected, shown(got));
  }
  [[nodiscard]] std::size_t count() const { return count_; }

  /// One line; empty when nothing was wrong.
  [[nodiscard]] std::string problem(std::string_view skipped) const {
    if (count_ == 0) return {};
    const std::string more = count_ == 1 ? "" : fmt::format(" (and {} more)", count_ - 1);
    return fmt::format("{}: {}{}: {}", object_, first_, more, skipped);
  }

  std::string_view text(const json::object& in, std::string_view key, const std::string& path,
                        std::string_view otherwise) {
    const json::value* value = find(in, key);
    if (value == nullptr) return otherwise;
    if (value->is_string()) return value->get_string();
    mistake(path, "a string", value);
    return otherwise;
  }

  bool flag(const json::object& in, std::string_view key, const std::string& path, bool otherwise) {
    const json::value* value = find(in, key);
    if (value == nullptr) return otherwise;
    if (value->is_bool()) return value->get_bool();
    mistake(path, "true or false", value);
    return otherwise;
  }

  std::int64_t integer(const json::value* value, std::int64_t min, std::int64_t max, const std::string& path) {
    const std::int64_t* number = value != nullptr ? value->if_int64() : nullptr;
    if (number != nullptr && *number >= min && *number <= max) return *number;
    mistake(path, config::integer_range(static_cast<std::uint64_t>(min), static_cast<std::uint64_t>(max)), value);
    return 0;
  }

  /// `fault` says what else is wrong with it.
  std::optional<config::Address> address(const json::value* value, std::string (*fault)(const config::Address&),
                                         const std::string& path) {
    const auto* text = value != nullptr ? value->if_string() : nullptr;
    const auto parsed = config::parse_address(text != nullptr ? std::string_view(*text) : std::string_view());
    const std::string expected = parsed ? fault(*parsed) : parsed.error();
    if (expected.empty()) return *parsed;
    mistake(path, expected, value);
    return {};
  }

  /// `visit` gets each element that is an object, and its path.
  template <class Visit>
  void objects(const json::object& in, std::string_view key, const std::string& path, Visit visit) {
    elements(in, key, path, [&](const json::value& element, const std::string& at) {
      if (element.is_object())
        visit(element.get_object(), at);
      else
        mistake(at, "an object", &element);
    });
  }

  template <class Visit>
  void elements(const json::object& in, std::string_view key, const std::string& path, Visit visit) {
    const json::value* value = find(in, key);
    if (value == nullptr) return;
    if (!value->is_array()) return mistake(path, "an array", value);
    std::size_t i = 0;
    for (const json::value& element : value->get_array()) visit(element, fmt::format("{}[{}]", path, i++));
  }

  /// Empty: it is not served. SCTP is told like a mistake.
  std::optional<config::Protocol> protocol(const json::object& port, const std::string& path) {
    const std::string_view text = this->text(port, "protocol", path + ".protocol", "TCP");
    if (text == "TCP") return config::Protocol::tcp;
    if (text == "UDP") return config::Protocol::udp;
    mistake(path + ".protocol", "TCP or UDP", find(port, "protocol"));
    return {};
  }

 private:
  const std::string object_;
  std::string first_;
  std::size_t count_ = 0;
};

/// Of a service or of a slice; none when something is wrong with it.
std::optional<ServicePort> read_port(Reader& reader, const json::object& in, const std::string& path) {
  const std::size_t before = reader.count();
  ServicePort port{.name = std::string(reader.text(in, "name", path + ".name", ""))};
  const auto protocol = reader.protocol(in, path);
  port.port = static_cast<std::uint16_t>(reader.integer(find(in, "port"), 1, 65535, path + ".port"));
  if (reader.count() != before) return {};
  port.protocol = *protocol;
  return port;
}

/// What the API server refuses for endpoints and external addresses, too: whoever may write those would reach what
/// listens on this machine for itself alone, or what answers on its link (the metadata of a cloud).
std::string assigned_fault(const config::Address& address) {
  if (std::string fault = config::vip_fault(address); !fault.empty()) return fault;
  if (address.is_loopback()) return "an address that other machines reach, not a loopback one";
  if (!address.is_v4()) return "";
  const std::uint32_t v4 = address.to_v4().to_uint();
  if (v4 >> 16 == 0xa9fe) return "an address that other machines reach, not a link-local one";
  if (v4 >> 24 == 0) return "an address that other machines reach, not one of \"this network\"";
  return "";
}

/// Each once, in their order.
void add_address(const std::optional<config::Address>& address, std::set<config::Address>& seen,
                 std::vector<config::Address>& out) {
  if (address && seen.insert(*address).second) out.push_back(*address);
}

void read_addresses(Reader& reader, const json::object& in, std::string_view key,
                    std::string (*fault)(const config::Address&), std::vector<config::Address>& out) {
  std::set<config::Address> seen;
  reader.elements(in, key, fmt::format("spec.{}", key), [&](const json::value& element, const std::string& path) {
    add_address(reader.address(&element, fault, path), seen, out);
  });
}

/// Those that the API server says are reached by way of the node, and that are open to everybody.
void read_load_balancer(Reader& reader, const json::object& object, std::vector<config::Address>& out) {
  const json::object& status = object_in(object_in(object, "status"), "loadBalancer");
  std::set<config::Address> seen;
  reader.objects(
      status, "ingress", "status.loadBalancer.ingress", [&](const json::object& ingress, const std::string& path) {
        const json::value* ip = find(ingress, "ip");  // else it has a name, which nobody connects to by its address
        if (ip == nullptr || text_in(ingress, "ipMode") == "Proxy") return;
        add_address(reader.address(ip, assigned_fault, path + ".ip"), seen, out);
      });
  const json::value* ranges = find(object_in(object, "spec"), "loadBalancerSourceRanges");
  if (!out.empty() && ranges != nullptr && ranges->is_array() && !ranges->get_array().empty()) {
    out.clear();
    reader.mistake("spec.loadBalancerSourceRanges", "none, as clusterip does not enforce them", ranges);
  }
}

void read_affinity(Reader& reader, const json::object& spec, Service& out) {
  const std::string_view affinity = reader.text(spec, "sessionAffinity", "spec.sessionAffinity", "None");
  if (affinity != "ClientIP") {
    if (affinity != "None") reader.mistake("spec.sessionAffinity", "None or ClientIP", find(spec, "sessionAffinity"));
    return;
  }
  std::int64_t seconds = default_affinity;
  const json::object& client = object_in(object_in(spec, "sessionAffinityConfig"), "clientIP");
  if (const json::value* timeout = find(client, "timeoutSeconds"))
    seconds = reader.integer(timeout, 1, max_affinity, "spec.sessionAffinityConfig.clientIP.timeoutSeconds");
  if (seconds != 0) out.affinity = std::chrono::seconds(seconds);
}

/// Of hints.`key`: are there any, and is one of them `ours`?
std::pair<bool, bool> read_hints(Reader& reader, const json::object& endpoint, std::string_view key,
                                 std::string_view ours, const std::string& path) {
  bool any = false;
  bool is_ours = false;
  reader.objects(object_in(endpoint, "hints"), key, fmt::format("{}.hints.{}", path, key),
                 [&](const json::object& hint, const std::string& at) {
                   const std::string_view name = reader.text(hint, "name", at + ".name", "");
                   any = true;
                   is_ours = is_ours || (!ours.empty() && name == ours);
                 });
  return {any, is_ours};
}

void read_endpoint(Reader& reader, const json::object& in, bool is_v4, const config::Kubernetes& choices,
                   const std::string& path, std::vector<Endpoint>& out) {
  const json::value* addresses = find(in, "addresses");
  // They are interchangeable, by the API's own word; kube-proxy takes the first.
  const bool any = addresses != nullptr && addresses->is_array() && !addresses->get_array().empty();
  const json::value* first = any ? &addresses->get_array().front() : nullptr;
  const auto address = reader.address(first, assigned_fault, path + ".addresses[0]");
  if (!address) return;
  if (address->is_v4() != is_v4)
    return reader.mistake(path + ".addresses[0]", fmt::format("an IPv{} address", is_v4 ? 4 : 6), first);

  const std::size_t before = reader.count();
  Endpoint endpoint{.address = *address};
  const json::object& conditions = object_in(in, "conditions");
  endpoint.is_ready = reader.flag(conditions, "ready", path + ".conditions.ready", true);
  endpoint.is_serving = reader.flag(conditions, "serving", path + ".conditions.serving", endpoint.is_ready);
  endpoint.is_terminating = reader.flag(conditions, "terminating", path + ".conditions.terminating", false);
  const std::string_view node = reader.text(in, "nodeName", path + ".nodeName", "");
  endpoint.is_local = !choices.node.empty() && node == choices.node;
  std::tie(endpoint.has_node_hints, endpoint.is_for_node) = read_hints(reader, in, "forNodes", choices.node, path);
  std::tie(endpoint.has_zone_hints, endpoint.is_for_zone) = read_hints(reader, in, "forZones", choices.zone, path);
  const bool is_of_use = endpoint.is_ready || endpoint.is_terminating;
  if (reader.count() == before && is_of_use) out.push_back(endpoint);
}

}  // namespace

config::Result<std::string> name_of(const json::object& object) {
  const json::object& metadata = object_in(object, "metadata");
  const json::value* name = find(metadata, "name");
  const json::value* space = find(metadata, "namespace");
  if (!is_name(text_in(metadata, "name"), max_name))
    return config::fail(-EBADMSG, fmt::format("metadata.name: expected a name, got {}", shown(name)));
  if (!is_name(text_in(metadata, "namespace"), max_label))
    return config::fail(
        -EBADMSG, fmt::format("metadata.namespace: expected a namespace, got {} (name {})", shown(space), shown(name)));
  return fmt::format("{}/{}", text_in(metadata, "namespace"), text_in(metadata, "name"));
}

std::uint64_t version_of(const json::object& object) {
  const std::string_view text = text_in(object_in(object, "metadata"), "resourceVersion");
  std::uint64_t version = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), version);
  return error == std::errc{} && end == text.data() + text.size() ? version : 0;
}

Reading<Service> read_service(const json::object& object, const config::Kubernetes& choices) {
  auto name = name_of(object);
  if (!name) return {.object = {}, .problem = fmt::format("a service: {}: skipped", name.error().message)};
  const json::value* proxy = label(object, proxy_name_label);
  const bool is_ours =
      proxy == nullptr ? choices.proxy_name.empty()
                       : proxy->is_string() && !choices.proxy_name.empty() && proxy->get_string() == choices.proxy_name;
  if (!is_ours || label(object, headless_label) != nullptr) return {};

  Reader reader("service", *name);
  constexpr std::string_view skipped = "skipped";
  const json::value* spec_value = find(object, "spec");
  if (spec_value == nullptr || !spec_value->is_object()) {
    reader.mistake("spec", "an object", spec_value);
    return {.object = {}, .problem = reader.problem(skipped)};
  }
  const json::object& spec = spec_value->get_object();
  const std::string_view cluster_ip = reader.text(spec, "clusterIP", "spec.clusterIP", "");
  if (reader.text(spec, "type", "spec.type", "ClusterIP") == "ExternalName" || cluster_ip == "None") return {};
  if (text_in(object_in(object, "metadata"), "name").size() > max_label)
    reader.mistake("metadata.name", fmt::format("at most {} characters", max_label),
                   find(object_in(object, "metadata"), "name"));

  Service service;
  service.name = std::move(*name);
  read_addresses(reader, spec, "clusterIPs", config::vip_fault, service.cluster_ips);
  if (service.cluster_ips.empty() && reader.count() == 0) {
    if (find(spec, "clusterIP") == nullptr || cluster_ip.empty()) return {};  // none is allocated yet
    if (const auto address = reader.address(find(spec, "clusterIP"), config::vip_fault, "spec.clusterIP"))
      service.cluster_ips.push_back(*address);
  }
  if (service.cluster_ips.size() > 2 ||
      (service.cluster_ips.size() == 2 && service.cluster_ips[0].is_v4() == service.cluster_ips[1].is_v4()))
    reader.mistake("spec.clusterIPs", "one address of each family", find(spec, "clusterIPs"));
  read_affinity(reader, spec, service);
  const std::string_view policy = reader.text(spec, "internalTrafficPolicy", "spec.internalTrafficPolicy", "Cluster");
  service.is_local = policy == "Local";
  if (!service.is_local && policy != "Cluster")
    reader.mistake("spec.internalTrafficPolicy", "Cluster or Local", find(spec, "internalTrafficPolicy"));
  if (reader.count() != 0) return {.object = {}, .problem = reader.problem(skipped)};

  // From here on, what is wrong is skipped, and the rest is served.
  std::set<std::pair<std::uint16_t, config::Protocol>> ports;
  reader.objects(spec, "ports", "spec.ports", [&](const json::object& in, const std::string& path) {
    auto port = read_port(reader, in, path);
    if (!port) return;
    if (!ports.emplace(port->port, port->protocol).second)
      return reader.mistake(path, "each port once per protocol", &in.at("port"));
    service.ports.push_back(std::move(*port));
  });
  if (choices.external_ips) read_addresses(reader, spec, "externalIPs", assigned_fault, service.external_ips);
  if (choices.load_balancer_ips) read_load_balancer(reader, object, service.load_balancer_ips);
  return {.object = std::move(service), .problem = reader.problem("that part of it is skipped")};
}

Reading<Slice> read_slice(const json::object& object, const config::Kubernetes& choices) {
  auto name = name_of(object);
  if (!name) return {.object = {}, .problem = fmt::format("an endpointslice: {}: skipped", name.error().message)};
  const json::value* service = label(object, service_name_label);
  if (service == nullptr || label(object, headless_label) != nullptr) return {};

  Reader reader("endpointslice", *name);
  const std::string label_path = fmt::format("metadata.labels[{}]", service_name_label);
  if (!service->is_string() || !is_name(service->get_string(), max_label))
    reader.mistake(label_path, "the name of a service", service);
  const std::string_view type = reader.text(object, "addressType", "addressType", "");
  if (type == "FQDN") return {};
  if (type != "IPv4" && type != "IPv6")
    reader.mistake("addressType", "IPv4, IPv6 or FQDN", find(object, "addressType"));
  if (const json::value* endpoints = find(object, "endpoints");
      endpoints != nullptr && endpoints->is_array() && endpoints->get_array().size() > max_endpoints_per_slice)
    reader.mistake("endpoints", fmt::format("at most {} endpoints", max_endpoints_per_slice),
                   fmt::format("{}", endpoints->get_array().size()));
  if (reader.count() != 0) return {.object = {}, .problem = reader.problem("skipped")};

  Slice slice;
  slice.service = fmt::format("{}/{}", name->substr(0, name->find('/')), std::string_view(service->get_string()));
  std::set<std::pair<std::string, config::Protocol>> names;
  reader.objects(object, "ports", "ports", [&](const json::object& in, const std::string& path) {
    if (find(in, "port") == nullptr || text_in(in, "protocol") == "SCTP") return;  // the service's port tells of SCTP
    auto port = read_port(reader, in, path);
    if (!port) return;
    if (!names.emplace(port->name, port->protocol).second)
      return reader.mistake(path + ".name", "each name once per protocol", find(in, "name"));
    slice.ports.push_back(std::move(*port));
  });
  const json::value* endpoints = find(object, "endpoints");
  if (!slice.ports.empty() && endpoints != nullptr && endpoints->is_array())
    slice.endpoints.reserve(endpoints->get_array().size());
  reader.objects(object, "endpoints", "endpoints", [&](const json::object& in, const std::string& path) {
    read_endpoint(reader, in, type == "IPv4", choices, path, slice.endpoints);
  });
  std::string problem = reader.problem("that part of it is skipped");
  if (slice.ports.empty() || slice.endpoints.empty()) return {.object = {}, .problem = std::move(problem)};
  return {.object = std::move(slice), .problem = std::move(problem)};
}

}  // namespace kubernetes
