// SPDX-License-Identifier: BSD-2-Clause
#include "tests/bench/compare/kube_proxy.h"

#include <fmt/format.h>

#include <iterator>

#include "tests/bench/compare/peers.h"

namespace bench::kube_proxy {
namespace {

constexpr const char* pods = "10.0.0.0/8";
constexpr const char* vips = "10.96.0.0/16";

template <class... Arguments>
void add(std::string& text, fmt::format_string<Arguments...> format, Arguments&&... arguments) {
  fmt::format_to(std::back_inserter(text), format, std::forward<Arguments>(arguments)...);
}

// --- nftables -------------------------------------------------------------------------------------------------------

std::string nft_frame() {
  return fmt::format(R"(table ip kube-proxy {{
  set cluster-ips {{ type ipv4_addr; }}
  set nodeport-ips {{ type ipv4_addr; }}
  map firewall-ips {{ type ipv4_addr . inet_proto . inet_service : verdict; }}
  map no-endpoint-nodeports {{ type inet_proto . inet_service : verdict; }}
  map no-endpoint-services {{ type ipv4_addr . inet_proto . inet_service : verdict; }}
  map service-ips {{ type ipv4_addr . inet_proto . inet_service : verdict; }}
  map service-nodeports {{ type inet_proto . inet_service : verdict; }}

  chain cluster-ips-check {{
    ip daddr @cluster-ips reject
    ip daddr {{ {} }} drop
  }}
  chain firewall-check {{ ip daddr . meta l4proto . th dport vmap @firewall-ips; }}
  chain mark-for-masquerade {{ mark set mark or 0x4000; }}
  chain masquerading {{
    mark and 0x4000 == 0 return
    mark set mark xor 0x4000
    masquerade fully-random
  }}
  chain nodeport-endpoints-check {{
    ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports
  }}
  chain service-endpoints-check {{ ip daddr . meta l4proto . th dport vmap @no-endpoint-services; }}
  chain services {{
    ip daddr . meta l4proto . th dport vmap @service-ips
    ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
  }}

  chain filter-prerouting-pre-dnat {{
    type filter hook prerouting priority -110;
    ct state new jump firewall-check
  }}
  chain filter-output-pre-dnat {{
    type filter hook output priority -110;
    ct state new jump firewall-check
  }}
  chain filter-forward {{
    type filter hook forward priority 0;
    ct state new jump service-endpoints-check
    ct state new jump cluster-ips-check
  }}
  chain filter-input {{
    type filter hook input priority 0;
    ct state new jump nodeport-endpoints-check
    ct state new jump service-endpoints-check
  }}
  chain filter-output {{
    type filter hook output priority 0;
    ct state new jump service-endpoints-check
    ct state new jump cluster-ips-check
  }}
  chain nat-prerouting {{
    type nat hook prerouting priority -100;
    jump services
  }}
  chain nat-output {{
    type nat hook output priority -100;
    jump services
  }}
  chain nat-postrouting {{
    type nat hook postrouting priority 100;
    jump masquerading
  }}
}}
)",
                     vips);
}

std::string nft_endpoint(std::uint32_t number) { return fmt::format("endpoint-{}", number); }

void add_nft_endpoint(std::string& text, const Task& task, std::uint32_t number) {
  const std::string address = dotted(backend(number));
  add(text, "add chain ip kube-proxy {}\n", nft_endpoint(number));
  add(text, "add rule ip kube-proxy {} ip saddr {} jump mark-for-masquerade\n", nft_endpoint(number), address);
  add(text, "add rule ip kube-proxy {} meta l4proto {} dnat to {}:{}\n", nft_endpoint(number), task.protocol(), address,
      backend_port);
}

void add_nft_service(std::string& text, std::uint32_t service, std::uint32_t first, std::uint32_t count) {
  add(text, "add rule ip kube-proxy service-{} ip daddr {} ip saddr != {} jump mark-for-masquerade\n", service,
      dotted(vip(service)), pods);
  add(text, "add rule ip kube-proxy service-{} numgen random mod {} vmap {{ ", service, count);
  for (std::uint32_t k = 0; k < count; ++k) add(text, "{}{} : goto {}", k > 0 ? ", " : "", k, nft_endpoint(first + k));
  text += " }\n";
}

std::string nft_all(const Task& task) {
  std::string text = nft_frame();
  for (std::uint32_t i = 0; i < task.services; ++i) {
    add(text, "add chain ip kube-proxy service-{}\n", i);
    for (std::uint32_t k = 0; k < task.backends; ++k) add_nft_endpoint(text, task, i * task.backends + k);
    add_nft_service(text, i, i * task.backends, task.backends);
  }
  text += "add element ip kube-proxy cluster-ips { ";
  for (std::uint32_t i = 0; i < task.services; ++i) add(text, "{}{}", i > 0 ? ", " : "", dotted(vip(i)));
  text += " }\nadd element ip kube-proxy service-ips { ";
  for (std::uint32_t i = 0; i < task.services; ++i)
    add(text, "{}{} . {} . {} : goto service-{}", i > 0 ? ", " : "", dotted(vip(i)), task.protocol(), vip_port, i);
  return text + " }\n";
}

std::string nft_change(const Task& task, std::uint32_t service, std::uint32_t before, std::uint32_t after) {
  std::string text;
  add_nft_endpoint(text, task, after);
  add(text, "flush chain ip kube-proxy service-{}\n", service);
  add_nft_service(text, service, after, 1);
  add(text, "flush chain ip kube-proxy {0}\ndelete chain ip kube-proxy {0}\n", nft_endpoint(before));
  return text;
}

// --- iptables -------------------------------------------------------------------------------------------------------

