// SPDX-License-Identifier: BSD-2-Clause
#include <fmt/format.h>
#include <poll.h>

#include <algorithm>
#include <boost/asio/ip/address_v4.hpp>
#include <boost/json.hpp>
#include <cerrno>
#include <cstdio>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "bpf/map_layout.h"
#include "cli/endpoint.h"
#include "cli/pinned.h"
#include "cli/places.h"
#include "cli/verbs.h"
#include "config/printable.h"
#include "run/decisions.h"
#include "run/status_fields.h"

namespace cli {

namespace {

namespace po = boost::program_options;
using boost::json::object;

// The kernel writes events for so long after each call; a call is made after half of it.
constexpr std::uint32_t enabled_seconds = 10;

void describe(po::options_description_easy_init add) {
  add("service", po::value<std::string>()->value_name("NAME"), "only decisions about this service");
  add("backend", po::value<std::string>()->value_name("ADDRESS:PORT"), "only those that chose this backend");
  add("pid", po::value<std::int64_t>()->value_name("PID"), "only those of this process");
  add("verdict", po::value<std::string>()->value_name("VERDICT"),
      "only rewritten, no_backend, no_service, pass, contended or ejected");
  add("count", po::value<std::int64_t>()->value_name("N"), "end after so many");
  describe_places(add);
  add("json", po::bool_switch(), "print a JSON object a line");
}

/// Which decisions are wanted, and how many.
struct Wanted {
  std::optional<std::string> service, backend, verdict;
  std::optional<std::int64_t> pid, count;
};

template <class T>
std::optional<T> given_as(const po::variables_map& options, const char* name) {
  return options.contains(name) ? std::optional(options[name].as<T>()) : std::nullopt;
}

/// What could never match is a mistake.
std::expected<Wanted, Failure> parse_wanted(const po::variables_map& options) {
  static constexpr std::string_view verdicts[] = {"rewritten", "no_backend", "no_service",
                                                  "pass",      "contended",  "ejected"};
  const auto mistake = [](std::string_view option, std::string_view expected, auto got) {
    return std::unexpected(Failure{
        .exit = Exit::usage, .message = fmt::format("trace: --{}: expected {}, got '{}'", option, expected, got)});
  };
  Wanted wanted{.service = given_as<std::string>(options, "service"),
                .backend = given_as<std::string>(options, "backend"),
                .verdict = given_as<std::string>(options, "verdict"),
                .pid = given_as<std::int64_t>(options, "pid"),
                .count = given_as<std::int64_t>(options, "count")};
  if (wanted.verdict && std::ranges::find(verdicts, *wanted.verdict) == std::end(verdicts))
    return mistake("verdict", "rewritten, no_backend, no_service, pass, contended or ejected", *wanted.verdict);
  if (wanted.backend) {
    const auto endpoint = parse_endpoint(*wanted.backend);
    if (!endpoint || wanted.backend->contains('/')) return mistake("backend", "ADDRESS:PORT", *wanted.backend);
    wanted.backend = address_and_port(endpoint->address, endpoint->port);  // as decisions have it
  }
  if (wanted.pid && *wanted.pid < 1) return mistake("pid", "a number from 1", *wanted.pid);
  if (wanted.count && *wanted.count < 1) return mistake("count", "a number from 1", *wanted.count);
  return wanted;
}

class Printer {
 public:
  Printer(Wanted wanted, bool is_json) : wanted_(std::move(wanted)), is_json_(is_json) {}

  /// False when it was the last one, or nobody reads the output any more.
  bool print(const object& decision) {
    if (wanted_.count == 0) return false;
    const bool is_loss = decision.contains("lost");
    if (!is_loss && !is_wanted(decision)) return true;
    const std::string line = is_json_ ? serialize(decision) : run::to_line(decision);
    std::FILE* const stream = is_loss && !is_json_ ? stderr : stdout;
    fmt::print(stream, "{}\n", line);
    if (std::fflush(stream) != 0) return false;
    return is_loss || !wanted_.count || --*wanted_.count > 0;
  }

 private:
  static bool is(const object& decision, const char* key, const std::optional<std::string>& wanted) {
    if (!wanted) return true;
    const auto* found = decision.if_contains(key);
    return found != nullptr && found->is_string() && found->as_string() == *wanted;
  }
  /// Nobody's but the canary's, which connects at each look at the status.
  static bool is_of_canary(const object& decision) {
    const auto* vip = decision.if_contains("vip");
    static const std::string canary = boost::asio::ip::make_address_v4(CANARY_VIP).to_string() + ":";
    return vip != nullptr && vip->is_string() && vip->as_string().starts_with(canary);
  }
  bool is_wanted(const object& decision) const {
    if (!wanted_.service && is_of_canary(decision)) return false;
    return is(decision, "service", wanted_.service) && is(decision, "backend", wanted_.backend) &&
           is(decision, "verdict", wanted_.verdict) &&
           (!wanted_.pid || decision.at("pid").to_number<std::int64_t>() == *wanted_.pid);
  }

