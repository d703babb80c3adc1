// SPDX-License-Identifier: BSD-2-Clause
#include "tests/support/other_host.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sched.h>
#include <unistd.h>

#include <stdexcept>

namespace support {
namespace {

Fd network_namespace() {
  return Fd(checked(::open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC), "network namespace"));
}

void enter(const Fd& network_namespace) { checked(::setns(network_namespace.get(), CLONE_NEWNET), "setns"); }

}  // namespace

void shell(const std::string& line) {
  const Finished finished = run({"sh", "-ec", line});
  if (finished.exit_code != 0) throw std::runtime_error(line + ": " + finished.err);
}

OtherHost::OtherHost() : here_(network_namespace()) {
  checked(::unshare(CLONE_NEWNET), "unshare");
  there_ = network_namespace();
  const Stay stay(*this);
  // Without the detection of duplicate addresses, which takes a second.
  shell(
      "ip link set lo up; ip link add cable1 type veth peer name cable0 netns " +
      fmt::format("/proc/{}/fd/{}", ::getpid(), here_.get()) +
      "; for last in 2 3; do ip addr add 10.244.0.$last/24 dev cable1; ip addr add fd00:244::$last/64 dev cable1 nodad;"
      " done; ip link set cable1 up");
  enter(here_);
  shell(
      "ip addr add 10.244.0.1/24 dev cable0; ip addr add fd00:244::1/64 dev cable0 nodad; ip link set cable0 up;"
      "ip route add default via 10.244.0.2; ip route add default via fd00:244::2");
}

OtherHost::~OtherHost() { run({"ip", "link", "del", "cable0"}); }

Process OtherHost::start(const std::vector<std::string>& command) const {
  return Process(command, nullptr, [this] { enter(there_); });
}

OtherHost::Stay::Stay(const OtherHost& host) : host_(host) { enter(host_.there_); }

OtherHost::Stay::~Stay() { ::setns(host_.here_.get(), CLONE_NEWNET); }

}  // namespace support
