// SPDX-License-Identifier: BSD-2-Clause
#include "tests/bench/proxy/peers.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <thread>

#include "tests/bench/proxy/load.h"
#include "tests/bench/proxy/stage.h"
#include "tests/support/fd.h"

namespace bench {
namespace {

using support::checked;
using Clock = std::chrono::steady_clock;

constexpr std::chrono::seconds start_limit(30);

// Each peer as Debian ships it, but for the number of threads and room for connections. Each VIP is a service of its
// own.

std::string haproxy_config(const Task& task, const std::string& options) {
  std::string text = fmt::format(
      "global\n  nbthread {}\n"
      "defaults\n  mode tcp\n  timeout connect 5s\n  timeout client 10m\n  timeout server 10m\n{}",
      task.threads, options);
  for (std::size_t i = 0; i < task.vips.size(); ++i) {
    text += fmt::format("listen bench{}\n  bind {}:{}\n  server backend {}:{}\n", i, task.vips[i], vip_port,
                        backend.address, backend.port);
  }
  return text;
}

std::string nginx_config(const Task& task) {
  std::string text = fmt::format(
      "load_module /usr/lib/nginx/modules/ngx_stream_module.so;\n"
      "daemon off;\nuser root;\nworker_processes {};\npid {}/nginx.pid;\nerror_log stderr;\n"
      "events {{ worker_connections 20000; }}\n"
      "stream {{\n",
      task.threads, scratch);
  for (const std::string& vip : task.vips) {
    text +=
        fmt::format("  server {{ listen {}:{}; proxy_pass {}:{}; }}\n", vip, vip_port, backend.address, backend.port);
  }
  return text + "}\n";
}

std::string fallback_proxy_config(const Task& task, bool local_vips) {
  std::string text = fmt::format("[userspace]\nthreads = {}\nlocal_vips = {}\n", task.threads, local_vips);
  for (std::size_t i = 0; i < task.vips.size(); ++i) {
    text += fmt::format("[[service]]\nname = \"bench{}\"\nvip = \"{}\"\nport = {}\nbackends = [ \"{}:{}\" ]\n", i,
                        task.vips[i], vip_port, backend.address, backend.port);
  }
  return text;
}

std::vector<std::string> haproxy_arguments(const std::string& file) { return {"-db", "-f", file}; }
std::vector<std::string> nginx_arguments(const std::string& file) {
  return {"-e", "stderr", "-p", scratch, "-c", file};
}
std::vector<std::string> fallback_proxy_arguments(const std::string& file) { return {"--config", file}; }

std::string read_file(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

/// Enough of a log to see what was wrong.
std::string beginning_of(const std::string& log) {
  std::string text = read_file(log).substr(0, 400);
  while (text.ends_with('\n')) text.pop_back();
  return text;
}

/// What it writes goes to `log`.
pid_t start(const Peer& peer, const std::string& config_path, const std::string& log) {
  const std::vector<std::string> strings = peer.arguments(config_path);
  std::vector<char*> arguments = {const_cast<char*>(peer.program.c_str())};
  for (const std::string& argument : strings) arguments.push_back(const_cast<char*>(argument.c_str()));
  arguments.push_back(nullptr);
  const support::Fd output(
      checked(::open(log.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0600), log));
  const pid_t pid = checked(::fork(), "fork");
  if (pid == 0) {
    ::dup2(output.get(), STDOUT_FILENO);
    ::dup2(output.get(), STDERR_FILENO);
    ::execv(peer.program.c_str(), arguments.data());
    ::_exit(127);
  }
  return pid;
}

/// TCP sockets of this network namespace that listen or are connected.
std::size_t sockets_in_use() {
  std::istringstream text(read_file("/proc/net/sockstat"));
  std::string word;
  std::size_t count = 0;
  while (text >> word && word != "TCP:") {
  }
  text >> word >> count;  // "inuse N"
  return count;
}

std::vector<pid_t> with_children(pid_t pid) {
  std::vector<pid_t> all = {pid};
  // Proxies that fork do so from their first thread.
  std::istringstream children(read_file(fmt::format("/proc/{0}/task/{0}/children", pid)));
  for (pid_t child = 0; children >> child;) {
    const std::vector<pid_t> more = with_children(child);
    all.insert(all.end(), more.begin(), more.end());
  }
  return all;
}

}  // namespace

bool Peer::takes_part(const std::string& measure) const {
  return measures.empty() || std::ranges::find(measures, measure) != measures.end();
}

std::vector<std::string> Peer::vips(std::size_t count) const {
  std::vector<std::string> all;
  for (std::size_t i = 0; i < count; ++i) all.push_back(fmt::format("{}.{}.{}", network, i / 250, 1 + i % 250));
  return all;
}

std::vector<Peer> all_peers(const std::string& fallback_proxy) {
  const auto haproxy = [](const Task& task) { return haproxy_config(task, ""); };
  const auto haproxy_splice = [](const Task& task) {
    return haproxy_config(task, "  option splice-request\n  option splice-response\n");
  };
  const auto loopback_vips = [](const Task& task) { return fallback_proxy_config(task, false); };
  const auto local_vips = [](const Task& task) { return fallback_proxy_config(task, true); };
  const std::string haproxy_program = "/usr/sbin/haproxy";
  return {
      {.name = "direct", .measures = {"bulk1", "bulk8", "short", "request"}},
      {.name = "haproxy", .program = haproxy_program, .config = haproxy, .arguments = haproxy_arguments},
      {.name = "haproxy-splice",
       .program = haproxy_program,
       .config = haproxy_splice,
       .arguments = haproxy_arguments,
       .measures = {"bulk1", "bulk8"}},
      {.name = "nginx", .program = "/usr/sbin/nginx", .config = nginx_config, .arguments = nginx_arguments},
      {.name = "fallback_proxy",
       .program = fallback_proxy,
       .config = loopback_vips,
       .arguments = fallback_proxy_arguments},
      // with VIPs that it has to make addresses of the host first
      {.name = "fallback_proxy-vips",
       .program = fallback_proxy,
       .config = local_vips,
       .arguments = fallback_proxy_arguments,
       .network = "10.96",
       .measures = {"listeners"}},
  };
}

Proxy::Proxy(const Peer& peer, const Task& task) {
  const std::string config_path = std::string(scratch) + "/config";
  const std::string log = std::string(scratch) + "/log";
  std::ofstream(config_path) << peer.config(task) << std::flush;
  const std::size_t sockets_before = sockets_in_use();

  const auto begin = Clock::now();
  pid_ = start(peer, config_path, log);
  while (sockets_in_use() < sockets_before + task.vips.size() || !answers({task.vips.front(), vip_port}) ||
         !answers({task.vips.back(), vip_port})) {
    int status = 0;
    const bool ended = ::waitpid(pid_, &status, WNOHANG) == pid_;
    if (ended) pid_ = -1;
    if (ended || Clock::now() - begin > start_limit) {
      const std::string why = ended ? "ended" : fmt::format("not ready after {} s", start_limit.count());
      if (!ended) ::kill(pid_, SIGKILL);
      throw std::runtime_error(fmt::format("{}: {}: {}", peer.program, why, beginning_of(log)));
    }
    std::this_thread::sleep_for(std::chrono::microseconds(500));
  }
  seconds_until_ready_ = std::chrono::duration<double>(Clock::now() - begin).count();
  processes_ = with_children(pid_);
}

Proxy::~Proxy() {
  for (const pid_t pid : processes_) ::kill(pid, SIGKILL);
  if (pid_ > 0) ::waitpid(pid_, nullptr, 0);
}

double Proxy::cpu_seconds() const {
  double sum = 0;
  for (const pid_t pid : processes_) {
    clockid_t clock{};
    timespec time{};
    if (::clock_getcpuclockid(pid, &clock) != 0 || ::clock_gettime(clock, &time) != 0)
      throw std::runtime_error(fmt::format("process {} of the proxy has ended", pid));
    sum += static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) / 1e9;
  }
  return sum;
}

double Proxy::memory(const std::string& kind) const {
  double sum = 0;
  for (const pid_t pid : processes_) {
    std::ifstream file(fmt::format("/proc/{}/smaps_rollup", pid));
    bool found = false;
    for (std::string line; !found && std::getline(file, line);) {
      if (!line.starts_with(kind + ":")) continue;
      sum += std::stod(line.substr(kind.size() + 1));
      found = true;
    }
    if (!found) throw std::runtime_error(fmt::format("no {} of process {}", kind, pid));
  }
  return sum;
}

}  // namespace bench
