// SPDX-License-Identifier: BSD-2-Clause
#include "config/validate.h"

#include <fmt/format.h>

#include <algorithm>
#include <boost/unordered/unordered_flat_map.hpp>
#include <cstring>
#include <string_view>

#include "config/names.h"
#include "config/printable.h"
#include "config/values.h"

namespace config {
namespace {

struct EndpointKey {
  std::uint64_t high = 0;
  std::uint64_t low = 0;
  std::uint32_t port_and_protocol;

  EndpointKey(const Address& address, std::uint16_t port, Protocol protocol)
      : port_and_protocol(std::uint32_t{port} << 8 | static_cast<std::uint8_t>(protocol)) {
    if (address.is_v4()) {  // as v4-mapped
      low = 0xffff00000000u | address.to_v4().to_uint();
    } else {
      const auto bytes = address.to_v6().to_bytes();
      std::memcpy(&high, bytes.data(), sizeof high);
      std::memcpy(&low, bytes.data() + sizeof high, sizeof low);
    }
  }
  bool operator==(const EndpointKey&) const = default;
  friend std::size_t hash_value(const EndpointKey& key) {
    std::size_t seed = 0;
    boost::hash_combine(seed, key.high);
    boost::hash_combine(seed, key.low);
    boost::hash_combine(seed, key.port_and_protocol);
    return seed;
  }
};

using EndpointMap = boost::unordered_flat_map<EndpointKey, std::size_t>;

std::string_view family(const Address& address) { return address.is_v4() ? "an IPv4" : "an IPv6"; }

std::string backend_key(std::string_view label, std::size_t index) {
  return fmt::format("{}: backends[{}]", label, index);
}

bool is_read(const Backend& backend) { return backend.port != 0 && !backend.address.is_unspecified(); }

void check_backend_list(const Service& service, std::size_t service_index, std::span<const Backend> backends,
                        Mistakes& mistakes) {
  const auto report = [&](std::size_t i, std::string_view what) {
    mistakes.add(backends[i].position, backend_key(service_label(service, service_index), i), what);
  };
  if (backends.size() > max_backends_per_service) {
    report(max_backends_per_service,
           fmt::format("expected at most {} backends in a service, got {}", max_backends_per_service, backends.size()));
  }
  EndpointMap seen;
  seen.reserve(backends.size());
  for (std::size_t i = 0; i < backends.size(); ++i) {
    const Backend& backend = backends[i];
    if (!is_read(backend)) continue;
    if (!service.vip.is_unspecified() && backend.address.is_v4() != service.vip.is_v4()) {
      report(i, fmt::format("expected {} address like the vip {}, got {}", family(service.vip), service.vip.to_string(),
                            backend.address.to_string()));
    }
    const auto [first, fresh] = seen.try_emplace({backend.address, backend.port, service.protocol}, i);
    if (!fresh) {
      report(i, fmt::format("expected each backend once, got {} as in backends[{}]",
                            to_text(backend.address, backend.port), first->second));
    }
  }
}

void check_limits(const Config& config, Mistakes& mistakes) {
  const auto& services = config.services;
  if (services.size() > config.limits.services) {
    const std::size_t i = config.limits.services;
    mistakes.add(
        services[i].position, service_label(services[i], i),
        fmt::format("expected at most {} services (limits.services), got {}", config.limits.services, services.size()));
  }
  std::size_t total = 0;
  const Backend* first = nullptr;
  std::string key;
  for (std::size_t i = 0; i < services.size(); ++i) {
    const auto& backends = services[i].backends;
    if (!first && total + backends.size() > config.limits.backends) {
      first = &backends[config.limits.backends - total];
      key = backend_key(service_label(services[i], i), config.limits.backends - total);
    }
    total += backends.size();
  }
  if (first) {
    mistakes.add(first->position, key,
                 fmt::format("expected at most {} backends (limits.backends), got {}", config.limits.backends, total));
  }
}

/// No kernel can.
void check_engine(const Service& service, std::size_t index, const ServicePositions& positions, Mistakes& mistakes) {
  if (service.engine == EngineMode::bpf && service.proxy_protocol != ProxyProtocol::none)
    mistakes.add(positions.proxy_protocol, service_label(service, index) + ": proxy_protocol",
                 "expected none, as only the userspace engine sends a header, and engine is \"bpf\"");
}

/// What speaks of connections means nothing to datagrams.
void check_udp(const Service& service, std::size_t index, const ServicePositions& positions, Mistakes& mistakes) {
  if (service.protocol != Protocol::udp) return;
  const auto report = [&](Position position, std::string_view key, std::string_view why) {
    mistakes.add(position, fmt::format("{}: {}", service_label(service, index), key),
                 fmt::format("expected protocol = \"tcp\", {}, got \"udp\"", why));
  };
  if (service.proxy_protocol != ProxyProtocol::none)
    report(positions.proxy_protocol, "proxy_protocol", "as a datagram carries no PROXY header");
  if (service.health) report(positions.health, "health", "as the check is a TCP connect");
  if (service.eject) report(positions.eject, "eject", "as only connections are seen to fail");
}

}  // namespace

std::string service_label(const Service& service, std::size_t index) {
  if (service.name.empty()) return fmt::format("service[{}]", index);
  return "service " + quoted(service.name, max_name_length);
}

void validate(const Config& config, const std::vector<ServicePositions>& positions, Mistakes& mistakes) {
  const auto& services = config.services;
  check_limits(config, mistakes);

  boost::unordered_flat_map<std::string_view, std::size_t> by_name;
  EndpointMap by_vip;
  by_name.reserve(services.size());
  by_vip.reserve(services.size());
  for (std::size_t i = 0; i < services.size(); ++i) {
    const Service& service = services[i];
    if (!service.name.empty()) {
      const auto [first, fresh] = by_name.try_emplace(service.name, i);
      if (!fresh) {
        mistakes.add(positions[i].name, service_label(service, i) + ": name",
                     fmt::format("expected a name of its own, got that of the service on line {}",
                                 positions[first->second].name.line));
      }
    }
    if (service.port != 0 && !service.vip.is_unspecified()) {
      const auto [first, fresh] = by_vip.try_emplace({service.vip, service.port, service.protocol}, i);
      if (!fresh) {
        mistakes.add(positions[i].vip, service_label(service, i) + ": vip",
                     fmt::format("expected a vip, port and protocol of its own, got {}/{} as on line {}",
                                 to_text(service.vip, service.port), name_of(protocol_names, service.protocol),
                                 positions[first->second].vip.line));
      }
    }
    check_backend_list(service, i, service.backends, mistakes);
    check_engine(service, i, positions[i], mistakes);
    check_udp(service, i, positions[i], mistakes);
  }

  for (std::size_t i = 0; i < services.size(); ++i) {
    const Service& service = services[i];
    for (std::size_t k = 0; k < service.backends.size(); ++k) {
      const Backend& backend = service.backends[k];
      if (!is_read(backend)) continue;
      const auto found = by_vip.find({backend.address, backend.port, service.protocol});
      if (found == by_vip.end()) continue;
      mistakes.add(
          backend.position, backend_key(service_label(service, i), k),
          fmt::format("expected a backend, got {}, the vip of {} on line {}", to_text(backend.address, backend.port),
                      service_label(services[found->second], found->second), positions[found->second].vip.line));
    }
  }
}

std::vector<Mistake> check_backends(const Service& service, std::span<const Backend> backends) {
  Mistakes mistakes;
  for (std::size_t i = 0; i < backends.size(); ++i) {
    const Backend& backend = backends[i];
    const auto report = [&](std::string_view key, std::string_view what) {
      mistakes.add({}, fmt::format("{}.{}", backend_key(service_label(service, 0), i), key), what);
    };
    if (const std::string fault = unicast_fault(backend.address); !fault.empty())
      report("address", fmt::format("expected {}, got {}", fault, quoted(backend.address.to_string())));
    if (backend.port == 0) report("port", fmt::format("expected {}, got 0", integer_range(1, 65535)));
    if (backend.weight < 1 || backend.weight > max_weight)
      report("weight", fmt::format("expected {}, got {}", integer_range(1, max_weight), backend.weight));
  }
  check_backend_list(service, 0, backends, mistakes);
  return mistakes.take();
}

}  // namespace config
