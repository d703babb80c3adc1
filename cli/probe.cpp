// SPDX-License-Identifier: BSD-2-Clause
#include <fmt/format.h>

#include <array>
#include <boost/json.hpp>
#include <string>
#include <utility>

#include "cli/table.h"
#include "cli/text.h"
#include "cli/verbs.h"
#include "config/printable.h"

namespace cli {

namespace {

namespace po = boost::program_options;

struct Capability {
  std::uint32_t bit;
  std::string_view name;
  std::string_view with;
  std::string_view without;
};

constexpr std::array capabilities{
    Capability{CLUSTERIP_CAN_CONNECT4, "connect4", "a program can rewrite the address of a connect()", "no fast path"},
    Capability{CLUSTERIP_CAN_MAP_MEMORY, "map_memory", "a change is published by one store", "no fast path"},
    Capability{CLUSTERIP_CAN_SET_ERRNO, "set_errno", "a refused connect() fails with ECONNREFUSED",
               "a refused connect() fails with EPERM"},
    Capability{CLUSTERIP_CAN_LINK, "link", "the program is attached by a link, which can be pinned",
               "the program is attached by BPF_PROG_ATTACH beside others"},
    Capability{CLUSTERIP_CAN_MEMBARRIER, "membarrier", "one membarrier() waits for readers of old state",
               "the update of a map-in-map waits for readers of old state"},
    Capability{CLUSTERIP_CAN_BATCH, "batch", "many services are loaded by one system call",
               "each service is loaded by a system call of its own"},
    Capability{CLUSTERIP_CAN_SESSIONS, "sessions", "what a socket was given is kept with it", "no fast path"},
    Capability{CLUSTERIP_CAN_CONNECT6, "connect6", "IPv6 sockets are served", "IPv6 sockets are left untouched"},
    Capability{CLUSTERIP_CAN_SENDMSG, "sendmsg", "UDP services are carried", "no UDP services"},
    Capability{CLUSTERIP_CAN_RECVMSG, "recvmsg", "UDP replies come from the VIP", "no UDP services"},
    Capability{CLUSTERIP_CAN_GETPEER, "getpeer", "getpeername() shows the VIP", "getpeername() shows the backend"},
    Capability{CLUSTERIP_CAN_RELEASE, "release", "closed connections are counted", "no least_conn"},
    Capability{CLUSTERIP_CAN_SOCK_OPS, "sock_ops", "a failed connect counts no longer than it lasts",
               "a failed connect counts until its socket is closed"},
    Capability{CLUSTERIP_CAN_MARK, "mark", "rewritten sockets can be marked", "no services with a mark"},
    Capability{CLUSTERIP_CAN_NETNS_CLIENT, "netns_client", "a client can be a network namespace",
               "no client = \"netns\""},
    Capability{CLUSTERIP_CAN_CGROUP_CLIENT, "cgroup_client", "a client can be a cgroup", "no client = \"cgroup\""},
    Capability{CLUSTERIP_CAN_EVENTS, "events", "decisions can be watched", "decisions cannot be watched"},
    Capability{CLUSTERIP_CAN_DESTROY, "destroy", "connected sockets of a backend that leaves are ended",
               "connected sockets stay with a backend that leaves"},
};

void describe(po::options_description_easy_init add) { add("json", po::bool_switch(), "print the result as JSON"); }

boost::json::object to_json(const clusterip_capabilities& found, bool fast_path) {
  boost::json::object list;
  for (const Capability& capability : capabilities) {
    list[capability.name] = (found.can & capability.bit) != 0;
  }
  return {{"engine", fast_path ? "bpf" : "userspace"},
          {"reason", config::printable(static_cast<const char*>(found.reason))},
          {"capabilities", std::move(list)}};
}

std::string to_text(const clusterip_capabilities& found, bool fast_path) {
  Table table({{.title = "CAPABILITY"}, {.title = "AVAILABLE"}, {.title = "WHICH MEANS"}});
  for (const Capability& capability : capabilities) {
    const bool available = (found.can & capability.bit) != 0;
    table.add({{.text = std::string(capability.name)},
               {.text = available ? "yes" : "no", .colour = available ? Colour::none : Colour::yellow},
               {.text = std::string(available ? capability.with : capability.without)}});
  }
  const std::string verdict =
      fast_path ? "engine bpf would carry the services: this kernel and these privileges have what the fast path needs"
                : fmt::format("engine userspace would carry the services, engine bpf cannot: {}",
                              config::printable(static_cast<const char*>(found.reason)));
  return fmt::format("{}\n{}\n", table.render(wants_colour(stdout)), verdict);
}

Outcome run(const Plugin& plugin, const Given& given) {
  auto found = sized<clusterip_capabilities>();
  auto error = sized<clusterip_error>();
  if (plugin.probe(&found, &error) < 0) return std::unexpected(failure_of(error));

  // The plugin names a reason exactly when there is no fast path.
  const bool fast_path = found.reason[0] == '\0';
  if (given.options["json"].as<bool>()) {
    fmt::print("{}\n", boost::json::serialize(to_json(found, fast_path)));
  } else {
    fmt::print("{}", to_text(found, fast_path));
  }
  return fast_path ? Exit::fine : Exit::unsupported;
}

}  // namespace

const Verb probe_verb{.name = "probe",
                      .usage = "[--json]",
                      .argument = {},
                      .summary = "show what this kernel can do, and which engine would carry services, and why",
                      .describe = describe,
                      .run = run};

}  // namespace cli
