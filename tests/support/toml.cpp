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
  if (limits.flows != 0) text += fmt::format("flows = {}\n", limits.flows);
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

std::string proxy_toml(const std::vector<Service>& services, const Userspace& userspace, Limits limits) {
  std::string text = fmt::format(
      "[userspace]\nthreads = {}\nconnect_timeout = \"{}\"\nidle_timeout = \"{}\"\ndrain_timeout = \"{}\"\n"
      "udp_timeout = \"{}\"\nlocal_vips = {}\nallow_from = [",
      userspace.threads, userspace.connect_timeout, userspace.idle_timeout, userspace.drain_timeout,
      userspace.udp_timeout, userspace.local_vips);
  for (const std::string& network : userspace.allow_from) text += fmt::format("\"{}\", ", network);
  return text + "]\n\n" + toml(services, limits);
}

}  // namespace support
