// SPDX-License-Identifier: BSD-2-Clause
//
// fallback_proxy: the userspace engine alone. See docs/fallback_proxy.md.
#include <fmt/format.h>
#include <malloc.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <boost/asio/io_context.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <boost/asio/signal_set.hpp>
#include <boost/program_options.hpp>
#include <boost/system/system_error.hpp>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "config/fail.h"
#include "config/printable.h"
#include "config/read_config.h"
#include "config/values.h"
#include "fallback_proxy/control_client.h"
#include "fallback_proxy/control_server.h"
#include "fallback_proxy/control_socket.h"
#include "fallback_proxy/hand_over.h"
#include "fallback_proxy/local_vips.h"
#include "fallback_proxy/proxy.h"
#include "fallback_proxy/show_status.h"

namespace userspace {
namespace {

namespace po = boost::program_options;

enum Exit : int { fine = 0, failed = 1, usage = 2, configuration = 3, unsupported = 4 };

/// Logs every mistake, as compilers show them; nothing when the file is good.
std::optional<config::Config> read(const std::string& file) {
  const auto text = config::read_file(file);
  if (!text) {
    spdlog::error("{}", text.error().message);
    return {};
  }
  auto config = config::read_config(*text);
  if (config) return std::move(*config);
  for (const config::Mistake& mistake : config.error()) spdlog::error("{}", config::render(mistake, *text, file));
  return {};
}

class Program {
 public:
  Program(std::string file, const config::Config& config)
      : file_(std::move(file)),
        signals_(control_, SIGHUP, SIGTERM, SIGINT),
        predecessor_(control_),
        proxy_(control_, config) {}

  /// Serves, in place of the process at the control socket `path` if there is one and `take_over`. An error: nothing
  /// has changed for that process.
  config::Result<void> start(config::Config config, const std::string& path, bool take_over) {
    std::optional<ControlClient> predecessor;
    if (take_over) {
      auto found = ControlClient::connect(path);
      if (!found) return std::unexpected(found.error());
      predecessor = std::move(*found);
    }
    auto socket = predecessor ? inherit(*predecessor) : listen_control(path);
    if (!socket && (predecessor || socket.error().code == -EADDRINUSE)) return std::unexpected(socket.error());
    if (!socket) spdlog::warn("no status and no upgrade: {}", socket.error().message);
    apply(std::move(config));
    if (predecessor) {
      auto replaced = replace(*predecessor);
      if (!replaced) return replaced;
      adopt_control(socket->get());
    }
    if (socket) serve_control(std::move(*socket), path);
    wait_for_signal();
    return {};
  }

  void run() { control_.run(); }

 private:
  /// Returns the control socket.
  config::Result<config::Fd> inherit(ControlClient& predecessor) {
    auto inheritance = take_over(predecessor);
    if (!inheritance) return std::unexpected(inheritance.error());
    spdlog::info("taking over from pid {} (version {}): {} sockets", predecessor.pid(),
                 config::printable(inheritance->version), inheritance->sockets.size());
    proxy_.inherit(std::move(inheritance->sockets), std::move(inheritance->vips));
    return std::move(inheritance->control);
  }

  config::Result<void> replace(ControlClient& predecessor) {
    const auto is_replaced = say_ready(predecessor);
    if (!is_replaced) return std::unexpected(is_replaced.error());
    if (*is_replaced)
      spdlog::info("pid {} has handed over, and drains", predecessor.pid());
    else
      spdlog::warn("pid {} has died while it handed over", predecessor.pid());
    // All that comes is the end of the connection, with the end of the process.
    predecessor_.assign(boost::asio::local::stream_protocol(), predecessor.release().release());
    predecessor_.async_wait(predecessor_.wait_read,
                            [this, pid = predecessor.pid()](const boost::system::error_code& error) {
                              if (error) return;
                              spdlog::info("pid {}, which this process has replaced, has ended", pid);
                              predecessor_.close();
                              proxy_.predecessor_has_ended();
                            });
    return {};
  }

  void serve_control(config::Fd socket, const std::string& path) {
    server_.emplace(control_, std::move(socket), path,
                    ControlHandlers{.status = [this] { return proxy_.status(); },
                                    .begin_hand_over = [this] { return begin_hand_over(); },
                                    .end_hand_over = [this](bool is_taken) { end_hand_over(is_taken); }});
  }

