// SPDX-License-Identifier: BSD-2-Clause
//
// Each bpf() call of `clusterip load` fails once, one after the other: it comes to nothing, in one line, or is made
// good. All of the new configuration serves, or none of it.
#include <linux/bpf.h>
#include <sys/resource.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <sstream>

#include "tests/faults/fault.h"
#include "tests/faults/memory_cgroup.h"
#include "tests/run/running.h"

namespace {

using namespace support;
using testing::HasSubstr;
using testing::Not;

/// The N-th for all N up to so many; of those behind, some.
constexpr int dense = 10;
constexpr int sparse = 7;
constexpr int last = 60;

/// Beside what libbpf says, which is one setting for a whole process, and so not the plugin's to change.
std::ptrdiff_t lines(const std::string& text) {
  std::istringstream all(text);
  std::ptrdiff_t count = 0;
  for (std::string line; std::getline(all, line);) count += !line.starts_with("libbpf: ");
  return count;
}

class BpfFault : public Running, public testing::WithParamInterface<Call> {
 protected:
  Finished load(const std::string& text, const std::function<void()>& prepare = {}) {
    const TemporaryDirectory directory;
    Process process({CLUSTERIP_COMMAND, "load", "--config", directory.write("services.toml", text), "--cgroup",
                     cgroup().path(), "--pin", pin(), "--plugin", CLUSTERIP_PLUGIN_PATH},
                    nullptr, prepare);
    return process.wait();
  }

  /// Of the old configuration, the whole and nothing of the new one.
  void expect_old() {
    EXPECT_EQ(ask("10.96.0.1", 80), answered_by("one"));
    EXPECT_EQ(ask("10.96.0.2", 80), refused_with(ENETUNREACH));
    EXPECT_EQ(ask("10.98.0.1", 80), refused_with(ENETUNREACH));
  }

  /// A shortage is no bug of ours, and nothing that this kernel lacks.
  static void expect_no_wrong_reason(const Finished& finished) {
    EXPECT_THAT(finished.err, Not(HasSubstr("bug")));
    EXPECT_THAT(finished.err, Not(HasSubstr("this kernel has no ")));
  }

  void expect_new() {
    EXPECT_EQ(ask("10.96.0.1", 80), answered_by("two"));
    EXPECT_EQ(ask("10.96.0.2", 80), answered_by("two"));
    EXPECT_EQ(ask("10.98.0.1", 80), answered_by("two"));
  }