  Wanted wanted_;
  const bool is_json_;
};

/// What is waited for may never come. `engine`: of the service that is asked for; empty when there is none.
void warn_of_service(const std::string& name, std::string_view engine) {
  if (engine.empty() && name != CANARY_NAME) {
    fmt::print(stderr, "warning: there is no service {} now; waiting for one\n", config::printable(name));
  } else if (engine == engine_name(CLUSTERIP_ENGINE_USERSPACE)) {
    fmt::print(stderr, "warning: the userspace engine carries service {}: only the fast path's decisions are traced\n",
               config::printable(name));
  }
}

std::string engine_in(const object& status, std::string_view service) {
  for (const boost::json::value& each : status.at("services").as_array())
    if (run::text(each.as_object(), "name") == service) return run::text(each.as_object(), "engine");
  return {};
}

Outcome trace_daemon(userspace::ControlClient& client, const std::optional<std::string>& service, Printer& printer) {
  if (service) {
    const auto status = client.ask({{"request", "status"}});
    if (!status) return std::unexpected(Failure{.message = status.error().message});
    const auto engine = client.understand([&] { return engine_in(*status, *service); });
    if (!engine) return std::unexpected(Failure{.message = engine.error().message});
    warn_of_service(*service, *engine);
  }
  if (auto sent = client.send({{"request", "trace"}}); !sent)
    return std::unexpected(Failure{.message = sent.error().message});
  client.wait_for_ever();
  for (bool is_first = true;; is_first = false) {
    const auto decision = client.receive();
    if (!decision) {
      return std::unexpected(Failure{.exit = decision.error().code == -EREMOTEIO ? Exit::unsupported : Exit::failed,
                                     .message = decision.error().message});
    }
    if (is_first) continue;  // it says that the service traces
    const auto goes_on = client.understand([&] { return printer.print(*decision); });
    if (!goes_on) return std::unexpected(Failure{.message = goes_on.error().message});
    if (!*goes_on) return Exit::fine;
  }
}

Outcome trace_pinned(const Plugin& plugin, const Given& given, const Places& places,
                     const std::optional<std::string>& service, Printer& printer) {
  const auto handle = open_pins(plugin, given, places);
  if (!handle) return std::unexpected(handle.error());
  if (service) {
    const auto services = see_services(plugin, handle->get());
    if (!services) return std::unexpected(services.error());
    const auto found = std::ranges::find(*services, *service, &SeenService::name);
    warn_of_service(*service, found != services->end() ? engine_name(found->engine) : "");
  }
  struct Reader {
    Printer& printer;
    std::optional<std::uint64_t> lost;
    bool goes_on = true;
  } reader{.printer = printer, .lost = {}};
  const auto visit = [](const clusterip_event* event, void* user) noexcept {
    auto& to = *static_cast<Reader*>(user);
    const std::uint64_t lost = event->lost - to.lost.value_or(event->lost);
    to.lost = event->lost;
    if (lost > 0) to.printer.print(object{{"lost", lost}});
    to.goes_on = to.goes_on && to.printer.print(run::to_json(*event));
    return 0;
  };
  auto error = sized<clusterip_error>();
  while (reader.goes_on) {
    const int fd = plugin.event_fd(handle->get(), enabled_seconds, &error);
    if (fd < 0) return std::unexpected(failure_of(error));
    pollfd events{.fd = fd, .events = POLLIN, .revents = 0};
    if (::poll(&events, 1, enabled_seconds * 1000 / 2) < 0 && errno != EINTR)
      return std::unexpected(Failure{.message = "poll failed"});
    if (plugin.read_events(handle->get(), visit, &reader, &error) < 0) return std::unexpected(failure_of(error));
  }
  plugin.event_fd(handle->get(), 0, nullptr);
  return Exit::fine;
}

Outcome run(const Plugin& plugin, const Given& given) {
  auto wanted = parse_wanted(given.options);
  if (!wanted) return std::unexpected(wanted.error());
  const std::optional<std::string> service = wanted->service;
  Printer printer(std::move(*wanted), given.options["json"].as<bool>());
  const auto places = places_of(given);
  if (!places) return std::unexpected(places.error());
  auto daemon = connect_to_daemon(*places);
  if (!daemon) return std::unexpected(daemon.error());
  return *daemon ? trace_daemon(**daemon, service, printer) : trace_pinned(plugin, given, *places, service, printer);
}

}  // namespace

const Verb trace_verb{.name = "trace",
                      .usage =
                          "[--service NAME] [--backend ADDRESS:PORT] [--pid PID] [--verdict VERDICT] [--count N] "
                          "[--config FILE | --control PATH | --pin DIR] [--json]",
                      .argument = {},
                      .summary = "show each decision of the fast path, a line each, as it is made",
                      .describe = describe,
                      .run = run,
                      .works_without_plugin = true};

}  // namespace cli
