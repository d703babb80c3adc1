// SPDX-License-Identifier: BSD-2-Clause
#include "tests/support/toml.h"

#include <fmt/format.h>

namespace support {

std::vector<Service> more_services(std::uint32_t count, const Backend& backend) {
  std::vector<Service> services;
  for (std::uint32_t i = 0; i < count; ++i)
    services.push_back({fmt::format("more-{}", i), fmt::format("10.98.{}.{}", i / 250, i % 250 + 1), 80, {backend}});
  return services;
}

std::string toml(const std::vector<Service>& services, Limits limits) {
  std::string text = fmt::format("[limits]\nservices = {}\nbackends = {}\n", limits.services, limits.backends);
  for (const Service& service : services) {
    text +=
        fmt::format("\n[[service]]\nname = \"{}\"\nvip = \"{}\"\nport = {}\nno_backend = \"{}\"\n{}\nbackends = [\n",
                    service.name, service.vip, service.port, service.no_backend, service.more);
    for (const Backend& backend : service.backends)
      text += fmt::format("  {{ address = \"{}\", port = {}, weight = {}, state = \"{}\" }},\n", backend.address,
                          backend.port, backend.weight, backend.state);
    text += "]\n";
  }
  return text;
}

}  // namespace support
