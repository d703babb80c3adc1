// SPDX-License-Identifier: BSD-2-Clause
#include "plugin/attachment.h"

#include <bpf/bpf.h>
#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <utility>
#include <vector>

namespace plugin {

namespace {

Result<Fd> duplicate(const Fd& fd) {
  Fd copy(fcntl(fd.get(), F_DUPFD_CLOEXEC, 0));
  if (!copy) {
    return fail_errno(errno, "duplicating a descriptor");
  }
  return copy;
}

Result<bpf_link_info> info_of(const Fd& link) {
  bpf_link_info info{};
  std::uint32_t length = sizeof info;
  if (bpf_obj_get_info_by_fd(link.get(), &info, &length) != 0) {
    return fail_errno(errno, "asking about the link");
  }
  return info;
}

std::unexpected<Error> not_attached(Hook hook, const Cgroup& cgroup, int error) {
  return fail_errno(
      error, std::string("attaching ") + info_of(hook).program + " to " + cgroup.path +
                 (error == EPERM ? " (a program of somebody else may be attached without BPF_F_ALLOW_MULTI)" : ""));
}

}  // namespace

Result<std::uint32_t> program_id_of(const Fd& program) {
  bpf_prog_info info{};
  std::uint32_t length = sizeof info;
  if (bpf_obj_get_info_by_fd(program.get(), &info, &length) != 0) {
    return fail_errno(errno, "asking about the program");
  }
  return info.id;
}

Result<HookAttachment> HookAttachment::attach(Hook hook, const Cgroup& cgroup, const Fd& program, bool use_link) {
  const bpf_attach_type type = info_of(hook).attach_type;
  if (use_link) {
    Fd link(bpf_link_create(program.get(), cgroup.fd.get(), type, nullptr));
    if (!link) {
      return not_attached(hook, cgroup, errno);
    }
    auto copy = duplicate(program);
    if (!copy) {
      return std::unexpected(copy.error());
    }
    return from_link(hook, std::move(link), std::move(*copy));
  }
  if (bpf_prog_attach(program.get(), cgroup.fd.get(), type, BPF_F_ALLOW_MULTI) != 0) {
    return not_attached(hook, cgroup, errno);
  }
  auto attachment = from_program(hook, cgroup, program);
  if (!attachment) {
    bpf_prog_detach2(program.get(), cgroup.fd.get(), type);
  }
  return attachment;
}

HookAttachment HookAttachment::from_link(Hook hook, Fd link, Fd program) {
  HookAttachment attachment(hook);
  attachment.link_ = std::move(link);
  attachment.program_ = std::move(program);
  return attachment;
}

Result<HookAttachment> HookAttachment::from_program(Hook hook, const Cgroup& cgroup, const Fd& program) {
  auto cgroup_fd = duplicate(cgroup.fd);
  auto program_fd = duplicate(program);
  if (!cgroup_fd || !program_fd) {
    return std::unexpected(cgroup_fd ? program_fd.error() : cgroup_fd.error());
  }
  HookAttachment attachment(hook);
  attachment.cgroup_ = std::move(*cgroup_fd);
  attachment.program_ = std::move(*program_fd);
  return attachment;
}

Result<Fd> HookAttachment::replace(Fd program) {
  if (link_) {
    if (bpf_link_update(link_.get(), program.get(), nullptr) != 0) {
      return fail_errno(errno, "exchanging " + name());
    }
    return std::exchange(program_, std::move(program));
  }
  LIBBPF_OPTS(bpf_prog_attach_opts, options, .flags = BPF_F_ALLOW_MULTI | BPF_F_REPLACE,
              .replace_prog_fd = program_.get());
  if (bpf_prog_attach_opts(program.get(), cgroup_.get(), attach_type(), &options) != 0) {
    // Before Linux 5.6 there is no BPF_F_REPLACE. For a moment both run: the second finds no VIP in what the first has
    // rewritten, and lets it pass.
    if (bpf_prog_attach(program.get(), cgroup_.get(), attach_type(), BPF_F_ALLOW_MULTI) != 0) {
      return fail_errno(errno, "exchanging " + name());
    }
    bpf_prog_detach2(program_.get(), cgroup_.get(), attach_type());
  }
  return std::exchange(program_, std::move(program));
}

Result<void> HookAttachment::detach() {
  if (link_) {
    // Closing the last descriptor detaches as well, but somebody may hold another one. Before Linux 5.9 that is all.
    if (bpf_link_detach(link_.get()) != 0 && errno != EINVAL && errno != EOPNOTSUPP) {
      return fail_errno(errno, "detaching " + name());
    }
    link_.reset();
    return {};
  }
  if (bpf_prog_detach2(program_.get(), cgroup_.get(), attach_type()) != 0 && errno != ENOENT) {
    return fail_errno(errno, "detaching " + name());
  }
  return {};
}

Result<std::uint64_t> HookAttachment::cgroup_id() const {
  auto info = info_of(link_);
  if (!info) {
    return std::unexpected(info.error());
  }
  return info->cgroup.cgroup_id;
}

Result<std::uint32_t> HookAttachment::program_id() const {
  if (!link_) {
    return program_id_of(program_);
  }
  auto info = info_of(link_);
  if (!info) {
    return std::unexpected(info.error());
  }
  return info->prog_id;
}

Hooks Attachment::hooks() const {
  Hooks attached;
  for (const HookInfo& info : all_hooks) {
    if (at(info.hook)) {
      attached.insert(info.hook);
    }
  }
  return attached;
}

Result<void> Attachment::switch_to(const Cgroup& cgroup, const PerHook<Fd>& programs, bool use_link,
                                   const LinkMade& made) {
  Hooks added;
  const auto attach = [&](Hook hook) -> Result<void> {
    auto attached = HookAttachment::attach(hook, cgroup, programs[index_of(hook)], use_link);
    if (!attached) {
      return std::unexpected(attached.error());
    }
    add(hook, std::move(*attached));
    added.insert(hook);
    return at(hook)->link() ? made(hook, at(hook)->link()) : Result<void>{};
  };
  const auto undo = [&](Error error) {
    for (const HookInfo& info : all_hooks) {
      if (added.contains(info.hook)) {
        (void)hooks_[index_of(info.hook)]->detach();
        hooks_[index_of(info.hook)].reset();
      }
    }
    return std::unexpected(std::move(error));
  };

  const Hooks before = hooks();
  for (const HookInfo& info : all_hooks) {
    if (info.hook == Hook::connect4 || !programs[index_of(info.hook)] || before.contains(info.hook)) {
      continue;
    }
    if (auto attached = attach(info.hook); !attached) {
      return undo(attached.error());
    }
  }
  // Descriptors and memory first: between the exchanges nothing else may fail.
  std::vector<std::pair<Hook, Fd>> fresh;
  for (const HookInfo& info : all_hooks) {
    if (!programs[index_of(info.hook)] || !before.contains(info.hook)) {
      continue;
    }
    auto copy = duplicate(programs[index_of(info.hook)]);
    if (!copy) {
      return undo(copy.error());
    }
    fresh.emplace_back(info.hook, std::move(*copy));
  }
  if (const auto first = std::ranges::find(fresh, Hook::connect4, &std::pair<Hook, Fd>::first); first != fresh.end()) {
    std::rotate(fresh.begin(), first, first + 1);
  }
  if (!is_attached()) {
    if (auto attached = attach(Hook::connect4); !attached) {
      return undo(attached.error());
    }
  }
  // What ran before, to go back to: connect4 last, since it tells a process that finds this half done where to go on.
  std::vector<std::pair<Hook, Fd>> old;
  old.reserve(fresh.size());
  for (auto& [hook, program] : fresh) {
    auto replaced = hooks_[index_of(hook)]->replace(std::move(program));
    if (replaced) {
      old.emplace_back(hook, std::move(*replaced));
      continue;
    }
    for (; !old.empty(); old.pop_back()) {
      if (auto back = hooks_[index_of(old.back().first)]->replace(std::move(old.back().second)); !back) {
        replaced.error().message += "; and what ran before could not be put back: " + back.error().message;
      }
    }
    return undo(replaced.error());
  }
  return {};
}

Result<void> Attachment::detach() {
  for (auto hook = all_hooks.rbegin(); hook != all_hooks.rend(); ++hook) {
    auto& attachment = hooks_[index_of(hook->hook)];
    if (!attachment) {
      continue;
    }
    if (auto detached = attachment->detach(); !detached) {
      return detached;
    }
    attachment.reset();
  }
  return {};
}

Result<void> Attachment::drop_dead() {
  for (auto& attachment : hooks_) {
    if (!attachment || !attachment->link()) {
      continue;
    }
    const auto id = attachment->cgroup_id();
    if (!id) {
      return std::unexpected(id.error());
    }
    if (*id == 0) {
      attachment.reset();
    }
  }
  return is_attached() ? Result<void>{} : detach();
}

}  // namespace plugin
