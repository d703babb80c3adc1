// SPDX-License-Identifier: BSD-2-Clause
#include <fmt/format.h>
#include <poll.h>

#include <algorithm>
#include <boost/json.hpp>
#include <cerrno>
#include <cstdio>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "cli/endpoint.h"
#include "cli/pinned.h"
#include "cli/verbs.h"
#include "config/config.h"
#include "fallback_proxy/control_client.h"
#include "run/decisions.h"

namespace cli {

namespace {

namespace po = boost::program_options;
using boost::json::object;

// The kernel writes events for so long after each call; a call is made after half of it.
constexpr std::uint32_t enabled_seconds = 10;

void describe(po::options_description_easy_init add) {
  add("service", po::value<std::string>()->value_name("NAME"), "only decisions about this service");
  add("backend", po::value<std::string>()->value_name("ADDRESS:PORT"), "only those that chose this backend");
  add("pid", po::value<std::uint64_t>()->value_name("PID"), "only those of this process");
  add("verdict", po::value<std::string>()->value_name("VERDICT"),
      "only rewritten, no_backend, no_service, pass, contended or ejected");
  add("count", po::value<std::uint64_t>()->value_name("N"), "end after so many");
  add("control", po::value<std::string>()->default_value(config::Engine().control)->value_name("PATH"),
      "the control socket of the running service");
  add("pin", po::value<std::string>()->value_name("DIR"),
      "read what is pinned there instead; so it is without a running service, too");
  add("json", po::bool_switch(), "print a JSON object a line");
}

/// What is wanted of the decisions, and how it is shown.
class Printer {
 public:
  explicit Printer(const po::variables_map& options)
      : is_json_(options["json"].as<bool>()),
        service_(text(options, "service")),
        backend_(text(options, "backend")),
        verdict_(text(options, "verdict")) {
    if (options.contains("pid")) pid_ = options["pid"].as<std::uint64_t>();
    if (options.contains("count")) left_ = options["count"].as<std::uint64_t>();
  }

  /// False when it was the last one, or nobody reads the output any more.
  bool print(const object& decision) {
    if (left_ == 0) return false;
    const bool is_loss = decision.contains("lost");
    if (!is_loss && !is_wanted(decision)) return true;
    const std::string line = is_json_ ? serialize(decision) : run::to_line(decision);
    std::FILE* const stream = is_loss && !is_json_ ? stderr : stdout;
    fmt::print(stream, "{}\n", line);
    if (std::fflush(stream) != 0) return false;
    return is_loss || !left_ || --*left_ > 0;
  }

 private:
  static std::optional<std::string> text(const po::variables_map& options, const char* name) {
    if (!options.contains(name)) return {};
    return options[name].as<std::string>();
  }
  static bool is(const object& decision, const char* key, const std::optional<std::string>& wanted) {
    if (!wanted) return true;
    const auto* found = decision.if_contains(key);
    return found != nullptr && found->is_string() && found->as_string() == *wanted;
  }
  bool is_wanted(const object& decision) const {
    return is(decision, "service", service_) && is(decision, "backend", backend_) &&
           is(decision, "verdict", verdict_) && (!pid_ || decision.at("pid").to_number<std::uint64_t>() == *pid_);
  }

  const bool is_json_;
  const std::optional<std::string> service_, backend_, verdict_;
  std::optional<std::uint64_t> pid_;
  std::optional<std::uint64_t> left_;
};

Outcome trace_service(userspace::ControlClient& client, Printer& printer) {
  if (auto sent = client.send({{"request", "trace"}}); !sent)
    return std::unexpected(Failure{.message = sent.error().message});
  client.wait_for_ever();
  for (bool is_first = true;; is_first = false) {
    const auto decision = client.receive();
    if (!decision) {
      return std::unexpected(Failure{.exit = decision.error().code == -EREMOTEIO ? Exit::unsupported : Exit::failed,
                                     .message = decision.error().message});
    }
    if (!is_first && !printer.print(*decision)) return Exit::fine;
  }
}

Outcome trace_pinned(const Plugin& plugin, const std::string& pin, Printer& printer) {
  const auto handle = open_pinned(plugin, pin);
  if (!handle) return std::unexpected(handle.error());
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
  static constexpr std::string_view verdicts[] = {"rewritten", "no_backend", "no_service",
                                                  "pass",      "contended",  "ejected"};
  if (given.options.contains("verdict") &&
      std::ranges::find(verdicts, given.options["verdict"].as<std::string>()) == std::end(verdicts)) {
    return std::unexpected(Failure{
        .exit = Exit::usage,
        .message =
            fmt::format("trace: --verdict: expected rewritten, no_backend, no_service, pass, contended or ejected, "
                        "got '{}'",
                        given.options["verdict"].as<std::string>())});
  }
  Printer printer(given.options);
  if (!given.options.contains("pin")) {
    auto client = userspace::ControlClient::connect(given.options["control"].as<std::string>());
    if (!client)
      return std::unexpected(Failure{.exit = exit_for(client.error().code), .message = client.error().message});
    if (*client) return trace_service(**client, printer);
    if (!given.options["control"].defaulted()) return std::unexpected(nobody_listens(given));
  }
  if (!plugin.library) return std::unexpected(Failure{.message = given.plugin_problem});
  const std::string pin = given.options.contains("pin") ? given.options["pin"].as<std::string>() : default_pin();
  return trace_pinned(plugin, pin, printer);
}

}  // namespace

const Verb trace_verb{.name = "trace",
                      .usage =
                          "[--service NAME] [--backend ADDRESS:PORT] [--pid PID] [--verdict VERDICT] [--count N] "
                          "[--control PATH | --pin DIR] [--json]",
                      .argument = {},
                      .summary = "show each decision of the fast path, a line each, as it is made",
                      .describe = describe,
                      .run = run,
                      .works_without_plugin = true};

}  // namespace cli
