// SPDX-License-Identifier: BSD-2-Clause
//
// fallback_proxy: the userspace engine alone. See docs/fallback_proxy.md.
#include <fmt/format.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <boost/asio/io_context.hpp>
#include <boost/asio/signal_set.hpp>
#include <boost/program_options.hpp>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <string>

#include "config/printable.h"
#include "config/read_config.h"
#include "fallback_proxy/local_vips.h"
#include "fallback_proxy/proxy.h"

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
  auto config = config::read_config(*text, config::Carrier::userspace);
  if (config) return std::move(*config);
  for (const config::Mistake& mistake : config.error()) spdlog::error("{}", config::render(mistake, *text, file));
  return {};
}

class Program {
 public:
  Program(std::string file, config::Config config)
      : file_(std::move(file)), signals_(control_, SIGHUP, SIGTERM, SIGINT), proxy_(control_, config) {
    apply(std::move(config));
    wait_for_signal();
  }

  void run() { control_.run(); }

 private:
  void apply(config::Config config) {
    for (const std::string& problem : proxy_.apply(std::move(config))) spdlog::warn("{}", problem);
    spdlog::info("serving {} services", proxy_.services());
  }

  void wait_for_signal() {
    signals_.async_wait([this](const boost::system::error_code& error, int signal) {
      if (error) return;
      signal == SIGHUP ? reload() : end();
      wait_for_signal();
    });
  }

  void reload() {
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
  Proxy proxy_;
  bool is_ending_ = false;
};

int clean_up() {
  auto vips = LocalVips::open();
  if (!vips) {
    spdlog::error("{}", vips.error().message);
    return unsupported;
  }
  const auto removed = vips->reconcile({});
  if (!removed) {
    spdlog::error("{}", removed.error().message);
    return failed;
  }
  return fine;
}

int run(int argc, char** argv) {
  po::options_description options("Options", 100);
  options.add_options()("config", po::value<std::string>()->value_name("FILE"), "the configuration")(
      "cleanup", "remove the local routes that a killed proxy has left, and exit")("help", "show this text")(
      "version", "show the version");
  po::variables_map given;
  try {
    po::store(po::command_line_parser(argc, argv)
                  .options(options)
                  .style(po::command_line_style::unix_style & ~po::command_line_style::allow_guessing)
                  .run(),
              given);
  } catch (const po::error& error) {
    fmt::print(stderr, "fallback_proxy: {} (see fallback_proxy --help)\n", error.what());
    return usage;
  }
  if (given.contains("help")) {
    fmt::print("Usage: fallback_proxy --config FILE\n\nServes the VIPs of FILE by a proxy in user space.\n\n");
    std::cout << options
              << "\nSIGHUP reads FILE again. SIGTERM drains and ends; a second one ends at once.\n"
                 "Exit: 0 fine, 1 failed, 2 usage, 3 configuration, 4 these privileges cannot.\n";
    return fine;
  }
  if (given.contains("version")) {
    fmt::print("fallback_proxy {}\n", CLUSTERIP_VERSION);
    return fine;
  }
  if (given.contains("cleanup")) return clean_up();
  if (!given.contains("config")) {
    fmt::print(stderr, "fallback_proxy: --config is missing (see fallback_proxy --help)\n");
    return usage;
  }
  const auto file = given["config"].as<std::string>();
  auto config = read(file);
  if (!config) return configuration;
  std::signal(SIGPIPE, SIG_IGN);  // splice() into a closed connection has no MSG_NOSIGNAL
  Program(file, std::move(*config)).run();
  spdlog::info("ended");
  return fine;
}

}  // namespace
}  // namespace userspace

int main(int argc, char** argv) {
  try {
    spdlog::set_default_logger(spdlog::stderr_logger_st("fallback_proxy"));
    spdlog::set_pattern("%Y-%m-%dT%H:%M:%S.%e %l: %v");
    return userspace::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "fallback_proxy: %s\n", error.what());
    return userspace::failed;
  }
}
