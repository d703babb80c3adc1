// SPDX-License-Identifier: BSD-2-Clause
#include "plugin/attachment.h"

#include <bpf/bpf.h>
#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <utility>

namespace plugin {

namespace {

constexpr bpf_attach_type hook = BPF_CGROUP_INET4_CONNECT;

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

}  // namespace

Result<std::uint32_t> program_id_of(const Fd& program) {
  bpf_prog_info info{};
  std::uint32_t length = sizeof info;
  if (bpf_obj_get_info_by_fd(program.get(), &info, &length) != 0) {
    return fail_errno(errno, "asking about the program");
  }
  return info.id;
}

Result<Attachment> Attachment::attach(const Cgroup& cgroup, const Fd& program, bool use_link) {
  if (use_link) {
    Fd link(bpf_link_create(program.get(), cgroup.fd.get(), hook, nullptr));
    if (!link) {
      const int error = errno;
      return fail_errno(
          error, "attaching to " + cgroup.path +
                     (error == EPERM ? " (a program of somebody else may be attached without BPF_F_ALLOW_MULTI)" : ""));
    }
    return from_link(std::move(link));
  }
  if (bpf_prog_attach(program.get(), cgroup.fd.get(), hook, BPF_F_ALLOW_MULTI) != 0) {
    const int error = errno;
    return fail_errno(
        error, "attaching to " + cgroup.path +
                   (error == EPERM ? " (a program of somebody else may be attached without BPF_F_ALLOW_MULTI)" : ""));
  }
  auto attachment = from_program(cgroup, program);
  if (!attachment) {
    bpf_prog_detach2(program.get(), cgroup.fd.get(), hook);
  }
  return attachment;
}

Attachment Attachment::from_link(Fd link) {
  Attachment attachment;
  attachment.link_ = std::move(link);
  return attachment;
}

Result<Attachment> Attachment::from_program(const Cgroup& cgroup, const Fd& program) {
  auto cgroup_fd = duplicate(cgroup.fd);
  auto program_fd = duplicate(program);
  if (!cgroup_fd || !program_fd) {
    return std::unexpected(cgroup_fd ? program_fd.error() : cgroup_fd.error());
  }
  Attachment attachment;
  attachment.cgroup_ = std::move(*cgroup_fd);
  attachment.program_ = std::move(*program_fd);
  return attachment;
}

Result<void> Attachment::replace(const Fd& program) {
  if (link_) {
    if (bpf_link_update(link_.get(), program.get(), nullptr) != 0) {
      return fail_errno(errno, "exchanging the program");
    }
    return {};
  }
  auto copy = duplicate(program);
  if (!copy) {
    return std::unexpected(copy.error());
  }
  LIBBPF_OPTS(bpf_prog_attach_opts, options, .flags = BPF_F_ALLOW_MULTI | BPF_F_REPLACE,
              .replace_prog_fd = program_.get());
  if (bpf_prog_attach_opts(program.get(), cgroup_.get(), hook, &options) != 0) {
    // Before Linux 5.6 there is no BPF_F_REPLACE. For a moment both run: the second finds no VIP in what the first has
    // rewritten, and lets it pass.
    if (bpf_prog_attach(program.get(), cgroup_.get(), hook, BPF_F_ALLOW_MULTI) != 0) {
      return fail_errno(errno, "exchanging the program");
    }
    bpf_prog_detach2(program_.get(), cgroup_.get(), hook);
  }
  program_ = std::move(*copy);
  return {};
}

Result<void> Attachment::detach() {
  if (link_) {
    // Closing the last descriptor detaches as well, but somebody may hold another one. Before Linux 5.9 that is all.
    if (bpf_link_detach(link_.get()) != 0 && errno != EINVAL && errno != EOPNOTSUPP) {
      return fail_errno(errno, "detaching");
    }
    link_.reset();
    return {};
  }
  if (bpf_prog_detach2(program_.get(), cgroup_.get(), hook) != 0 && errno != ENOENT) {
    return fail_errno(errno, "detaching");
  }
  return {};
}

Result<std::uint64_t> Attachment::cgroup_id() const {
  auto info = info_of(link_);
  if (!info) {
    return std::unexpected(info.error());
  }
  return info->cgroup.cgroup_id;
}

Result<std::uint32_t> Attachment::program_id() const {
  if (!link_) {
    return program_id_of(program_);
  }
  auto info = info_of(link_);
  if (!info) {
    return std::unexpected(info.error());
  }
  return info->prog_id;
}

}  // namespace plugin
