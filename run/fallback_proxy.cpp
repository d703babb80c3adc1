// SPDX-License-Identifier: BSD-2-Clause
//
// fallback_proxy: the userspace engine alone. See docs/fallback_proxy.md.
#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include <boost/program_options.hpp>
#include <boost/system/system_error.hpp>
#include <cerrno>
#include <cstdio>
#include <exception>
#include <iostream>
#include <new>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "config/fail.h"
#include "config/values.h"
#include "fallback_proxy/local_vips.h"
#include "run/log.h"
#include "run/program.h"
#include "run/show_status.h"

namespace userspace {
namespace {

namespace po = boost::program_options;

enum Exit : int { fine = 0, failed = 1, usage = 2, configuration = 3, unsupported = 4 };

int serve(const run::Settings& settings) {
  const auto served = run::serve(settings, nullptr, "");
  if (served) return std::to_underlying(*served);
  spdlog::error("{}", served.error().message);
  return std::to_underlying(served.error().exit);
}

int status(const std::string& control, bool json) {
  const auto shown = run::show_status(control, json);
  if (!shown) {
    fmt::print(stderr, "fallback_proxy: {}\n", shown.error().message);
    return failed;
  }
  fmt::print("{}", *shown);
  return fine;
}

int clean_up() {
  auto vips = LocalVips::open();
  if (!vips) {
    spdlog::error("{}", vips.error().message);
    return failed;
  }
  if (!vips->warning().empty()) {
    // It may be another user's proxy, and these its routes.
    spdlog::error("{}; nothing is removed", vips->warning());
    return failed;
  }
  const auto removed = vips->reconcile({});
  if (!removed) {
    spdlog::error("{}", removed.error().message);
    return removed.error().code == -EPERM ? unsupported : failed;
  }
  for (const auto& failure : *removed) spdlog::error("vip {}: {}", failure.vip.to_string(), failure.reason);
  return removed->empty() ? fine : failed;
}

int run(int argc, char** argv) {
  po::options_description options("Options", 100);
  options.add_options()("config", po::value<std::string>()->value_name("FILE"), "the configuration")(
      "control", po::value<std::string>()->value_name("PATH"), "the control socket, instead of the configuration's")(
      "take-over", po::bool_switch(), "replace the proxy that serves, without a refused or reset connection")(
      "status", po::bool_switch(), "show what the proxy at the control socket serves, and exit")(
      "json", po::bool_switch(), "show the status as JSON")(
      "cleanup", "remove the local routes that a killed proxy has left, and exit")("help", "show this text")(
      "version", "show the version");
  po::variables_map given;
  try {
    const auto parsed = po::command_line_parser(argc, argv)
                            .options(options)
                            .style(po::command_line_style::unix_style & ~po::command_line_style::allow_guessing)
                            .run();
    po::store(parsed, given);
    if (const auto words = po::collect_unrecognized(parsed.options, po::include_positional); !words.empty()) {
      fmt::print(stderr, "fallback_proxy: unexpected argument '{}' (see fallback_proxy --help)\n", words.front());
      return usage;
    }
    if (given.contains("cleanup") + given["status"].as<bool>() + given["take-over"].as<bool>() > 1) {
      fmt::print(stderr, "fallback_proxy: one of --cleanup, --status and --take-over at a time\n");
      return usage;
    }
  } catch (const po::error& error) {
    fmt::print(stderr, "fallback_proxy: {} (see fallback_proxy --help)\n", error.what());
    return usage;
  }
  if (given.contains("help")) {
    fmt::print(
        "Usage: fallback_proxy --config FILE [--control PATH] [--take-over]\n"
        "       fallback_proxy --status [--config FILE | --control PATH] [--json]\n"
        "       fallback_proxy --cleanup\n\n"
        "Serves the VIPs of FILE by a proxy in user space.\n\n");
    std::cout << options
              << "\nSIGHUP reads FILE again. SIGTERM drains and ends; a second one ends at once.\n"
                 "Exit: 0 fine, 1 failed, 2 usage, 3 configuration, 4 these privileges cannot.\n";
    return fine;
  }
  if (given.contains("version")) {
    fmt::print("fallback_proxy {}\n", CLUSTERIP_VERSION);
    return fine;
  }
  // What an unset shell variable leaves.
  if (given.contains("config") && given["config"].as<std::string>().empty()) {
    fmt::print(stderr, "fallback_proxy: --config is empty: expected the path of a file\n");
    return usage;
  }
  if (given.contains("cleanup")) return clean_up();
  std::optional<std::string> control;
  if (given.contains("control")) control = given["control"].as<std::string>();
  if (control && !config::parse_path(*control, config::max_socket_path)) {
    fmt::print(stderr, "fallback_proxy: --control: expected {}\n",
               config::parse_path(*control, config::max_socket_path).error());
    return usage;
  }
  if (given["status"].as<bool>()) {
    if (!control && given.contains("config")) {
      auto path = run::control_path(given["config"].as<std::string>());
      if (!path) return configuration;
      control = std::move(*path);
    }
    return status(control.value_or(config::Engine().control), given["json"].as<bool>());
  }
  if (!given.contains("config")) {
    fmt::print(stderr, "fallback_proxy: --config is missing (see fallback_proxy --help)\n");
    return usage;
  }
  return serve({.program = "fallback_proxy",
                .file = given["config"].as<std::string>(),
                .engine = config::EngineMode::userspace,
                .control = control,
                .take_over = given["take-over"].as<bool>(),
                .follow_cluster = nullptr});
}

/// A full disk or a closed pipe must not look like success.
int finish(int code) {
  std::cout.flush();
  if (std::fflush(stdout) == 0 && std::ferror(stdout) == 0 && std::cout) return code;
  fmt::print(stderr, "fallback_proxy: {}\n", config::fail_errno(errno, "standard output").error().message);
  return failed;
}

int fail(const std::exception& error, int code) {
  const bool is_limit = code == EMFILE || code == ENFILE;
  std::fprintf(stderr, "fallback_proxy: %s%s\n", error.what(),
               is_limit ? ": allow more file descriptors (LimitNOFILE=, ulimit -n)" : "");
  return failed;
}

}  // namespace
}  // namespace userspace

int main(int argc, char** argv) {
  try {
    run::start_log("fallback_proxy", "info");
    return userspace::finish(userspace::run(argc, argv));
  } catch (const boost::system::system_error& error) {
    return userspace::fail(error, error.code().value());
  } catch (const std::system_error& error) {
    return userspace::fail(error, error.code().value());
  } catch (const std::bad_alloc&) {
    std::fputs("fallback_proxy: not enough memory\n", stderr);
    return userspace::failed;
  } catch (const std::exception& error) {
    return userspace::fail(error, 0);
  }
}
