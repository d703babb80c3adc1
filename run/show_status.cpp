// SPDX-License-Identifier: BSD-2-Clause
#include "run/show_status.h"

#include <fmt/format.h>

#include <boost/json.hpp>
#include <cerrno>
#include <string_view>

#include "cli/table.h"
#include "cli/text.h"
#include "fallback_proxy/control_client.h"
#include "run/status_fields.h"

namespace run {
namespace {

using boost::json::object;
using boost::json::value;
using cli::Cell;
using cli::Colour;

/// `clusterip run` has the same status; what its fast path carries lacks what only a proxy counts.
Cell count(const object& of, std::string_view key) {
  return {of.at(key).is_null() ? "-" : fmt::to_string(number(of, key))};
}

Cell serving(const value& answer) {
  if (answer.is_null()) return {"bpf"};
  return answer.as_bool() ? Cell{"yes"} : Cell{"no", Colour::red};
}

Cell state(const object& backend) {
  const value* ejected = backend.if_contains("ejected_ms");
  if (ejected != nullptr && ejected->to_number<std::int64_t>() > 0) return {"ejected", Colour::red};
  if (const value& marked = backend.at("marked"); !marked.is_null() && marked.as_bool()) return {"dead", Colour::red};
  const std::string state = text(backend, "state");
  return {state, state == "active" ? Colour::none : Colour::yellow};
}

std::string to_text(const object& status) {
  using enum cli::Table::Align;
  cli::Table services({{"SERVICE"},
                       {"VIP"},
                       {"POLICY"},
                       {"SERVING"},
                       {"LIVE", right},
                       {"REFUSED", right},
                       {"DENIED", right},
                       {"DROPPED", right},
                       {"RECEIVED", right},
                       {"SENT", right},
                       {"REASON"}});
  cli::Table backends({{"SERVICE"},
                       {"BACKEND"},
                       {"WEIGHT", right},
                       {"STATE"},
                       {"LIVE", right},
                       {"CONNECTS", right},
                       {"FAILURES", right}});
  const auto& list = status.at("services").as_array();
  for (const value& entry : list) {
    const object& service = entry.as_object();
    std::uint64_t live = 0;
    for (const value& each : service.at("backends").as_array()) {
      const object& backend = each.as_object();
      live += number(backend, "live");
      backends.add({{text(service, "name")},
                    {endpoint(backend, "address")},
                    count(backend, "weight"),
                    state(backend),
                    count(backend, "live"),
                    count(backend, "connects"),
                    count(backend, "failures")});
    }
    services.add({{text(service, "name")},
                  {fmt::format("{}/{}", endpoint(service, "vip"), text(service, "protocol"))},
                  {text(service, "policy")},
                  serving(service.at("serving")),
                  {fmt::to_string(live)},
                  count(service, "refused"),
                  count(service, "denied"),
                  count(service, "dropped"),
                  count(service, "received"),
                  count(service, "sent"),
                  {text(service, "reason")}});
  }
  const bool colour = cli::wants_colour(stdout);
  return fmt::format("{} {}, pid {}, since {}: {}, {} of at most {} connections, {}\n\n{}\n{}", text(status, "program"),
                     text(status, "version"), number(status, "pid"), text(status, "since"),
                     cli::count(list.size(), "service"), number(status, "connections"),
                     number(status, "connection_limit"), cli::count(number(status, "threads"), "thread"),
                     services.render(colour), backends.render(colour));
}

}  // namespace

config::Result<std::string> show_status(const std::string& path, bool json) {
  auto client = userspace::ControlClient::connect(path);
  if (!client) return std::unexpected(client.error());
  if (!*client) return config::fail(-ECONNREFUSED, "no fallback_proxy listens at " + path);
  const auto status = (*client)->ask({{"request", "status"}});
  if (!status) return std::unexpected(status.error());
  return (*client)->understand([&] { return json ? serialize(*status) + "\n" : to_text(*status); });
}

}  // namespace run
