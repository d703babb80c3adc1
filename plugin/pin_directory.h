// SPDX-License-Identifier: BSD-2-Clause
//
// The directory on a BPF filesystem that keeps the fast path alive without a process:
//
//   Service_Map, ... , Meta_Map   the maps
//   sock4_connect, ...            the programs
//   sock4_connect_link, ...       how they are attached (none where the kernel has no bpf_link)
//   next/                         the same, while a change of programs or maps is under way
//
// A change is pinned in next/, then made live by link updates, that of sock4_connect before the others. When the counts
// have been carried over to its maps, it is moved up by renames, the maps first and sock4_connect last. Whoever locks
// the directory afterwards finishes or discards what a process that died has left: next/ is the truth exactly when its
// sock4_connect is the one attached.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "plugin/attachment.h"
#include "plugin/fd.h"
#include "plugin/maps.h"
#include "plugin/system_error.h"

namespace plugin {

class PinDirectory {
 public:
  /// -ENOENT, -EINVAL: its parent is missing, or is not on a BPF filesystem. Nothing is created yet.
  static Result<PinDirectory> open(std::string path);

  PinDirectory(PinDirectory&&) = default;
  PinDirectory& operator=(PinDirectory&&) = default;
  ~PinDirectory();

  const std::string& path() const { return path_; }

  /// Whether a fast path is pinned here.
  bool has_state() const;

  /// Creates the directory if need be, becomes its only writer until destroyed, and clears up after one that died.
  /// -EBUSY: another process is the writer.
  Result<void> lock();
  bool is_locked() const { return static_cast<bool>(lock_); }
  void unlock() { lock_.reset(); }

  /// -ESTALE: the directory that this one has locked is no longer the one at its path.
  Result<void> check_owned() const;

  /// The pinned maps, all of one set, also while another process replaces them. -ENOENT: nothing is pinned here.
  Result<Maps> open_maps();

  /// How the pinned programs are attached; -ENOENT when sock4_connect is not.
  Result<Attachment> attachment() const;

  /// Another directory beside this one whose fast path is attached to the same cgroup.
  std::optional<std::string> neighbour_of(std::uint64_t cgroup_id) const;

  /// Pins these in next/.
  Result<void> stage(const Maps& maps, const PerHook<Fd>& programs);
  Result<void> stage_link(Hook hook, const Fd& link);
  void discard_staged();
  Result<void> commit_staged();

  /// Removes all pins, and the directory unless somebody else has put something there.
  Result<void> remove();

 private:
  PinDirectory() = default;
  Result<void> recover();
  Result<HookAttachment> attachment_of(Hook hook) const;
  Result<void> finish_exchange(Hook hook) const;

  std::string path_;
  Fd lock_;
};

}  // namespace plugin
