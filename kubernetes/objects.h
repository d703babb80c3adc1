// SPDX-License-Identifier: BSD-2-Clause
//
// What clusterip needs of a Service and of an EndpointSlice, read from the JSON that the API server sends: a hundredth
// of its size. Pure, may be used by any thread.
#pragma once

#include <boost/json/object.hpp>
#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "config/config.h"
#include "config/result.h"

namespace kubernetes {

inline constexpr std::size_t max_endpoints_per_slice = 1000;  // the API server's own limit

struct ServicePort {
  std::string name;
  config::Protocol protocol = config::Protocol::tcp;
  std::uint16_t port = 0;
  bool operator==(const ServicePort&) const = default;
};

struct Service {
  std::string name;                                   // "namespace/name"
  std::vector<config::Address> cluster_ips;           // the first is the service's primary one
  std::vector<config::Address> external_ips;          // spec.externalIPs
  std::vector<config::Address> load_balancer_ips;     // status.loadBalancer, those that are not left to the balancer
  std::vector<ServicePort> ports;                     // TCP and UDP
  std::optional<std::chrono::milliseconds> affinity;  // sessionAffinity: ClientIP
  bool is_local = false;                              // internalTrafficPolicy: Local
  bool operator==(const Service&) const = default;
};

/// Its conditions as kube-proxy understands them, and what its hints mean to this node.
struct Endpoint {
  config::Address address;
  bool is_ready = true;
  bool is_serving = true;
  bool is_terminating = false;
  bool is_local = false;  // on this node
  bool has_node_hints = false;
  bool is_for_node = false;
  bool has_zone_hints = false;
  bool is_for_zone = false;
  bool operator==(const Endpoint&) const = default;
};

struct Slice {
  std::string service;             // "namespace/name" of the service that it belongs to
  std::vector<ServicePort> ports;  // as the pods have them; the name is the service port's
  std::vector<Endpoint> endpoints;
  bool operator==(const Slice&) const = default;
};

/// What became of an object. Neither object nor problem: it is none of ours, as kube-proxy would see it, too.
template <class Object>
struct Reading {
  std::optional<Object> object;
  std::string problem;  // one line that names the object, and says what is skipped: all of it when there is no object
};

/// "namespace/name" of metadata; else what was expected.
config::Result<std::string> name_of(const boost::json::object& object);

/// metadata.resourceVersion, which grows with each change; 0 where it is missing or no number.
std::uint64_t version_of(const boost::json::object& object);

/// None of ours: headless and ExternalName services, and those of another proxy (service-proxy-name).
Reading<Service> read_service(const boost::json::object& object, const config::Kubernetes& choices);

/// None of ours: slices of no service, of names, and without ports. Endpoints that nothing can come to are left out.
Reading<Slice> read_slice(const boost::json::object& object, const config::Kubernetes& choices);

}  // namespace kubernetes