  const NamedServer one_{"one"};
  const NamedServer two_{"two"};
  std::string before() const { return toml({{"web", "10.96.0.1", 80, {backend(one_)}}}); }
  /// With more hooks, and, with `many`, more services than the maps of `before` have room for.
  std::string after(std::uint32_t many) const {
    auto services = more_services(many, backend(two_));
    services.push_back({"web", "10.96.0.1", 80, {backend(two_)}});
    services.push_back({"new", "10.96.0.2", 80, {backend(two_)}, "refuse", "policy = \"least_conn\"\n"});
    return toml(services, {1024, 4096});
  }
};

TEST_P(BpfFault, LoadIsWholeOrNothing) {
  const Call call = GetParam();
  ASSERT_EQ(load(before()).exit_code, fine);
  int injected = 0;
  int survived = 0;
  constexpr std::uint32_t many = 300;  // than the maps have room for: all is made anew
  for (int nth = 1; nth <= last; nth += nth < dense ? 1 : sparse) {
    SCOPED_TRACE(fmt::format("{} number {}", call.name, nth));
    const Fault fault(call.call, call.command, nth, call.error);
    const Finished finished = load(after(many), [&] { fault.prepare(); });
    if (!fault.was_injected()) break;
    ++injected;
    ASSERT_LT(finished.exit_code, 124) << finished.err;
    expect_no_wrong_reason(finished);
    const Answer web = ask("10.96.0.1", 80);
    if (finished.exit_code == fine) {
      expect_new();
      ++survived;
    } else {
      EXPECT_EQ(finished.out, "");
      EXPECT_EQ(lines(finished.err), 1) << finished.err;
      if (web == answered_by("two"))
        expect_new();  // published; what came after it failed
      else
        expect_old();
    }
    const Finished mended = load(before());
    ASSERT_EQ(mended.exit_code, fine) << mended.err;
    expect_old();
  }
  std::printf("%s: %d injected, %d of them made good\n", call.name, injected, survived);
}

TEST_P(BpfFault, FirstLoadLeavesNothingBehind) {
  const Call call = GetParam();
  int injected = 0;
  for (int nth = 1; nth <= last; nth += nth < dense ? 2 : 8) {
    SCOPED_TRACE(fmt::format("{} number {}", call.name, nth));
    const Fault fault(call.call, call.command, nth, call.error);
    const Finished finished = load(after(1), [&] { fault.prepare(); });
    if (!fault.was_injected()) break;
    ++injected;
    ASSERT_LT(finished.exit_code, 124) << finished.err;
    expect_no_wrong_reason(finished);
    if (finished.exit_code == fine) {
      expect_new();
    } else if (finished.exit_code == cannot || ask("10.96.0.1", 80) != answered_by("two")) {
      EXPECT_EQ(lines(finished.err), 1) << finished.err;
      EXPECT_TRUE(connect4_programs(cgroup()).empty());
      EXPECT_FALSE(std::filesystem::exists(pin()));
    }
    const Finished unloaded = clusterip({"unload", "--pin", pin()});
    ASSERT_EQ(unloaded.exit_code, fine) << unloaded.err;
    EXPECT_TRUE(connect4_programs(cgroup()).empty());
    EXPECT_FALSE(std::filesystem::exists(pin()));
  }
  std::printf("%s: %d injected\n", call.name, injected);
}

INSTANTIATE_TEST_SUITE_P(
    Each, BpfFault,
    testing::Values(
        Call{"MapCreate", "bpf", BPF_MAP_CREATE, ENOMEM}, Call{"Lookup", "bpf", BPF_MAP_LOOKUP_ELEM, ENOMEM},
        Call{"Update", "bpf", BPF_MAP_UPDATE_ELEM, ENOMEM}, Call{"UpdateBatch", "bpf", BPF_MAP_UPDATE_BATCH, ENOMEM},
        Call{"Delete", "bpf", BPF_MAP_DELETE_ELEM, ENOMEM}, Call{"NextKey", "bpf", BPF_MAP_GET_NEXT_KEY, ENOMEM},
        Call{"Freeze", "bpf", BPF_MAP_FREEZE, EBUSY}, Call{"ProgLoad", "bpf", BPF_PROG_LOAD, ENOMEM},
        Call{"Pin", "bpf", BPF_OBJ_PIN, ENOSPC}, Call{"Get", "bpf", BPF_OBJ_GET, EMFILE},
        Call{"Info", "bpf", BPF_OBJ_GET_INFO_BY_FD, EFAULT}, Call{"LinkCreate", "bpf", BPF_LINK_CREATE, EPERM},
        Call{"LinkUpdate", "bpf", BPF_LINK_UPDATE, ENOMEM}, Call{"Query", "bpf", BPF_PROG_QUERY, EPERM},
        Call{"Btf", "bpf", BPF_BTF_LOAD, ENOMEM}, Call{"Membarrier", "membarrier", -1, EPERM},
        Call{"Mkdir", "mkdir", -1, ENOSPC}, Call{"Rename", "rename", -1, ENOSPC}, Call{"Socket", "socket", -1, EMFILE}),
    [](const auto& test) { return std::string(test.param.name); });

class LittleMemory : public BpfFault {};

TEST_F(LittleMemory, LoadIsWholeOrNothing) {
  ASSERT_EQ(load(before()).exit_code, fine);
  for (const rlim_t mib : {30U, 34U, 38U, 42U, 46U, 50U, 60U, 80U, 120U, 400U}) {
    SCOPED_TRACE(fmt::format("{} MiB", mib));
    const Finished finished = load(after(300), [mib] {
      const rlimit limit{mib << 20, mib << 20};
      ::setrlimit(RLIMIT_AS, &limit);
    });
    constexpr int not_even_started = 127;
    ASSERT_LE(finished.exit_code, not_even_started) << finished.err;
    if (finished.exit_code == fine) {
      expect_new();
      ASSERT_EQ(load(before()).exit_code, fine);
    } else {
      EXPECT_EQ(lines(finished.err), 1) << finished.err;
    }
    expect_old();
  }
}

TEST_F(LittleMemory, CgroupThatIsFullEndsTheLoadAndNothingElse) {
  if (MemoryCgroup::hierarchy().empty()) SKIP_OR_FAIL("no cgroup with a limit of memory");
  ASSERT_EQ(load(before()).exit_code, fine);
  int killed = 0;
  int refused = 0;
  for (const std::uint64_t mib : {1U, 2U, 3U, 4U, 6U, 8U, 12U, 16U, 64U}) {
    SCOPED_TRACE(fmt::format("{} MiB", mib));
    const MemoryCgroup memory(mib << 20);
    const Finished finished = load(after(300), [&memory] { memory.enter(); });
    constexpr int by_the_kernel = 128 + 9;
    if (finished.exit_code == by_the_kernel)
      ++killed;
    else if (finished.exit_code != fine) {
      EXPECT_EQ(lines(finished.err), 1) << finished.err;
      ++refused;
    }
    if (ask("10.96.0.1", 80) == answered_by("two"))
      expect_new();
    else
      expect_old();
    EXPECT_TRUE(finished.exit_code != fine || ask("10.96.0.1", 80) == answered_by("two"));
    const Finished mended = load(before());
    ASSERT_EQ(mended.exit_code, fine) << mended.err;
    expect_old();
  }
  EXPECT_GT(killed + refused, 0) << "none of the limits was one";
  std::printf("%d killed, %d refused\n", killed, refused);
}

}  // namespace
