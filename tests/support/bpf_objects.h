// SPDX-License-Identifier: BSD-2-Clause
//
// The kernel's BPF objects as they are, by raw system calls: what a test asserts about the plugin is not looked up with
// the library that the plugin uses.
#pragma once

#include <linux/bpf.h>

#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "tests/support/cgroup.h"
#include "tests/support/fd.h"

namespace support {

/// bpf(2). A negative result leaves errno.
int bpf(bpf_cmd command, bpf_attr& attr);

/// One instruction of a program that a test writes by hand.
constexpr bpf_insn instruction(int code, int destination, int source, std::int16_t offset, std::int32_t immediate) {
  bpf_insn result{};
  result.code = static_cast<std::uint8_t>(code);
  result.dst_reg = destination & 0xf;
  result.src_reg = source & 0xf;
  result.off = offset;
  result.imm = immediate;
  return result;
}

/// The programs attached to one of a cgroup's hooks, in the order in which they run.
std::vector<std::uint32_t> programs_at(const Cgroup& cgroup, bpf_attach_type hook);
inline std::vector<std::uint32_t> connect4_programs(const Cgroup& cgroup) {
  return programs_at(cgroup, BPF_CGROUP_INET4_CONNECT);
}

std::string program_name(std::uint32_t program);

/// The maps that a program uses.
std::vector<std::uint32_t> maps_of(std::uint32_t program);
std::string map_name(std::uint32_t map);

/// The map of this name among the pins below a directory. Throws when there is none.
Fd pinned_map(const std::string& directory, const std::string& name);

/// An element of an array map.
template <class T>
T read_element(const Fd& map, std::uint32_t index) {
  T value{};
  bpf_attr attr{};
  attr.map_fd = static_cast<std::uint32_t>(map.get());
  attr.key = reinterpret_cast<std::uint64_t>(&index);
  attr.value = reinterpret_cast<std::uint64_t>(&value);
  checked(bpf(BPF_MAP_LOOKUP_ELEM, attr), "BPF_MAP_LOOKUP_ELEM");
  return value;
}

template <class T>
void write_element(const Fd& map, std::uint32_t index, const T& value) {
  bpf_attr attr{};
  attr.map_fd = static_cast<std::uint32_t>(map.get());
  attr.key = reinterpret_cast<std::uint64_t>(&index);
  attr.value = reinterpret_cast<std::uint64_t>(&value);
  checked(bpf(BPF_MAP_UPDATE_ELEM, attr), "BPF_MAP_UPDATE_ELEM");
}

/// Somebody else's array map, pinned there.
void pin_foreign_map(const std::string& path);

/// What hangs on a cgroup: programs at connect4, their maps, and the links to the cgroup.
struct BpfObjects {
  std::set<std::uint32_t> programs;
  std::set<std::uint32_t> maps;
  std::set<std::uint32_t> links;
};
BpfObjects objects_of(const Cgroup& cgroup);

/// Detach like an administrator would who knows nothing of us.
void detach_link(std::uint32_t link);

/// How many of these objects still exist. Ids are not reused soon: a new object never takes an old one's place here.
std::size_t still_there(const BpfObjects& objects);

/// All programs, maps and links of this machine. Other processes change it at any time.
std::size_t count_all_objects();

/// Somebody else's program, attached beside ours to connect4 or another hook that has a destination: it refuses, with
/// EPERM, what goes to one port.
class ForeignProgram {
 public:
  ForeignProgram(const Cgroup& cgroup, std::uint16_t refused_port, bpf_attach_type hook = BPF_CGROUP_INET4_CONNECT,
                 std::uint32_t flags = BPF_F_ALLOW_MULTI);
  ~ForeignProgram();
  ForeignProgram(const ForeignProgram&) = delete;
  ForeignProgram& operator=(const ForeignProgram&) = delete;

  std::uint32_t id() const { return id_; }

 private:
  bpf_attach_type hook_;
  Fd cgroup_;
  Fd program_;
  std::uint32_t id_ = 0;
};

}  // namespace support
