// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "plugin/cgroup.h"
#include "plugin/fd.h"
#include "plugin/hooks.h"
#include "plugin/system_error.h"

namespace plugin {

/// One program attached to a cgroup: by a bpf_link, or where the kernel has none for cgroups (before Linux 5.7) by
/// BPF_PROG_ATTACH. Both leave what others have attached in place and running. Destroying this does not detach what is
/// pinned, or attached without a link: detach() does.
class HookAttachment {
 public:
  /// Takes its own descriptors of the cgroup and the program.
  static Result<HookAttachment> attach(Hook hook, const Cgroup& cgroup, const Fd& program, bool use_link);

  /// `program`: the one that the link runs.
  static HookAttachment from_link(Hook hook, Fd link, Fd program);
  static Result<HookAttachment> from_program(Hook hook, const Cgroup& cgroup, const Fd& program);

  /// Exchanges the program in place: every system call meets the old one or the new one. Returns the old one.
  Result<Fd> replace(Fd program);

  Result<void> detach();

  const Fd& link() const { return link_; }  // empty without bpf_link

  /// The cgroup that the link is attached to; 0 when that cgroup is gone (and the link does nothing any more).
  Result<std::uint64_t> cgroup_id() const;

  /// The id of the program that is attached.
  Result<std::uint32_t> program_id() const;

 private:
  explicit HookAttachment(Hook hook) : hook_(hook) {}
  bpf_attach_type attach_type() const { return info_of(hook_).attach_type; }
  std::string name() const { return info_of(hook_).program; }

  Hook hook_;
  Fd link_;
  Fd cgroup_;
  Fd program_;
};

/// All programs of one fast path, each at its hook of one cgroup.
class Attachment {
 public:
  /// Called with each new link, before anything relies on it: to pin it.
  using LinkMade = std::function<Result<void>(Hook hook, const Fd& link)>;

  /// Makes `programs` the ones that run: exchanges those that are attached and adds the others. What is missing is
  /// added first, then connect4 becomes the new one, then the rest: so whether the change has happened is told by
  /// connect4 alone, and whoever finds it half done knows what is left. On failure, what was attached is as it was.
  Result<void> switch_to(const Cgroup& cgroup, const PerHook<Fd>& programs, bool use_link, const LinkMade& made);

  /// Everything, connect4 last.
  Result<void> detach();

  /// Takes over what is attached already.
  void add(Hook hook, HookAttachment attachment) { hooks_[index_of(hook)].emplace(std::move(attachment)); }

  bool is_attached() const { return at(Hook::connect4).has_value(); }
  bool has_link() const { return is_attached() && at(Hook::connect4)->link(); }
  Hooks hooks() const;
  const std::optional<HookAttachment>& at(Hook hook) const { return hooks_[index_of(hook)]; }

  /// The cgroup of connect4.
  Result<std::uint64_t> cgroup_id() const { return at(Hook::connect4)->cgroup_id(); }

  /// Forgets links that somebody has detached, or that ended with their cgroup; without connect4, all.
  Result<void> drop_dead();

 private:
  PerHook<std::optional<HookAttachment>> hooks_;
};

Result<std::uint32_t> program_id_of(const Fd& program);

}  // namespace plugin