// As long as the names that kube-proxy makes of hashes.
std::string service_chain(std::uint32_t service) { return fmt::format("KUBE-SVC-{:016}", service); }
std::string endpoint_chain(std::uint32_t number) { return fmt::format("KUBE-SEP-{:016}", number); }

void add_services_list(std::string& text, const Task& task) {
  for (std::uint32_t i = 0; i < task.services; ++i)
    add(text,
        "-A KUBE-SERVICES -m comment --comment \"bench/bench{0} cluster IP\" -m {1} -p {1} -d {2} --dport {3} -j {4}\n",
        i, task.protocol(), dotted(vip(i)), vip_port, service_chain(i));
  text +=
      "-A KUBE-SERVICES -m comment --comment \"kubernetes service nodeports; NOTE: this must be the last rule in this "
      "chain\" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\n";
}

void add_service_rules(std::string& text, const Task& task, std::uint32_t service, std::uint32_t first,
                       std::uint32_t count) {
  add(text,
      "-A {0} -m comment --comment \"bench/bench{1} cluster IP\" -m {2} -p {2} -d {3} --dport {4} ! -s {5} -j "
      "KUBE-MARK-MASQ\n",
      service_chain(service), service, task.protocol(), dotted(vip(service)), vip_port, pods);
  for (std::uint32_t k = 0; k < count; ++k) {
    add(text, "-A {} -m comment --comment \"bench/bench{} -> {}:{}\" ", service_chain(service), service,
        dotted(backend(first + k)), backend_port);
    if (k + 1 < count) add(text, "-m statistic --mode random --probability {:.10f} ", 1.0 / (count - k));
    add(text, "-j {}\n", endpoint_chain(first + k));
  }
  for (std::uint32_t k = 0; k < count; ++k) {
    const std::string address = dotted(backend(first + k));
    add(text, "-A {} -m comment --comment bench/bench{} -s {} -j KUBE-MARK-MASQ\n", endpoint_chain(first + k), service,
        address);
    add(text, "-A {0} -m comment --comment bench/bench{1} -m {2} -p {2} -j DNAT --to-destination {3}:{4}\n",
        endpoint_chain(first + k), service, task.protocol(), address, backend_port);
  }
}

constexpr const char* nat_frame =
    "*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-NODEPORTS - [0:0]\n:KUBE-POSTROUTING - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n";
constexpr const char* masquerading =
    "-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n"
    "-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000\n"
    "-A KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring SNAT\" -j MASQUERADE "
    "--random-fully\n"
    "-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000\n";

std::string iptables_all(const Task& task) {
  std::string text =
      "*filter\n:KUBE-EXTERNAL-SERVICES - [0:0]\n:KUBE-FIREWALL - [0:0]\n:KUBE-FORWARD - [0:0]\n"
      ":KUBE-NODEPORTS - [0:0]\n:KUBE-PROXY-FIREWALL - [0:0]\n:KUBE-SERVICES - [0:0]\n"
      "-A INPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j "
      "KUBE-PROXY-FIREWALL\n"
      "-A INPUT -m comment --comment \"kubernetes health check service ports\" -j KUBE-NODEPORTS\n"
      "-A INPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes externally-visible service portals\" -j "
      "KUBE-EXTERNAL-SERVICES\n"
      "-A INPUT -j KUBE-FIREWALL\n"
      "-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j "
      "KUBE-PROXY-FIREWALL\n"
      "-A FORWARD -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD\n"
      "-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n"
      "-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes externally-visible service portals\" -j "
      "KUBE-EXTERNAL-SERVICES\n"
      "-A OUTPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j "
      "KUBE-PROXY-FIREWALL\n"
      "-A OUTPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n"
      "-A OUTPUT -j KUBE-FIREWALL\n"
      "-A KUBE-FIREWALL -m comment --comment \"block incoming localnet connections\" -d 127.0.0.0/8 ! -s 127.0.0.0/8 "
      "-m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP\n"
      "-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP\n"
      "-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT\n"
      "-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n"
      "COMMIT\n";
  text += nat_frame;
  for (std::uint32_t i = 0; i < task.services; ++i) {
    add(text, ":{} - [0:0]\n", service_chain(i));
    for (std::uint32_t k = 0; k < task.backends; ++k) add(text, ":{} - [0:0]\n", endpoint_chain(i * task.backends + k));
  }
  text +=
      "-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n"
      "-A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n"
      "-A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING\n";
  text += masquerading;
  for (std::uint32_t i = 0; i < task.services; ++i) add_service_rules(text, task, i, i * task.backends, task.backends);
  add_services_list(text, task);
  return text + "COMMIT\n";
}

/// The list is written anew each time; of the chains, those that change.
std::string iptables_change(const Task& task, std::uint32_t service, std::uint32_t before, std::uint32_t after) {
  std::string text = nat_frame;
  add(text, ":{} - [0:0]\n:{} - [0:0]\n:{} - [0:0]\n", service_chain(service), endpoint_chain(before),
      endpoint_chain(after));
  text += masquerading;
  add_service_rules(text, task, service, after, 1);
  add_services_list(text, task);
  add(text, "-X {}\n", endpoint_chain(before));
  return text + "COMMIT\n";
}

}  // namespace

const Mode nftables = {.program = "/usr/sbin/nft", .whole = "-f", .part = {"-f"}, .all = nft_all, .change = nft_change};
const Mode iptables = {.program = "/usr/sbin/iptables-nft-restore",
                       .whole = "--noflush",
                       .part = {"--noflush", "--counters"},
                       .all = iptables_all,
                       .change = iptables_change};

}  // namespace bench::kube_proxy
