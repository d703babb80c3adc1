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
#include <vector>

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

std::string list(const std::vector<std::string>& values) {
  std::string text = "[";
  for (const std::string& value : values) text += quoted(value) + ",";
  return text + "]";
}

/// A key whose absence means the empty string.
std::string key(std::string_view name, const std::string& value) {
  return value.empty() ? "" : fmt::format("{} = {}\n", name, quoted(value));
}

std::string written(const config::Kubernetes& cluster) {
  return "[kubernetes]\n" + key("kubeconfig", cluster.kubeconfig) + key("context", cluster.context) +
         key("server", cluster.server) + key("ca_file", cluster.ca_file) + key("token_file", cluster.token_file) +
         key("selector", cluster.selector) + key("node", cluster.node) + key("zone", cluster.zone) +
         key("proxy_name", cluster.proxy_name) +
         fmt::format("namespaces = {}\nexternal_ips = {}\nload_balancer_ips = {}\n", list(cluster.namespaces),
                     cluster.external_ips, cluster.load_balancer_ips);
}

std::string written(const config::Config& config) {
  std::string text = fmt::format("[limits]\nservices = {}\nbackends = {}\nflows = {}\n", config.limits.services,
                                 config.limits.backends, config.limits.flows);
  const config::Engine& engine = config.engine;
  text += fmt::format("[engine]\nmode = \"{}\"\non_exit = \"{}\"\npeer_names = {}\nwatch = {}\n",
                      config::name_of(config::engine_names, engine.mode),
                      config::name_of(config::on_exit_names, engine.on_exit), engine.peer_names, engine.watch) +
          key("cgroup", engine.cgroup) + key("pin", engine.pin) + key("control", engine.control);
  const config::Userspace& userspace = config.userspace;
  text += fmt::format(
      "[userspace]\nthreads = {}\nconnect_timeout = {}\nidle_timeout = {}\ndrain_timeout = {}\nudp_timeout = {}\n"
      "local_vips = {}\nallow_from = {}\n",
      userspace.threads, milliseconds(userspace.connect_timeout), milliseconds(userspace.idle_timeout),
      milliseconds(userspace.drain_timeout), milliseconds(userspace.udp_timeout), userspace.local_vips,
      list(userspace.allow_from));
  if (config.metrics.listen) text += "[metrics]\n" + key("listen", *config.metrics.listen);
  if (config.kubernetes) text += written(*config.kubernetes);
  for (const config::Service& service : config.services) {
    text += fmt::format("[[service]]\nname = {}\nvip = \"{}\"\nport = {}\nprotocol = \"{}\"\npolicy = \"{}\"\n",
                        quoted(service.name), service.vip.to_string(), service.port,
                        config::name_of(config::protocol_names, service.protocol),
                        config::name_of(config::policy_names, service.policy));
    const auto choice = [&text](std::string_view key, const auto& names, auto value) {
      text += fmt::format("{} = \"{}\"\n", key, config::name_of(names, value));
    };
    choice("client", config::client_names, service.client);
    choice("on_remove", config::on_remove_names, service.on_remove);
    choice("proxy_protocol", config::proxy_protocol_names, service.proxy_protocol);
    choice("engine", config::engine_names, service.engine);
    text += fmt::format("panic = {}\n", service.panic);
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

/// But for where it stands in the text.
config::Service without_positions(config::Service service) {
  service.position = {};
  for (config::Backend& backend : service.backends) backend.position = {};
  return service;
}

void require_same(const config::Config& a, const config::Config& b) {
  const auto engine = [](const config::Engine& e) {
    return std::tie(e.mode, e.cgroup, e.pin, e.on_exit, e.peer_names, e.watch, e.control);
  };
  const auto limits = [](const config::Limits& l) { return std::tie(l.services, l.backends, l.flows); };
  const auto userspace = [](const config::Userspace& u) {
    return std::tie(u.threads, u.connect_timeout, u.idle_timeout, u.drain_timeout, u.udp_timeout, u.local_vips,
                    u.allow_from);
  };
  require(engine(a.engine) == engine(b.engine) && limits(a.limits) == limits(b.limits));
  require(userspace(a.userspace) == userspace(b.userspace) && a.metrics.listen == b.metrics.listen);
  require(a.kubernetes == b.kubernetes);
  require(std::ranges::equal(a.services, b.services, {}, without_positions, without_positions));
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
  require(again.has_value());
  require_same(*config, *again);
  return 0;
}
