// SPDX-License-Identifier: BSD-2-Clause
#include "tests/bench/compare/peers.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <sstream>
#include <stdexcept>
#include <thread>

#include "plugin/include/clusterip.h"
#include "tests/bench/compare/kube_proxy.h"
#include "tests/bench/compare/load.h"
#include "tests/support/environment.h"
#include "tests/support/observe.h"

namespace bench {
namespace {

using support::checked;
using Clock = std::chrono::steady_clock;

constexpr std::chrono::seconds start_limit(30);
constexpr const char* nginx_stream = "/usr/lib/nginx/modules/ngx_stream_module.so";

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

std::string in_scratch(const std::string& name) { return std::string(scratch) + "/" + name; }

void write_file(const std::string& path, const std::string& text) {
  std::ofstream file(path);
  if (!(file << text << std::flush)) throw std::runtime_error(path + " cannot be written");
}

void make_vips_local() { support::shell("ip route add local 10.96.0.0/16 dev lo"); }

// --- configurations -------------------------------------------------------------------------------------------------
//
// Each peer as Debian ships it, but for the number of threads and room for connections.

std::string haproxy_config(const Task& task, const std::string& options) {
  std::string text = fmt::format(
      "global\n  nbthread {}\n"
      "defaults\n  mode tcp\n  timeout connect 5s\n  timeout client 10m\n  timeout server 10m\n{}",
      task.threads, options);
  for (std::uint32_t i = 0; i < task.services; ++i) {
    text += fmt::format("listen bench{}\n  bind {}:{}\n", i, dotted(vip(i)), vip_port);
    for (std::uint32_t k = 0; k < task.backends; ++k)
      text += fmt::format("  server backend{} {}:{}\n", k, dotted(backend(i * task.backends + k)), backend_port);
  }
  return text;
}

std::string nginx_config(const Task& task) {
  std::string text = fmt::format(
      "load_module {};\n"
      "daemon off;\nuser root;\nworker_processes {};\npid {}/nginx.pid;\nerror_log stderr;\n"
      "events {{ worker_connections 20000; }}\n"
      "stream {{\n",
      nginx_stream, task.threads, scratch);
  for (std::uint32_t i = 0; i < task.services; ++i) {
    text += fmt::format("  upstream bench{} {{ random;", i);
    for (std::uint32_t k = 0; k < task.backends; ++k)
      text += fmt::format(" server {}:{};", dotted(backend(i * task.backends + k)), backend_port);
    text += fmt::format(" }}\n  server {{ listen {}:{}{}; proxy_pass bench{}; }}\n", dotted(vip(i)), vip_port,
                        task.udp ? " udp" : "", i);
  }
  return text + "}\n";
}

/// `instead` stands where the last backend of `changed` would.
struct Change {
  std::uint32_t changed = 0;
  std::uint32_t instead = 0;
};

std::string clusterip_config(const Task& task, const std::string& tables, const Change* change = nullptr) {
  std::string text = fmt::format("{}[limits]\nservices = {}\nbackends = {}\n", tables, std::max(task.services, 256U),
                                 std::max(task.services * task.backends, 4096U));
  for (std::uint32_t i = 0; i < task.services; ++i) {
    text += fmt::format("[[service]]\nname = \"bench{}\"\nvip = \"{}\"\nport = {}\nprotocol = \"{}\"\nbackends = [", i,
                        dotted(vip(i)), vip_port, task.protocol());
    for (std::uint32_t k = 0; k < task.backends; ++k) {
      const bool other = change != nullptr && change->changed == i && k + 1 == task.backends;
      text += fmt::format("{}\"{}:{}\"", k > 0 ? ", " : "",
                          dotted(backend(other ? change->instead : i * task.backends + k)), backend_port);
    }
    text += "]\n";
  }
  return text;
}

std::string userspace_config(const Task& task) {
  return clusterip_config(
      task, fmt::format("[engine]\ncontrol = \"{}/control.sock\"\n[userspace]\nthreads = {}\n", scratch, task.threads));
}

std::string fast_path_config(const Task& task, bool peer_names, const Change* change = nullptr) {
  return clusterip_config(task, fmt::format("[engine]\npeer_names = {}\n", peer_names), change);
}

// --- programs -------------------------------------------------------------------------------------------------------

/// Enough of a log to see what was wrong.
std::string beginning_of(const std::string& log) {
  std::string text = support::read_text(log).substr(0, 400);
  while (text.ends_with('\n')) text.pop_back();
  return text;
}

/// What it writes goes to `log`.
pid_t start(const std::vector<std::string>& command, const std::string& log) {
  std::vector<char*> arguments;
  for (const std::string& argument : command) arguments.push_back(const_cast<char*>(argument.c_str()));
  arguments.push_back(nullptr);
  const support::Fd output(
      checked(::open(log.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0600), log));
  const pid_t pid = checked(::fork(), "fork");
  if (pid == 0) {
    ::dup2(output.get(), STDOUT_FILENO);
    ::dup2(output.get(), STDERR_FILENO);
    ::execv(arguments[0], arguments.data());
    ::_exit(127);
  }
  return pid;
}

std::string job_log() { return in_scratch("job.log"); }

double in_seconds(const timeval& time) {
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) / 1e6;
}

/// Blocks until it has ended, and measures it.
Job run_job(const std::vector<std::string>& command) {
  const std::string log = job_log();
  const auto begin = Clock::now();
  const pid_t pid = start(command, log);
  int status = 0;
  rusage usage{};
  checked(::wait4(pid, &status, 0, &usage), "wait4");
  const double seconds = seconds_since(begin);
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
    throw std::runtime_error(fmt::format("{}: {}", command[0], beginning_of(log)));
  return {.seconds = seconds,
          .cpu_seconds = in_seconds(usage.ru_utime) + in_seconds(usage.ru_stime),
          .peak_mib = static_cast<double>(usage.ru_maxrss) / 1024};
}

/// TCP sockets of this network namespace that listen or are connected.
std::size_t sockets_in_use() {
  std::istringstream text(support::read_text("/proc/net/sockstat"));
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
  std::istringstream children(support::read_text(fmt::format("/proc/{0}/task/{0}/children", pid)));
  for (pid_t child = 0; children >> child;) {
    const std::vector<pid_t> more = with_children(child);
    all.insert(all.end(), more.begin(), more.end());
  }
  return all;
}

/// Processes through which every byte passes.
class Proxy : public Running {
 public:
  /// Throws when it ends before it is ready, with what it wrote.
  Proxy(const std::vector<std::string>& command, const Task& task) {
    const std::string log = in_scratch("log");
    const std::size_t sockets_before = sockets_in_use();
    const std::size_t listeners = task.udp ? 0 : task.services;
    const auto begin = Clock::now();
    pid_ = start(command, log);
    while (sockets_in_use() < sockets_before + listeners || !task.answered(vip_endpoint(0)) ||
           !task.answered(vip_endpoint(task.services - 1))) {
      int status = 0;
      const bool ended = ::waitpid(pid_, &status, WNOHANG) == pid_;
      if (ended || Clock::now() - begin > start_limit) {
        const std::string why = ended ? "ended" : fmt::format("not ready after {} s", start_limit.count());
        if (!ended) ::kill(pid_, SIGKILL);
        throw std::runtime_error(fmt::format("{}: {}: {}", command[0], why, beginning_of(log)));
      }
      std::this_thread::sleep_for(std::chrono::microseconds(500));
    }
    seconds_until_ready_ = seconds_since(begin);
    processes_ = with_children(pid_);
  }
  ~Proxy() override {
    for (const pid_t pid : processes_) ::kill(pid, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
  }

  double cpu_seconds() const override {
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

  double memory(const std::string& kind) const override {
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

 private:
  pid_t pid_ = -1;
  std::vector<pid_t> processes_;  // with its children
};

// --- in the kernel --------------------------------------------------------------------------------------------------

void check(int result, const clusterip_error& error) {
  if (result < 0) throw std::runtime_error(error.message);
}

/// What the kernel says that the maps take to which this process has descriptors.
double maps_mib() {
  std::map<std::string, double> bytes;  // by id: several descriptors may lead to one
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fdinfo")) {
    std::ifstream file(entry.path());
    std::string key;
    std::string value;
    std::string memory;
    while (file >> key >> value) {
      if (key == "memlock:") memory = value;
      if (key == "map_id:" && !memory.empty()) bytes[value] = std::stod(memory);
    }
  }
  double sum = 0;
  for (const auto& [id, of_one] : bytes) sum += of_one;
  return sum / (1 << 20);
}

/// Used as a host uses it, through the C ABI.
class FastPath : public Running {
 public:
  FastPath(const Place& place, const Task& task, bool peer_names) : task_(task), peer_names_(peer_names) {
    const std::string text = fast_path_config(task, peer_names);
    const clusterip_options options{sizeof options, place.cgroup().path().c_str(), nullptr, 0, 0};
    const auto begin = Clock::now();
    check(clusterip_open(&options, &handle_, &error_), error_);
    check(clusterip_load_text(handle_, text.data(), text.size(), "bench", &error_), error_);
    check(clusterip_attach(handle_, &error_), error_);
    seconds_until_ready_ = seconds_since(begin);
  }
  ~FastPath() override { clusterip_close(handle_); }

  void replace_backend(std::uint32_t service, std::uint32_t number) override {
    const std::string address = dotted(backend(number));
    const clusterip_backend backend{sizeof backend, address.c_str(), backend_port, 0, 1, CLUSTERIP_ACTIVE};
    check(clusterip_set_backends(handle_, fmt::format("bench{}", service).c_str(), &backend, 1, &error_), error_);
  }

  Job reload(std::uint32_t service, std::uint32_t number) override {
    const Change change{.changed = service, .instead = number};
    const std::string text = fast_path_config(task_, peer_names_, &change);
    const auto cpu_seconds = [] {
      rusage usage{};
      ::getrusage(RUSAGE_SELF, &usage);
      return in_seconds(usage.ru_utime) + in_seconds(usage.ru_stime);
    };
    const double cpu_before = cpu_seconds();
    const auto begin = Clock::now();
    check(clusterip_load_text(handle_, text.data(), text.size(), "bench", &error_), error_);
    const double seconds = seconds_since(begin);
    return {.seconds = seconds, .cpu_seconds = cpu_seconds() - cpu_before};
  }

 private:
  const Task task_;
  const bool peer_names_;
  clusterip* handle_ = nullptr;
  clusterip_error error_{
      .size = sizeof(clusterip_error), .code = 0, .line = 0, .column = 0, .reserved = 0, .message = {}};
};

/// Rules as kube-proxy writes them, given to the program that it gives them to.
class KubeProxy : public Running {
 public:
  KubeProxy(const kube_proxy::Mode& mode, const Task& task) : mode_(mode), task_(task) {
    const std::string file = in_scratch("rules");
    write_file(file, mode_.all(task));
    const auto begin = Clock::now();
    run_job({mode_.program, mode_.whole, file});
    seconds_until_ready_ = seconds_since(begin);
    current_.resize(task.services);
    for (std::uint32_t i = 0; i < task.services; ++i) current_[i] = i * task.backends;
  }

  void replace_backend(std::uint32_t service, std::uint32_t number) override {
    const std::string file = in_scratch("change");
    write_file(file, mode_.change(task_, service, current_[service], number));
    std::vector<std::string> command = {mode_.program};
    command.insert(command.end(), mode_.part.begin(), mode_.part.end());
    command.push_back(file);
    run_job(command);
    current_[service] = number;
  }

 private:
  const kube_proxy::Mode& mode_;
  const Task task_;
  std::vector<std::uint32_t> current_;  // the backend of each service
};

// --- peers ----------------------------------------------------------------------------------------------------------

Peer fast_path(const std::string& name, bool peer_names) {
  const auto start = [peer_names](const Place& place, const Task& task) {
    return std::make_unique<FastPath>(place, task, peer_names);
  };
  const auto start_up = [peer_names](const Place& place, const Task& task) {
    const std::string file = in_scratch("clusterip.toml");
    write_file(file, fast_path_config(task, peer_names));
    Job job = run_job({"/proc/self/exe", host_command, file, place.cgroup().path()});
    job.maps_mib = std::stod(support::read_text(job_log()));
    return job;
  };
  return {.name = name, .start = start, .start_up = start_up, .replaces = true, .reloads = true};
}

Peer proxied(const std::string& name, const std::vector<std::string>& command,
             const std::function<std::string(const Task&)>& config) {
  const auto start = [command, config](const Place&, const Task& task) {
    // fallback_proxy makes its VIPs local itself.
    if (command[0] != CLUSTERIP_FALLBACK_PROXY) make_vips_local();
    write_file(in_scratch("config"), config(task));
    return std::make_unique<Proxy>(command, task);
  };
  return {.name = name, .needs = {command[0]}, .start = start, .most_services = 10000, .proxy = true};
}

Peer in_netfilter(const std::string& name, const kube_proxy::Mode& mode) {
  const auto start = [&mode](const Place&, const Task& task) { return std::make_unique<KubeProxy>(mode, task); };
  const auto start_up = [&mode](const Place&, const Task& task) {
    const std::string file = in_scratch("rules");
    write_file(file, mode.all(task));
    return run_job({mode.program, mode.whole, file});
  };
  return {.name = name, .needs = {mode.program}, .start = start, .start_up = start_up, .replaces = true};
}

}  // namespace

std::string dotted(std::uint32_t address) {
  return fmt::format("{}.{}.{}.{}", address >> 24, address >> 16 & 255, address >> 8 & 255, address & 255);
}

std::uint32_t vip(std::uint32_t service) { return 0x0a600001 + service; }    // 10.96.0.1 and up
std::uint32_t backend(std::uint32_t number) { return 0x0a800001 + number; }  // 10.128.0.1 and up
sockaddr_in vip_endpoint(std::uint32_t service) { return endpoint(vip(service), vip_port); }
sockaddr_in backend_endpoint(std::uint32_t number) { return endpoint(backend(number), backend_port); }

void serve_as_host(const char* file, const char* cgroup) {
  clusterip_error error{
      .size = sizeof(clusterip_error), .code = 0, .line = 0, .column = 0, .reserved = 0, .message = {}};
  const clusterip_options options{sizeof options, cgroup, nullptr, 0, 0};
  clusterip* handle = nullptr;
  check(clusterip_open(&options, &handle, &error), error);
  check(clusterip_load_file(handle, file, &error), error);
  check(clusterip_attach(handle, &error), error);  // the kernel takes it away with the process
  fmt::print("{}\n", maps_mib());
}

void Running::replace_backend(std::uint32_t, std::uint32_t) { throw std::logic_error("it cannot"); }
Job Running::reload(std::uint32_t, std::uint32_t) { throw std::logic_error("it cannot"); }

std::vector<Peer> all_peers() {
  const std::string file = in_scratch("config");
  const std::string haproxy_program = "/usr/sbin/haproxy";
  std::vector<Peer> peers = {
      {.name = "direct"},
      fast_path("bpf", false),
      fast_path("bpf-names", true),
      in_netfilter("nftables", kube_proxy::nftables),
      in_netfilter("iptables", kube_proxy::iptables),
      proxied("userspace", {CLUSTERIP_FALLBACK_PROXY, "--config", file}, userspace_config),
      proxied("haproxy", {haproxy_program, "-db", "-f", file},
              [](const Task& task) { return haproxy_config(task, ""); }),
      proxied(
          "haproxy-splice", {haproxy_program, "-db", "-f", file},
          [](const Task& task) { return haproxy_config(task, "  option splice-request\n  option splice-response\n"); }),
      proxied("nginx", {"/usr/sbin/nginx", "-e", "stderr", "-p", scratch, "-c", file}, nginx_config),
  };
  for (Peer& peer : peers) {
    // What 50,000 of them would take is no time to wait for: nft needs the square of their number, or more.
    if (peer.name.ends_with("tables")) peer.most_services = peer.most_backends = 10000;
    if (peer.name == "nginx") peer.needs.push_back(nginx_stream);
    if (peer.name.starts_with("haproxy")) peer.udp = false;
    if (peer.name == "haproxy-splice") peer.measures = {"bulk1", "bulk8"};
  }
  return peers;
}

}  // namespace bench
