// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "plugin/cgroup.h"
#include "plugin/fd.h"
#include "plugin/system_error.h"

namespace plugin {

/// sock4_connect attached to a cgroup: by a bpf_link, or where the kernel has none for cgroups (before Linux 5.7) by
/// BPF_PROG_ATTACH. Both leave what others have attached in place and running. Destroying this does not detach what is
/// pinned, or attached without a link: detach() does.
class Attachment {
 public:
  /// Takes its own descriptors of the cgroup and the program.
  static Result<Attachment> attach(const Cgroup& cgroup, const Fd& program, bool use_link);

  static Attachment from_link(Fd link);
  static Result<Attachment> from_program(const Cgroup& cgroup, const Fd& program);

  /// Exchanges the program in place: every connect() meets the old one or the new one.
  Result<void> replace(const Fd& program);

  Result<void> detach();

  const Fd& link() const { return link_; }  // empty without bpf_link

  /// The cgroup that the link is attached to; 0 when that cgroup is gone (and the link does nothing any more).
  Result<std::uint64_t> cgroup_id() const;

  /// The id of the program that is attached.
  Result<std::uint32_t> program_id() const;

 private:
  Fd link_;
  Fd cgroup_;
  Fd program_;
};

Result<std::uint32_t> program_id_of(const Fd& program);

}  // namespace plugin
