// SPDX-License-Identifier: BSD-2-Clause
//
// The reader of the configuration: any text is valid or has mistakes that can be shown; what is valid can be written
// down and is the same when it is read again, and keeps what the rest of clusterip relies on.
#include <fmt/format.h>

#include <algorithm>
#include <set>
#include <string>
#include <string_view>
#include <tuple>

#include "config/names.h"
#include "config/read_config.h"
#include "tests/fuzz/require.h"

namespace {

std::string quoted(std::string_view text) {
  std::string result = "\"";
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte == 0x7f || c == '"' || c == '\\')
      result += fmt::format("\\u{:04x}", byte);
    else
      result += c;
  }
  return result + '"';
}

std::string milliseconds(std::chrono::milliseconds time) { return fmt::format("\"{}ms\"", time.count()); }

std::string written(const config::Config& config) {
  std::string text = fmt::format("[limits]\nservices = {}\nbackends = {}\nflows = {}\n", config.limits.services,
                                 config.limits.backends, config.limits.flows);
  for (const config::Service& service : config.services) {
    text += fmt::format("[[service]]\nname = {}\nvip = \"{}\"\nport = {}\nprotocol = \"{}\"\npolicy = \"{}\"\n",
                        quoted(service.name), service.vip.to_string(), service.port,
                        config::name_of(config::protocol_names, service.protocol),
                        config::name_of(config::policy_names, service.policy));
    if (service.affinity) text += fmt::format("affinity = {}\n", milliseconds(*service.affinity));
    if (service.health)
      text += fmt::format("health = {{ interval = {}, timeout = {}, rise = {}, fall = {} }}\n",
                          milliseconds(service.health->interval), milliseconds(service.health->timeout),
                          service.health->rise, service.health->fall);
    if (service.eject)
      text += fmt::format("eject = {{ failures = {}, time = {} }}\n", service.eject->failures,
                          milliseconds(service.eject->time));
    text += fmt::format("mark = {}\nno_backend = \"{}\"\nbackends = [", service.mark,
                        config::name_of(config::no_backend_names, service.no_backend));
    for (const config::Backend& backend : service.backends)
      text +=
          fmt::format("{{ address = \"{}\", port = {}, weight = {}, state = \"{}\" }},", backend.address.to_string(),
                      backend.port, backend.weight, config::name_of(config::state_names, backend.state));
    text += "]\n";
  }
  return text;
}

void require_same(const config::Service& a, const config::Service& b) {
  require(a.name == b.name && a.vip == b.vip && a.port == b.port && a.protocol == b.protocol && a.policy == b.policy);
  require(a.affinity == b.affinity && a.health == b.health && a.eject == b.eject && a.mark == b.mark);
  require(a.no_backend == b.no_backend && a.backends.size() == b.backends.size());
  for (std::size_t i = 0; i < a.backends.size(); ++i) {
    const config::Backend& one = a.backends[i];
    const config::Backend& other = b.backends[i];
    require(one.address == other.address && one.port == other.port && one.weight == other.weight &&
            one.state == other.state);
  }
}

/// What everybody who is given a configuration takes for granted.
void require_sound(const config::Config& config) {
  require(config.services.size() <= config.limits.services);
  std::set<std::string> names;
  std::set<std::tuple<config::Address, std::uint16_t, config::Protocol>> vips;
  std::size_t backends = 0;
  for (const config::Service& service : config.services) {
    require(!service.name.empty() && service.name.size() <= config::max_name_length);
    require(names.insert(service.name).second);
    require(service.port != 0 && !service.vip.is_unspecified() && !service.vip.is_multicast());
    require(vips.emplace(service.vip, service.port, service.protocol).second);
    std::set<std::pair<config::Address, std::uint16_t>> seen;
    for (const config::Backend& backend : service.backends) {
      require(backend.port != 0 && backend.weight >= 1 && backend.weight <= config::max_weight);
      require(backend.address.is_v4() == service.vip.is_v4() && !backend.address.is_unspecified());
      require(seen.emplace(backend.address, backend.port).second);
    }
    backends += service.backends.size();
  }
  require(backends <= config.limits.backends);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const auto config = config::read_config(text);
  if (!config) {
    require(!config.error().empty());
    for (const config::Mistake& mistake : config.error()) {
      const std::string shown = config::render(mistake, text, "fuzz.toml");
      require(!shown.empty() && std::ranges::count(shown, '\n') <= 2 && shown.find('\x1b') == std::string::npos);
      require(mistake.position.line <= 1 + static_cast<std::size_t>(std::ranges::count(text, '\n')));
    }
    return 0;
  }
  require_sound(*config);
  const auto again = config::read_config(written(*config));
  require(again.has_value() && again->services.size() == config->services.size());
  for (std::size_t i = 0; i < config->services.size(); ++i) require_same(config->services[i], again->services[i]);
  return 0;
}
