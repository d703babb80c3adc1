// SPDX-License-Identifier: BSD-2-Clause
#include "tests/support/fallback_proxy.h"

#include <fmt/format.h>
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>
#include <sstream>
#include <utility>

#include "tests/support/fd.h"

namespace support {
namespace {

std::shared_ptr<const FallbackProxy::Files> files_with(const std::string& text) {
  auto files = std::make_shared<FallbackProxy::Files>();
  files->write(text);
  return files;
}

std::vector<std::string> command(const FallbackProxy::Files& files, const std::vector<std::string>& more_arguments) {
  std::vector<std::string> words = {CLUSTERIP_FALLBACK_PROXY, "--config", files.config()};
  words.insert(words.end(), more_arguments.begin(), more_arguments.end());
  return words;
}

std::vector<std::string> run_command(const FallbackProxy::Files& files,
                                     const std::vector<std::string>& more_arguments) {
  std::vector<std::string> words = {CLUSTERIP_COMMAND, "run", "--config", files.config()};
  if (std::ranges::find(more_arguments, "--plugin") == more_arguments.end())
    words.insert(words.end(), {"--plugin", CLUSTERIP_PLUGIN_PATH});
  words.insert(words.end(), more_arguments.begin(), more_arguments.end());
  return words;
}

}  // namespace

void FallbackProxy::Files::write(const std::string& text) const {
  directory_.write("clusterip.toml", fmt::format("[engine]\ncontrol = \"{}\"\n{}\n{}", control(), engine_, text));
}

FallbackProxy::FallbackProxy(const std::string& text, const std::function<void()>& prepare)
    : FallbackProxy(files_with(text), prepare) {}

FallbackProxy::FallbackProxy(const std::shared_ptr<const Files>& files, const std::function<void()>& prepare,
                             const std::vector<std::string>& more_arguments)
    : FallbackProxy(files, command(*files, more_arguments), prepare) {}

FallbackProxy::FallbackProxy(std::shared_ptr<const Files> files, const std::vector<std::string>& command,
                             const std::function<void()>& prepare)
    : files_(std::move(files)), process_(command, nullptr, prepare) {
  wait_for_log("serving ");
}

RunningService::RunningService(const std::shared_ptr<const Files>& files,
                               const std::vector<std::string>& more_arguments, const std::function<void()>& prepare)
    : FallbackProxy(files, run_command(*files, more_arguments), prepare) {}

std::string FallbackProxy::reload(const std::string& text) {
  files_->write(text);
  signal(SIGHUP);
  return wait_for_log("serving");  // "serving 3 services", or "... is not valid: ... goes on serving"
}

void FallbackProxy::signal(int number) const { checked(::kill(pid(), number), "kill"); }

Finished FallbackProxy::terminate() {
  signal(SIGTERM);
  return wait();
}

void FallbackProxy::kill() {
  signal(SIGKILL);
  wait();
}

void FallbackProxy::leave_descriptors(std::optional<std::size_t> more) const {
  rlimit limit{};
  checked(::prlimit(pid(), RLIMIT_NOFILE, nullptr, &limit), "prlimit");
  limit.rlim_cur = limit.rlim_max;
  if (more) {
    // The limit is one of numbers, and among the numbers in use are gaps.
    std::set<rlim_t> used;
    for (const auto& file : std::filesystem::directory_iterator(fmt::format("/proc/{}/fd", pid())))
      used.insert(std::stoul(file.path().filename()));
    limit.rlim_cur = 0;
    for (std::size_t free = 0; free < *more || used.contains(limit.rlim_cur); ++limit.rlim_cur)
      free += !used.contains(limit.rlim_cur);
  }
  checked(::prlimit(pid(), RLIMIT_NOFILE, &limit, nullptr), "prlimit");
}

std::size_t FallbackProxy::open_files() const {
  std::filesystem::directory_iterator files(fmt::format("/proc/{}/fd", pid()));
  return static_cast<std::size_t>(std::distance(begin(files), end(files)));
}

std::size_t FallbackProxy::resident_bytes() const {
  std::istringstream statm(read_text(fmt::format("/proc/{}/statm", pid())));
  std::size_t size = 0;
  std::size_t resident = 0;
  statm >> size >> resident;
  return resident * static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
}

std::chrono::milliseconds FallbackProxy::cpu_time() const {
  // proc(5): the name ends with the last ')'; utime and stime are the 14th and 15th field, in ticks.
  const std::string stat = read_text(fmt::format("/proc/{}/stat", pid()));
  std::istringstream fields(stat.substr(stat.rfind(')') + 1));
  std::string ignored;
  for (int field = 3; field < 14; ++field) fields >> ignored;
  long user = 0;
  long system = 0;
  fields >> user >> system;
  return std::chrono::milliseconds((user + system) * 1000 / ::sysconf(_SC_CLK_TCK));
}

}  // namespace support
