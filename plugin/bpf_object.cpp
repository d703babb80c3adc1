// SPDX-License-Identifier: BSD-2-Clause
#include "plugin/bpf_object.h"

#include <bpf/bpf.h>
#include <bpf/btf.h>
#include <bpf/libbpf.h>
#include <clusterip.skel.h>
#include <fcntl.h>

#include <cerrno>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace plugin {

namespace {

struct Destroy {
  void operator()(clusterip_bpf* skeleton) const { clusterip_bpf__destroy(skeleton); }
};
using Skeleton = std::unique_ptr<clusterip_bpf, Destroy>;

/// `log` receives what the verifier says when it refuses; it must outlive the skeleton.
Result<Skeleton> open_skeleton(std::span<char> log) {
  LIBBPF_OPTS(bpf_object_open_opts, options, .kernel_log_buf = log.data(), .kernel_log_size = log.size());
  Skeleton skeleton(clusterip_bpf__open_opts(&options));
  if (!skeleton) {
    return fail_errno(errno, "opening the compiled-in BPF object");
  }
  return skeleton;
}

/// The last line of a verifier log that says something: the reason stands there, before the statistics.
std::string reason_in(std::string_view log) {
  std::string_view reason;
  while (!log.empty()) {
    const auto end = log.find('\n');
    const auto line = log.substr(0, end);
    if (!line.empty() && !line.starts_with("processed ")) {
      reason = line;
    }
    log = end == std::string_view::npos ? std::string_view{} : log.substr(end + 1);
  }
  return std::string(reason);
}

}  // namespace

Result<Fd> create_map(const MapSize& size) {
  auto skeleton = open_skeleton({});
  if (!skeleton) {
    return std::unexpected(skeleton.error());
  }
  // Types for people who look with bpftool, and for the kernel where a map has a lock in it. A kernel that does not
  // take them makes the other maps without.
  std::uint32_t btf_size = 0;
  const void* btf_data = btf__raw_data(bpf_object__btf((*skeleton)->obj), &btf_size);
  const Fd btf(btf_data != nullptr ? bpf_btf_load(btf_data, btf_size, nullptr) : -1);

  const bpf_map* map = bpf_object__find_map_by_name((*skeleton)->obj, size.name);
  if (map == nullptr) {
    return fail(-ENOTRECOVERABLE,
                std::string("the BPF object has no map ") + size.name + ": this is a bug of clusterip");
  }
  LIBBPF_OPTS(bpf_map_create_opts, options, .map_flags = bpf_map__map_flags(map));
  if (btf && bpf_map__btf_value_type_id(map) != 0) {
    options.btf_fd = static_cast<std::uint32_t>(btf.get());
    options.btf_key_type_id = bpf_map__btf_key_type_id(map);
    options.btf_value_type_id = bpf_map__btf_value_type_id(map);
  }
  Fd fd(bpf_map_create(bpf_map__type(map), size.name, bpf_map__key_size(map), bpf_map__value_size(map),
                       size.max_entries, &options));
  if (!fd) {
    const int error = errno;
    if (size.is_optional && error == EINVAL) {
      return Fd();
    }
    return fail_errno(error, "creating " + std::string(size.name) + " for " + std::to_string(size.max_entries) +
                                 " entries" +
                                 (error == EPERM ? " (before Linux 5.11, RLIMIT_MEMLOCK limits BPF maps)" : ""));
  }
  return fd;
}

Result<PerHook<Fd>> load_programs(Hooks hooks, std::span<const char* const> names, std::span<const Fd> maps,
                                  const ProgramConstants& constants) {
  std::vector<char> log(std::size_t{64} * 1024);
  auto skeleton = open_skeleton(log);
  if (!skeleton) {
    return std::unexpected(skeleton.error());
  }
  auto& rodata = *(*skeleton)->rodata;
  rodata.can_set_errno = constants.can_set_errno;
  rodata.can_mark = constants.can_mark;
  rodata.can_netns_cookie = constants.can_netns_cookie;
  rodata.can_cgroup_id = constants.can_cgroup_id;
  rodata.can_events = constants.can_events;
  rodata.can_comm = constants.can_comm;
  rodata.has_udp = constants.has_udp;
  rodata.has_sessions = constants.has_sessions;
  rodata.has_sock_ops = constants.has_sock_ops;
  rodata.has_eject = constants.has_eject;
  rodata.filter_mask = constants.filter_mask;
  rodata.stats_shard_mask = constants.stats_shard_mask;
  rodata.stats_per_shard = constants.stats_per_shard;
  rodata.stats_backends = constants.stats_backends;
  rodata.draw_seed = constants.draw_seed;

  for (std::size_t i = 0; i < names.size(); ++i) {
    bpf_map* map = bpf_object__find_map_by_name((*skeleton)->obj, names[i]);
    const int error = map == nullptr ? -ENOENT
                      : maps[i]      ? bpf_map__reuse_fd(map, maps[i].get())
                                     : bpf_map__set_autocreate(map, false);
    if (error != 0) {
      return fail_errno(-error, std::string("using ") + names[i]);
    }
  }
  for (const HookInfo& info : all_hooks) {
    if (!hooks.contains(info.hook)) {
      bpf_program__set_autoload(bpf_object__find_program_by_name((*skeleton)->obj, info.program), false);
    }
  }
  if (const int error = clusterip_bpf__load(skeleton->get()); error != 0) {
    const std::string reason = reason_in(log.data());
    // libbpf asks the kernel what it can do, takes any failure for a no, and asks only once in a process.
    if (reason.ends_with("is referenced but wasn't created")) {
      return fail(
          -ENOMEM,
          "loading the programs: libbpf was refused something when it tried this kernel, as happens for want of "
          "memory, and does not ask again: start this process anew");
    }
    // It has looked at a program again for the reason of a refusal; but there is none, and the log is full of praise.
    if (error == -ENOSPC) {
      return fail(-EAGAIN, "loading the programs: the kernel had no memory for one of them, or was interrupted");
    }
    if (error == -EINVAL || error == -EACCES || error == -E2BIG) {
      return fail(-ENOTRECOVERABLE, "the verifier refused a program, which is a bug of clusterip: " + reason);
    }
    return fail_errno(-error, "loading the programs");
  }
  PerHook<Fd> programs;
  for (const HookInfo& info : all_hooks) {
    if (!hooks.contains(info.hook)) {
      continue;
    }
    const bpf_program* program = bpf_object__find_program_by_name((*skeleton)->obj, info.program);
    programs[index_of(info.hook)] = Fd(fcntl(bpf_program__fd(program), F_DUPFD_CLOEXEC, 0));
    if (!programs[index_of(info.hook)]) {
      return fail_errno(errno, std::string("keeping ") + info.program);
    }
  }
  return programs;
}

}  // namespace plugin
