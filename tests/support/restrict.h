// SPDX-License-Identifier: BSD-2-Clause
//
// Take rights from this process, for good: only to be called in a child.
#pragma once

#include <sys/resource.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace support {

/// A system call that fails with `error`; with `command`, only when that is its first argument.
struct Forbidden {
  long system_call;
  std::optional<std::uint32_t> command;
  int error;
};

void forbid(const std::vector<Forbidden>& calls);

/// The process is killed when it makes this call with this first argument: "ended by Bad system call".
void die_at(long system_call, std::uint32_t command);

/// No descriptor from this one on can be added to an epoll: ENOSPC, as beyond fs.epoll.max_user_watches, which is the
/// whole machine's.
void forbid_watching_from(std::uint32_t descriptor);

/// All capabilities but these, also those that a program run by root would regain. Of the bounding set, too.
void drop_capabilities_except(const std::vector<unsigned>& kept);
inline void drop_capabilities() { drop_capabilities_except({}); }

/// So many more files can be opened, beside those that are open now, while this lives.
class FewFiles {
 public:
  explicit FewFiles(unsigned more);
  ~FewFiles();
  FewFiles(const FewFiles&) = delete;
  FewFiles& operator=(const FewFiles&) = delete;

 private:
  rlimit before_{};
};

}  // namespace support