  config::Result<Offer> begin_hand_over() {
    if (is_ending_) return config::fail(-EBUSY, "it is ending");
    if (is_handing_over_) return config::fail(-EBUSY, "another process is taking over from it");
    is_handing_over_ = true;
    proxy_.begin_hand_over();
    return Offer{.sockets = proxy_.sockets(), .vips = proxy_.vips()};
  }

  void end_hand_over(bool is_taken) {
    is_handing_over_ = false;
    if (is_taken) {
      is_ending_ = true;
      proxy_.drain([this] { control_.stop(); });
      spdlog::info("replaced; {} connections to drain", proxy_.connections());
    } else {
      spdlog::warn("the process that was to take over has not: this one goes on serving");
      proxy_.cancel_hand_over();
    }
    for (const int signal : std::exchange(held_signals_, {})) act_on(signal);
  }

  void apply(config::Config config) {
    for (const std::string& problem : proxy_.apply(std::move(config))) spdlog::warn("{}", problem);
    if (proxy_.serving() == proxy_.services())
      spdlog::info("serving {} services", proxy_.services());
    else
      spdlog::warn("serving {} of {} services", proxy_.serving(), proxy_.services());
    // The parser's tree is several times as large as what serves, and stays in the heap otherwise.
    ::malloc_trim(0);
  }

  void wait_for_signal() {
    signals_.async_wait([this](const boost::system::error_code& error, int signal) {
      if (error) return;
      act_on(signal);
      wait_for_signal();
    });
  }

  void act_on(int signal) {
    // Nothing that is being handed over may change. It takes a minute at most.
    if (is_handing_over_) return held_signals_.push_back(signal);
    signal == SIGHUP ? reload() : end();
  }

  void reload() {
    if (is_ending_) return spdlog::warn("{} is not read again: this process is ending", file_);
    auto config = read(file_);
    if (config)
      apply(std::move(*config));
    else
      spdlog::error("{} is not valid: the configuration that serves goes on serving", file_);
  }

  void end() {
    if (is_ending_) {
      spdlog::warn("ending at once; {} connections are reset", proxy_.connections());
      control_.stop();
      return;
    }
    is_ending_ = true;
    spdlog::info("accepting nothing more; {} connections to drain", proxy_.connections());
    proxy_.drain([this] { control_.stop(); });
  }

  const std::string file_;
  boost::asio::io_context control_;
  boost::asio::signal_set signals_;
  std::vector<int> held_signals_;
  boost::asio::local::stream_protocol::socket predecessor_;
  std::optional<ControlServer> server_;  // its end tells a successor that all connections have ended: after the proxy's
  Proxy proxy_;
  bool is_handing_over_ = false;
  bool is_ending_ = false;
};

int serve(const std::string& file, const std::optional<std::string>& control, bool take_over) {
  auto config = read(file);
  if (!config) return configuration;
  std::signal(SIGPIPE, SIG_IGN);  // splice() into a closed connection has no MSG_NOSIGNAL
  std::optional<Program> program(std::in_place, file, *config);
  const std::string path = control.value_or(config->engine.control);
  if (const auto started = program->start(std::move(*config), path, take_over); !started) {
    spdlog::error("{}", started.error().message);
    return failed;
  }
  program->run();
  program.reset();
  spdlog::info("ended");
  return fine;
}

int status(const std::string& control, bool json) {
  const auto shown = show_status(control, json);
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
      const auto config = read(given["config"].as<std::string>());
      if (!config) return configuration;
      control = config->engine.control;
    }
    return status(control.value_or(config::Engine().control), given["json"].as<bool>());
  }
  if (!given.contains("config")) {
    fmt::print(stderr, "fallback_proxy: --config is missing (see fallback_proxy --help)\n");
    return usage;
  }
  return serve(given["config"].as<std::string>(), control, given["take-over"].as<bool>());
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
    spdlog::set_default_logger(spdlog::stderr_logger_st("fallback_proxy"));
    spdlog::set_pattern("%Y-%m-%dT%H:%M:%S.%e %l: %v");
    return userspace::finish(userspace::run(argc, argv));
  } catch (const boost::system::system_error& error) {
    return userspace::fail(error, error.code().value());
  } catch (const std::system_error& error) {
    return userspace::fail(error, error.code().value());
  } catch (const std::exception& error) {
    return userspace::fail(error, 0);
  }
}
