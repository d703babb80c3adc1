// SPDX-License-Identifier: BSD-2-Clause
#include "plugin/pin_directory.h"

#include <bpf/bpf.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <iterator>
#include <utility>
#include <vector>

#include "plugin/carry_counts.h"

namespace plugin {

namespace {

constexpr const char* next_name = "next";

/// Everything that can be pinned, in the order in which it moves up from next/: the maps first, sock4_connect last.
std::vector<std::string> pin_names() {
  const auto maps = Maps::names();
  std::vector<std::string> names(maps.begin(), maps.end());
  for (auto info = all_hooks.rbegin(); info != all_hooks.rend(); ++info) {
    names.push_back(link_name(info->hook));
    names.emplace_back(info->program);
  }
  return names;
}

std::string program_path(const std::string& directory, Hook hook) { return directory + "/" + info_of(hook).program; }
std::string link_path(const std::string& directory, Hook hook) { return directory + "/" + link_name(hook); }

/// Whoever may write to the directory decides what is pinned there, and for how long.
Result<void> check_owner(const std::string& path, const struct stat& status) {
  if (!S_ISDIR(status.st_mode)) {
    return fail(-ENOTDIR, path + " is not a directory");
  }
  if ((status.st_uid != geteuid() && status.st_uid != 0) || (status.st_mode & (S_IWGRP | S_IWOTH)) != 0) {
    return fail(-EPERM, path + " belongs to user " + std::to_string(status.st_uid) +
                            " or is writable by others: remove it, and let only root write to its parent directory");
  }
  return {};
}

bool exists(const std::string& path) { return access(path.c_str(), F_OK) == 0; }

Result<void> pin(const Fd& object, const std::string& path) {
  if (bpf_obj_pin(object.get(), path.c_str()) != 0) {
    return fail_errno(errno, "pinning " + path);
  }
  return {};
}

/// The head of Meta_Map in `directory`. By look-up, so that it works for every layout version. -EPROTO: it is not ours.
Result<meta_record> read_meta(const std::string& directory) {
  const std::string path = directory + "/Meta_Map";
  const Fd map(bpf_obj_get(path.c_str()));
  bpf_map_info info{};
  std::uint32_t length = sizeof info;
  if (!map || bpf_obj_get_info_by_fd(map.get(), &info, &length) != 0) {
    return fail_errno(errno, "opening " + path);
  }
  meta_record meta{};
  if (info.type == BPF_MAP_TYPE_ARRAY) {  // of other types the kernel returns more than value_size
    std::vector<char> value(std::max<std::size_t>(info.value_size, sizeof meta));
    const std::uint32_t first = 0;
    if (bpf_map_lookup_elem(map.get(), &first, value.data()) != 0) {
      return fail_errno(errno, "reading " + path);
    }
    std::memcpy(&meta, value.data(), sizeof meta);
  }
  if (meta.magic != LAYOUT_MAGIC) {
    return fail(-EPROTO, path + " is not clusterip's: use another pin path, or remove it by hand");
  }
  return meta;
}

/// The cgroup that Meta_Map in `directory` names.
Result<Cgroup> recorded_cgroup(const std::string& directory) {
  const auto meta = read_meta(directory);
  if (!meta) {
    return std::unexpected(meta.error());
  }
  const std::string path(meta->cgroup_path, strnlen(meta->cgroup_path, sizeof meta->cgroup_path));
  if (path.empty()) {
    return fail(-ENOENT, directory + " does not say which cgroup it belongs to");
  }
  auto cgroup = open_cgroup(path);
  if (cgroup && cgroup->id != meta->cgroup_id) {
    return fail(-ENOENT, "the cgroup " + path + " is not the one that " + directory + " was attached to");
  }
  return cgroup;
}

Result<bool> is_attached(Hook hook, const Cgroup& cgroup, std::uint32_t program_id) {
  std::vector<std::uint32_t> ids(64);  // as many as the kernel allows on one hook of one cgroup
  auto count = static_cast<std::uint32_t>(ids.size());
  if (bpf_prog_query(cgroup.fd.get(), info_of(hook).attach_type, 0, nullptr, ids.data(), &count) != 0) {
    return fail_errno(errno, "asking what is attached to " + cgroup.path);  // not "no": it would stay for good
  }
  ids.resize(count);
  return std::ranges::find(ids, program_id) != ids.end();
}

/// Whether the sock4_connect pinned in `directory` is the one that runs.
Result<bool> is_running(const std::string& directory, const std::string& link_path) {
  const std::string pinned = program_path(directory, Hook::connect4);
  const Fd program(bpf_obj_get(pinned.c_str()));
  if (!program) {
    return errno == ENOENT ? Result<bool>(false) : fail_errno(errno, "opening " + pinned);
  }
  const auto id = program_id_of(program);
  if (!id) {
    return std::unexpected(id.error());
  }
  Fd link(bpf_obj_get(link_path.c_str()));
  if (!link && errno != ENOENT) {
    return fail_errno(errno, "opening " + link_path);
  }
  if (link) {
    const auto running = HookAttachment::from_link(Hook::connect4, std::move(link), Fd()).program_id();
    if (!running) {
      return std::unexpected(running.error());
    }
    return *running == *id;
  }
  const auto cgroup = recorded_cgroup(directory);
  return cgroup ? is_attached(Hook::connect4, *cgroup, *id) : Result<bool>(false);
}

}  // namespace

Result<PinDirectory> PinDirectory::open(std::string path) {
  while (path.size() > 1 && path.back() == '/') {
    path.pop_back();
  }
  const std::string parent = std::filesystem::path(path).parent_path().string();
  if (std::filesystem::path(path).filename().string().contains('.')) {
    return fail(-EINVAL, "the pin path " + path + ": a BPF filesystem takes no names with a dot");
  }
  struct statfs filesystem{};
  if (statfs(parent.empty() ? "." : parent.c_str(), &filesystem) != 0) {
    return fail_errno(errno, "the pin path " + path);
  }
  if (filesystem.f_type != BPF_FS_MAGIC) {
    if (statfs(path.c_str(), &filesystem) == 0 && filesystem.f_type == BPF_FS_MAGIC) {
      return fail(-EINVAL, "the pin path " + path + " is where a BPF filesystem is mounted: name a directory below it");
    }
    return fail(-EINVAL,
                "the pin path " + path + " is not on a BPF filesystem (mount -t bpf -o mode=0700 bpf /sys/fs/bpf)");
  }
  PinDirectory directory;
  directory.path_ = std::move(path);
  return directory;
}

PinDirectory::~PinDirectory() {
  if (lock_ && check_owned()) {
    rmdir(path_.c_str());  // only when nothing has been pinned in it
  }
}

bool PinDirectory::has_state() const { return exists(path_ + "/Meta_Map"); }

Result<Maps> PinDirectory::open_maps() {
  constexpr int attempts = 1000;
  constexpr int patience = 50;  // a replacement takes little more than a grace period, unless its process died
  constexpr timespec pause{.tv_sec = 0, .tv_nsec = 1'000'000};
  const std::string next = path_ + "/" + next_name;
  const std::string meta = path_ + "/Meta_Map";
  for (int attempt = 0; attempt < attempts; ++attempt) {
    if (!is_locked() && exists(next)) {
      if (attempt > patience && lock()) {
        lock_.reset();  // it had died; lock() has cleared up
      } else {
        nanosleep(&pause, nullptr);
      }
      continue;
    }
    struct stat directory{};
    if (lstat(path_.c_str(), &directory) != 0) {
      return fail(-ENOENT, "nothing is loaded at " + path_);
    }
    if (auto owned = check_owner(path_, directory); !owned) {
      return std::unexpected(owned.error());
    }
    // Each pin has an inode of its own. The same one before and after, and no next/: nothing was replaced in between.
    struct stat before{};
    struct stat after{};
    if (stat(meta.c_str(), &before) != 0) {
      if (exists(program_path(path_, Hook::connect4))) {
        return fail(-EPROTO, path_ +
                                 ": the pinned state is damaged (Meta_Map is missing): run `clusterip unload --pin " +
                                 path_ + "` and load again");
      }
      return fail(-ENOENT, "nothing is loaded at " + path_);
    }
    if (const auto head = read_meta(path_); !head && head.error().code == -EPROTO) {
      return std::unexpected(head.error());
    }
    auto maps = Maps::open(path_);
    if (is_locked() || (!exists(next) && stat(meta.c_str(), &after) == 0 && before.st_ino == after.st_ino)) {
      return maps;
    }
  }
  return fail(-EBUSY, path_ + " is being replaced again and again");
}

Result<void> PinDirectory::lock() {
  constexpr int attempts = 3;
  for (int attempt = 0; attempt < attempts; ++attempt) {
    if (mkdir(path_.c_str(), S_IRWXU) != 0 && errno != EEXIST) {
      return fail_errno(errno, "creating " + path_);
    }
    Fd directory(::open(path_.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
    struct stat locked{};
    if (!directory || fstat(directory.get(), &locked) != 0) {
      return fail_errno(errno, "opening " + path_);
    }
    if (auto owned = check_owner(path_, locked); !owned) {
      return owned;
    }
    if (flock(directory.get(), LOCK_EX | LOCK_NB) != 0) {
      const int error = errno;
      return error == EWOULDBLOCK ? fail(-EBUSY, path_ + " is in use by another process (fuser " + path_ + " names it)")
                                  : fail_errno(error, "locking " + path_);
    }
    // The former writer may have removed the directory between our open() and flock().
    lock_ = std::move(directory);
    if (!check_owned()) {
      lock_.reset();
      continue;
    }
    auto recovered = recover();
    if (!recovered) {
      lock_.reset();
    }
    return recovered;
  }
  return fail(-EBUSY, path_ + " is being removed by another process");
}

Result<void> PinDirectory::check_owned() const {
  struct stat locked{};
  struct stat named{};
  if (fstat(lock_.get(), &locked) != 0 || lstat(path_.c_str(), &named) != 0 || locked.st_ino != named.st_ino ||
      locked.st_dev != named.st_dev) {
    return fail(-ESTALE, path_ + " was removed, and perhaps made again, by somebody else: restart this process");
  }
  return {};
}

Result<void> PinDirectory::recover() {
  const std::string next = path_ + "/" + next_name;
  if (!exists(next)) {
    return {};
  }
  const std::string staged_link = link_path(next, Hook::connect4);
  const auto runs = is_running(next, exists(staged_link) ? staged_link : link_path(path_, Hook::connect4));
  if (!runs) {
    return std::unexpected(runs.error());
  }
  if (!*runs) {
    discard_staged();
    return {};
  }
  for (const HookInfo& info : all_hooks) {
    if (info.hook == Hook::connect4) {
      continue;
    }
    if (auto finished = finish_exchange(info.hook); !finished) {
      return finished;
    }
  }
  // The maps move up first: as long as they have not begun to, their counts may not have been carried over.
  if (exists(next + "/" + Maps::names().front())) {
    const auto before = Maps::open(path_);
    const auto now = Maps::open(next);
    if (before && now) {
      carry_counts(*before, *now);
    }
  }
  return commit_staged();
}

/// What Attachment::switch_to() would have done next: links that were there before get the program in next/.
Result<void> PinDirectory::finish_exchange(Hook hook) const {
  const std::string next = path_ + "/" + next_name;
  Fd program(bpf_obj_get(program_path(next, hook).c_str()));
  if (!program && errno != ENOENT) {
    return fail_errno(errno, "opening " + program_path(next, hook));
  }
  if (!program || exists(link_path(next, hook))) {
    return {};
  }
  auto attached = attachment_of(hook);
  if (!attached) {
    return attached.error().code == -ENOENT ? Result<void>{} : std::unexpected(attached.error());
  }
  const auto replaced = attached->replace(std::move(program));
  // A link that somebody has detached is no use, and no reason to fail.
  return replaced || replaced.error().code == -ENOLINK ? Result<void>{} : std::unexpected(replaced.error());
}

/// -ENOENT: the pinned program of this hook is not attached, or there is none.
Result<HookAttachment> PinDirectory::attachment_of(Hook hook) const {
  const std::string pinned = program_path(path_, hook);
  Fd program(bpf_obj_get(pinned.c_str()));
  if (!program) {
    return fail_errno(errno, "opening " + pinned);
  }
  const auto id = program_id_of(program);
  if (!id) {
    return std::unexpected(id.error());
  }
  Fd link(bpf_obj_get(link_path(path_, hook).c_str()));
  if (!link && errno != ENOENT) {  // it may be there: without it, a second program would be attached beside it
    return fail_errno(errno, "opening " + link_path(path_, hook));
  }
  if (link) {
    auto attachment = HookAttachment::from_link(hook, std::move(link), std::move(program));
    const auto cgroup = attachment.cgroup_id();
    if (!cgroup || *cgroup == 0) {  // somebody has detached it, or its cgroup is gone
      return cgroup ? fail(-ENOENT, pinned + " is not attached") : std::unexpected(cgroup.error());
    }
    return attachment;
  }
  // Without bpf_link, or the link's pin was removed, and with it the link.
  auto cgroup = recorded_cgroup(path_);
  if (!cgroup) {
    return std::unexpected(cgroup.error());
  }
  const auto attached = is_attached(hook, *cgroup, *id);
  if (!attached) {
    return std::unexpected(attached.error());
  }
  if (!*attached) {
    return fail(-ENOENT, pinned + " is not attached");
  }
  return HookAttachment::from_program(hook, *cgroup, program);
}

Result<Attachment> PinDirectory::attachment() const {
  Attachment attachment;
  for (const HookInfo& info : all_hooks) {
    auto attached = attachment_of(info.hook);
    if (!attached && (info.hook == Hook::connect4 || attached.error().code != -ENOENT)) {
      return std::unexpected(attached.error());
    }
    if (!attached) {
      continue;
    }
    const Fd program(bpf_obj_get(program_path(path_, info.hook).c_str()));
    const auto pinned =
        program ? program_id_of(program) : fail_errno(errno, "opening " + program_path(path_, info.hook));
    const auto running = attached->program_id();
    if (!pinned || !running) {
      return std::unexpected(pinned ? running.error() : pinned.error());
    }
    if (*pinned != *running) {
      return fail(-EPROTO, link_path(path_, info.hook) + " is not a link of " + program_path(path_, info.hook) +
                               ": somebody has changed these pins, remove them by hand");
    }
    attachment.add(info.hook, std::move(*attached));
  }
  return attachment;
}

std::optional<std::string> PinDirectory::neighbour_of(std::uint64_t cgroup_id) const {
  std::error_code unreadable;
  for (const auto& entry :
       std::filesystem::directory_iterator(std::filesystem::path(path_).parent_path(), unreadable)) {
    PinDirectory other;
    other.path_ = entry.path().string();
    struct stat status{};
    // By links and in directories of theirs, others could have anything taken for one.
    if (other.path_ == path_ || lstat(other.path_.c_str(), &status) != 0 || !check_owner(other.path_, status) ||
        !other.has_state()) {
      continue;
    }
    const auto meta = read_meta(other.path_);
    if (meta && meta->cgroup_id == cgroup_id && other.attachment()) {
      return other.path_;
    }
  }
  return {};
}

Result<void> PinDirectory::stage(const Maps& maps, const PerHook<Fd>& programs) {
  const std::string next = path_ + "/" + next_name;
  if (auto owned = check_owned(); !owned) {
    return owned;
  }
  // What an earlier exchange could not move up.
  if (auto recovered = recover(); !recovered) {
    return recovered;
  }
  if (mkdir(next.c_str(), S_IRWXU) != 0) {
    return fail_errno(errno, "creating " + next);
  }
  if (auto pinned = maps.pin(next); !pinned) {
    discard_staged();
    return pinned;
  }
  for (const HookInfo& info : all_hooks) {
    const Fd& program = programs[index_of(info.hook)];
    if (!program) {
      continue;
    }
    if (auto pinned = pin(program, program_path(next, info.hook)); !pinned) {
      discard_staged();
      return pinned;
    }
  }
  return {};
}

Result<void> PinDirectory::stage_link(Hook hook, const Fd& link) {
  return pin(link, link_path(path_ + "/" + next_name, hook));
}

void PinDirectory::discard_staged() {
  const std::string next = path_ + "/" + next_name;
  for (const std::string& name : pin_names()) {
    unlink((next + "/" + name).c_str());
  }
  rmdir(next.c_str());
}

Result<void> PinDirectory::commit_staged() {
  const std::string next = path_ + "/" + next_name;
  for (const std::string& name : pin_names()) {
    const std::string from = next + "/" + name;
    if (rename(from.c_str(), (path_ + "/" + name).c_str()) != 0 && errno != ENOENT) {
      return fail_errno(errno, "moving " + from + " up");
    }
  }
  rmdir(next.c_str());
  return {};
}

Result<void> PinDirectory::remove() {
  if (has_state()) {
    if (const auto meta = read_meta(path_); !meta) {
      return std::unexpected(meta.error());
    }
  }
  discard_staged();
  // Meta_Map stands for "a fast path is pinned here": it goes first, so that what a killed process leaves is no state.
  std::vector<std::string> names = {"Meta_Map"};
  std::ranges::move(pin_names(), std::back_inserter(names));
  for (const auto& name : names) {
    const std::string pinned = path_ + "/" + name;
    if (unlink(pinned.c_str()) != 0 && errno != ENOENT) {
      return fail_errno(errno, "removing " + pinned);
    }
  }
  if (rmdir(path_.c_str()) != 0 && errno != ENOENT && errno != ENOTEMPTY) {
    return fail_errno(errno, "removing " + path_);
  }
  lock_.reset();  // of a directory that is no more
  return {};
}

}  // namespace plugin
