// SPDX-License-Identifier: BSD-2-Clause
#include "tests/support/bpf_objects.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include <cstddef>
#include <cstring>
#include <filesystem>
#include <stdexcept>

#include "tests/support/observe.h"

namespace support {
namespace {

template <class T>
std::uint64_t pointer(const T* p) {
  return reinterpret_cast<std::uint64_t>(p);
}

Fd open_cgroup(const Cgroup& cgroup) {
  return Fd(checked(::open(cgroup.path().c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC), cgroup.path()));
}

Fd open_by_id(bpf_cmd command, std::uint32_t id) {
  bpf_attr attr{};
  attr.prog_id = id;  // one union member for the ids of all kinds
  return Fd(bpf(command, attr));
}

template <class Info>
Info info_of(const Fd& fd, Info info = {}) {
  bpf_attr attr{};
  attr.info.bpf_fd = static_cast<std::uint32_t>(fd.get());
  attr.info.info_len = sizeof info;
  attr.info.info = pointer(&info);
  checked(bpf(BPF_OBJ_GET_INFO_BY_FD, attr), "BPF_OBJ_GET_INFO_BY_FD");
  return info;
}

std::vector<std::uint32_t> all_ids(bpf_cmd next) {
  std::vector<std::uint32_t> ids;
  bpf_attr attr{};
  while (bpf(next, attr) == 0) {
    ids.push_back(attr.next_id);
    attr.start_id = attr.next_id;
  }
  return ids;
}

std::size_t count_existing(bpf_cmd open, const std::set<std::uint32_t>& ids) {
  std::size_t count = 0;
  for (const std::uint32_t id : ids) count += open_by_id(open, id).get() >= 0;
  return count;
}

}  // namespace

int bpf(bpf_cmd command, bpf_attr& attr) { return static_cast<int>(::syscall(SYS_bpf, command, &attr, sizeof attr)); }

std::vector<std::uint32_t> programs_at(const Cgroup& cgroup, bpf_attach_type hook) {
  const Fd fd = open_cgroup(cgroup);
  std::vector<std::uint32_t> ids(64);
  bpf_attr attr{};
  attr.query.target_fd = static_cast<std::uint32_t>(fd.get());
  attr.query.attach_type = hook;
  attr.query.prog_ids = pointer(ids.data());
  attr.query.prog_cnt = static_cast<std::uint32_t>(ids.size());
  checked(bpf(BPF_PROG_QUERY, attr), "BPF_PROG_QUERY");
  ids.resize(attr.query.prog_cnt);
  return ids;
}

std::string program_name(std::uint32_t program) {
  const Fd fd = open_by_id(BPF_PROG_GET_FD_BY_ID, program);
  checked(fd.get(), "BPF_PROG_GET_FD_BY_ID");
  return info_of<bpf_prog_info>(fd).name;
}

std::vector<std::uint32_t> maps_of(std::uint32_t program) {
  const Fd fd = open_by_id(BPF_PROG_GET_FD_BY_ID, program);
  checked(fd.get(), "BPF_PROG_GET_FD_BY_ID");
  std::vector<std::uint32_t> maps(64);
  bpf_prog_info request{};
  request.nr_map_ids = static_cast<std::uint32_t>(maps.size());
  request.map_ids = pointer(maps.data());
  maps.resize(info_of(fd, request).nr_map_ids);
  return maps;
}

std::string map_name(std::uint32_t map) {
  const Fd fd = open_by_id(BPF_MAP_GET_FD_BY_ID, map);
  checked(fd.get(), "BPF_MAP_GET_FD_BY_ID");
  return info_of<bpf_map_info>(fd).name;
}

Fd pinned_map(const std::string& directory, const std::string& name) {
  for (const auto& entry : std::filesystem::recursive_directory_iterator(directory)) {
    const std::string path = entry.path();
    bpf_attr attr{};
    attr.pathname = pointer(path.c_str());
    Fd object(bpf(BPF_OBJ_GET, attr));
    // Only a map's file says which type of map it is.
    if (object.get() < 0 ||
        read_text("/proc/self/fdinfo/" + std::to_string(object.get())).find("map_type:") == std::string::npos) {
      continue;
    }
    if (info_of<bpf_map_info>(object).name == name) return object;
  }
  throw std::runtime_error("no " + name + " is pinned below " + directory);
}

void pin_foreign_map(const std::string& path) {
  bpf_attr create{};
  create.map_type = BPF_MAP_TYPE_ARRAY;
  create.key_size = sizeof(std::uint32_t);
  create.value_size = 64;
  create.max_entries = 4;
  const Fd map(checked(bpf(BPF_MAP_CREATE, create), "BPF_MAP_CREATE"));
  bpf_attr pin{};
  pin.pathname = pointer(path.c_str());
  pin.bpf_fd = static_cast<std::uint32_t>(map.get());
  checked(bpf(BPF_OBJ_PIN, pin), path);
}

BpfObjects objects_of(const Cgroup& cgroup) {
  BpfObjects result;
  for (const std::uint32_t id : connect4_programs(cgroup)) {
    result.programs.insert(id);
    const std::vector<std::uint32_t> maps = maps_of(id);
    result.maps.insert(maps.begin(), maps.end());
  }
  struct stat status{};
  checked(::stat(cgroup.path().c_str(), &status), cgroup.path());
  for (const std::uint32_t id : all_ids(BPF_LINK_GET_NEXT_ID)) {
    const Fd link = open_by_id(BPF_LINK_GET_FD_BY_ID, id);
    if (link.get() < 0) continue;  // gone meanwhile
    const auto info = info_of<bpf_link_info>(link);
    // A cgroup's id is its inode number.
    if (info.type == BPF_LINK_TYPE_CGROUP && info.cgroup.cgroup_id == status.st_ino) result.links.insert(id);
  }
  return result;
}

void detach_link(std::uint32_t link) {
  const Fd fd = open_by_id(BPF_LINK_GET_FD_BY_ID, link);
  bpf_attr attr{};
  attr.link_detach.link_fd = static_cast<std::uint32_t>(fd.get());
  checked(bpf(BPF_LINK_DETACH, attr), "BPF_LINK_DETACH");
}

std::size_t still_there(const BpfObjects& objects) {
  return count_existing(BPF_PROG_GET_FD_BY_ID, objects.programs) + count_existing(BPF_MAP_GET_FD_BY_ID, objects.maps) +
         count_existing(BPF_LINK_GET_FD_BY_ID, objects.links);
}

std::size_t count_all_objects() {
  return all_ids(BPF_PROG_GET_NEXT_ID).size() + all_ids(BPF_MAP_GET_NEXT_ID).size() +
         all_ids(BPF_LINK_GET_NEXT_ID).size();
}

ForeignProgram::ForeignProgram(const Cgroup& cgroup, std::uint16_t refused_port, bpf_attach_type hook,
                               std::uint32_t flags)
    : hook_(hook), cgroup_(open_cgroup(cgroup)) {
  const bpf_insn program[] = {
      instruction(BPF_LDX | BPF_MEM | BPF_W, BPF_REG_2, BPF_REG_1, offsetof(bpf_sock_addr, user_port), 0),
      instruction(BPF_ALU64 | BPF_MOV | BPF_K, BPF_REG_0, 0, 0, 1),
      instruction(BPF_JMP | BPF_JNE | BPF_K, BPF_REG_2, 0, 1, htons(refused_port)),
      instruction(BPF_ALU64 | BPF_MOV | BPF_K, BPF_REG_0, 0, 0, 0),
      instruction(BPF_JMP | BPF_EXIT, 0, 0, 0, 0),
  };
  bpf_attr load{};
  load.prog_type = BPF_PROG_TYPE_CGROUP_SOCK_ADDR;
  load.expected_attach_type = hook;
  load.insns = pointer(program);
  load.insn_cnt = std::size(program);
  load.license = pointer("GPL");
  std::strcpy(load.prog_name, "foreign");
  program_ = Fd(checked(bpf(BPF_PROG_LOAD, load), "BPF_PROG_LOAD"));
  id_ = info_of<bpf_prog_info>(program_).id;

  bpf_attr attach{};
  attach.target_fd = static_cast<std::uint32_t>(cgroup_.get());
  attach.attach_bpf_fd = static_cast<std::uint32_t>(program_.get());
  attach.attach_type = hook;
  attach.attach_flags = flags;
  checked(bpf(BPF_PROG_ATTACH, attach), "BPF_PROG_ATTACH");
}

ForeignProgram::~ForeignProgram() {
  bpf_attr attr{};
  attr.target_fd = static_cast<std::uint32_t>(cgroup_.get());
  attr.attach_bpf_fd = static_cast<std::uint32_t>(program_.get());
  attr.attach_type = hook_;
  bpf(BPF_PROG_DETACH, attr);
}

}  // namespace support
