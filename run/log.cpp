// SPDX-License-Identifier: BSD-2-Clause
#include "run/log.h"

#include <fmt/format.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/sinks/systemd_sink.h>
#include <spdlog/spdlog.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>

namespace run {
namespace {

/// JOURNAL_STREAM names the socket that systemd connected stderr to (systemd.exec(5)); a shell below passes it on with
/// another stderr.
bool is_stderr_journal() {
  const char* stream = std::getenv("JOURNAL_STREAM");
  struct stat status{};
  return stream != nullptr && ::fstat(STDERR_FILENO, &status) == 0 &&
         fmt::format("{}:{}", status.st_dev, status.st_ino) == stream;
}

}  // namespace

bool start_log(const std::string& name, std::string_view level) {
  struct Level {
    std::string_view name;
    spdlog::level::level_enum value;
  };
  static constexpr Level levels[] = {{"debug", spdlog::level::debug},
                                     {"info", spdlog::level::info},
                                     {"warning", spdlog::level::warn},
                                     {"error", spdlog::level::err}};
  if (is_stderr_journal()) {
    spdlog::set_default_logger(spdlog::systemd_logger_st(name, name));
    spdlog::set_pattern("%v");
  } else {
    spdlog::set_default_logger(spdlog::stderr_logger_st(name));
    spdlog::set_pattern("%Y-%m-%dT%H:%M:%S.%e %l: %v");
  }
  for (const Level& each : levels) {
    if (each.name != level) continue;
    spdlog::set_level(each.value);
    return true;
  }
  return false;
}

}  // namespace run
