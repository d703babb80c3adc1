// SPDX-License-Identifier: BSD-2-Clause
#include "tests/bench/compare/stage.h"

#include <fmt/format.h>
#include <linux/sched.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <exception>
#include <fstream>
#include <memory>
#include <new>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "tests/support/environment.h"

namespace bench {
namespace {

using support::checked;
using support::Fd;

/// Far more than anything on a stage takes.
constexpr std::chrono::seconds patience(180);

volatile sig_atomic_t interrupted = 0;

void write_setting(const std::string& path, const std::string& value) {
  std::ofstream file(path);
  if (!(file << value << std::flush)) throw std::runtime_error(path + " cannot be set to " + value);
}

/// Of the network namespace that this thread is in.
void set_network(const std::string& congestion_control) {
  const std::string ipv4 = "/proc/sys/net/ipv4/";
  write_setting(ipv4 + "tcp_congestion_control", congestion_control);
  // Connections end in TIME_WAIT, those of a proxy twice: leave every port above the listeners' to clients.
  write_setting(ipv4 + "ip_local_port_range", "1024 65535");
  write_setting(ipv4 + "tcp_tw_reuse", "1");
  // What was learnt of one destination would be of no use among many, and takes memory for each.
  write_setting(ipv4 + "tcp_no_metrics_save", "1");
  write_setting("/proc/sys/net/core/somaxconn", "4096");
}

/// Where this process is in the hierarchy of the first version that accounts for memory; empty when there is none.
std::string own_memory_cgroup() {
  std::string mount;
  std::ifstream mounts("/proc/self/mounts");
  for (std::string line; std::getline(mounts, line);) {
    std::istringstream fields(line);
    std::string device;
    std::string place;
    std::string type;
    std::string options;
    fields >> device >> place >> type >> options;
    if (type == "cgroup" && (',' + options + ',').contains(",memory,")) mount = place;
  }
  std::ifstream membership("/proc/self/cgroup");
  for (std::string line; !mount.empty() && std::getline(membership, line);)
    if (const auto at = line.find(":memory:"); at != std::string::npos) return mount + line.substr(at + 8);
  return {};
}

std::string memory_cgroup(const support::Cgroup& cgroup) {
  const std::string own = own_memory_cgroup();
  return own.empty() ? own : own + cgroup.path().substr(cgroup.path().rfind('/'));
}

void set_the_stage() {
  checked(::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr), "private mounts");
  checked(::mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, nullptr), "/proc");
  checked(::mount("bench", scratch, "tmpfs", MS_NOSUID | MS_NODEV, nullptr), scratch);
  checked(::mount("bpf", support::bpffs, "bpf", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=0700"), support::bpffs);
  support::raise_loopback();
}

}  // namespace

void catch_interrupts() {
  struct sigaction action{};
  action.sa_handler = [](int) { interrupted = 1; };  // without SA_RESTART: whoever waits is woken
  for (const int signal : {SIGINT, SIGTERM, SIGHUP}) ::sigaction(signal, &action, nullptr);
}

Place::Place(const std::string& congestion_control, bool veth, const support::Cgroup& cgroup) : cgroup_(cgroup) {
  set_network(congestion_control);
  if (veth) other_host_ = std::make_unique<support::OtherHost>();
  at_the_backends([&] {
    if (veth) set_network(congestion_control);
    // Each address of that network is a backend's.
    support::shell("ip route add local 10.128.0.0/10 dev lo");
  });
  // A VIP needs a way out until a rule has changed it to a backend, and the client an address in the cluster's network.
  // A proxy's VIPs are local, which comes first.
  if (!veth) support::shell("ip addr add 10.244.0.1/32 dev lo; ip route add 10.96.0.0/16 dev lo src 10.244.0.1");
}

void Place::at_the_backends(const std::function<void()>& body) const {
  if (!other_host_) return body();
  const support::OtherHost::Stay stay(*other_host_);
  body();
}

MemoryAccount::MemoryAccount(const support::Cgroup& cgroup) {
  if (const std::string file = cgroup.path() + "/memory.current"; ::access(file.c_str(), R_OK) == 0) {
    cgroup.enter();
    file_ = file;
    return;
  }
  const std::string path = memory_cgroup(cgroup);
  if (path.empty() || ::mkdir(path.c_str(), 0755) != 0) return;
  write_setting(path + "/cgroup.procs", "0");
  file_ = path + "/memory.usage_in_bytes";
}

double MemoryAccount::kib() const {
  if (file_.empty()) return not_measured;
  std::ifstream file(file_);
  double bytes = 0;
  if (!(file >> bytes)) throw std::runtime_error(file_ + " cannot be read");
  return bytes / 1024;
}

void MemoryAccount::close(const support::Cgroup& cgroup) {
  if (const std::string path = memory_cgroup(cgroup); !path.empty()) ::rmdir(path.c_str());
}

/// Written by the process on the stage, read when it has said so.
struct Stage::Note {
  Figures figures;
  char error[1024] = {};
};

Stage::Stage(const std::string& congestion_control, bool veth, const std::function<Turn(const Place&)>& set_up) {
  void* memory = ::mmap(nullptr, sizeof(Note), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
  note_ = new (memory) Note;
  int ends[2];
  checked(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), "socketpair");
  channel_ = support::Channel(Fd(ends[0]));
  support::Channel there{Fd(ends[1])};

  clone_args how{};
  how.flags = CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWNS;
  how.exit_signal = SIGCHLD;
  pid_ = static_cast<pid_t>(checked(::syscall(SYS_clone3, &how, sizeof how), "namespaces of one's own"));
  if (pid_ == 0) {
    // The first process of a PID namespace takes all others with it.
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (const int signal : {SIGINT, SIGTERM, SIGHUP}) ::signal(signal, SIG_IGN);  // its parent ends it
    channel_ = support::Channel(Fd());
    try {
      set_the_stage();
      const Place place(congestion_control, veth, cgroup_);
      const Turn take = set_up(place);
      for (there.tell('d');;) {
        there.hear();
        note_->figures = take();
        there.tell('d');
      }
    } catch (const std::exception& error) {
      std::strncpy(note_->error, error.what(), sizeof note_->error - 1);
    }
    ::_exit(0);
  }
  try {
    there = support::Channel(Fd());
    await();
  } catch (...) {
    end();
    throw;
  }
}

Stage::~Stage() { end(); }

void Stage::end() const {
  ::kill(pid_, SIGKILL);
  while (::waitpid(pid_, nullptr, 0) == -1 && errno == EINTR) {  // by the same signal once more
  }
  MemoryAccount::close(cgroup_);
  ::munmap(note_, sizeof(Note));
}

Figures Stage::turn() {
  channel_.tell('t');
  await();
  return note_->figures;
}

void Stage::await() const {
  pollfd wait{channel_.get(), POLLIN, 0};
  const auto limit = std::chrono::milliseconds(patience).count();
  const int ready = interrupted != 0 ? -1 : ::poll(&wait, 1, static_cast<int>(limit));
  if (interrupted != 0) throw Interrupted();
  if (ready <= 0) throw std::runtime_error(fmt::format("took longer than {} s", patience.count()));
  try {
    channel_.hear();
  } catch (const std::exception&) {
    throw std::runtime_error(note_->error[0] != 0 ? note_->error : "ended");
  }
}

}  // namespace bench
