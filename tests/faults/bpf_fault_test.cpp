// SPDX-License-Identifier: BSD-2-Clause
//
// Calls of `clusterip load`, `clusterip unload` and of a reload fail once, one after the other: it comes to nothing, in
// one line, or is made good. All of the new configuration serves, or none of it.
#include <linux/bpf.h>
#include <sys/resource.h>
#include <sys/syscall.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <iterator>
#include <optional>
#include <sstream>
#include <utility>

#include "tests/faults/fault.h"
#include "tests/faults/memory_cgroup.h"
#include "tests/run/running.h"

namespace {

using namespace support;
using testing::AnyOf;
using testing::HasSubstr;
using testing::Not;

/// Beside what libbpf says, which is one setting for a whole process, and so not the plugin's to change.
std::ptrdiff_t lines(const std::string& text) {
  std::istringstream all(text);
  std::ptrdiff_t count = 0;
  for (std::string line; std::getline(all, line);) count += !line.starts_with("libbpf: ");
  return count;
}

/// What a call is a part of, and must occur in.
enum Place : unsigned {
  upgrade = 1U << 0,                // more services than the maps have room for: all is made anew
  first = 1U << 1,                  // nothing was loaded
  within = 1U << 2,                 // fewer services, in the same maps, and a UDP backend that somebody is connected to
  removal = 1U << 3,                // unload
  reload = 1U << 4,                 // of `clusterip run`
  upgrade_without_links = 1U << 5,  // as before Linux 5.7
  removal_without_links = 1U << 6,
};

struct Row {
  Call call;
  unsigned places;
  int at_the_ends = 3;  // of the calls that it has in a place, so many of the first and of the last fail
};

std::ostream& operator<<(std::ostream& out, const Row& row) { return out << row.call; }

constexpr std::array rows{
    Row{{"MapCreate", "bpf", BPF_MAP_CREATE, ENOMEM}, upgrade | first | reload, 2},
    Row{{"Lookup", "bpf", BPF_MAP_LOOKUP_ELEM, ENOMEM}, upgrade | within | removal, 2},
    Row{{"Update", "bpf", BPF_MAP_UPDATE_ELEM, ENOMEM}, upgrade | first | within | reload},
    Row{{"UpdateBatch", "bpf", BPF_MAP_UPDATE_BATCH, ENOMEM}, upgrade},
    Row{{"Delete", "bpf", BPF_MAP_DELETE_ELEM, ENOMEM}, within},
    Row{{"NextKey", "bpf", BPF_MAP_GET_NEXT_KEY, ENOMEM}, upgrade | within},
    Row{{"Freeze", "bpf", BPF_MAP_FREEZE, EBUSY}, upgrade | first},
    Row{{"BindMap", "bpf", BPF_PROG_BIND_MAP, ENOMEM}, upgrade | first, 1},
    Row{{"ProgLoad", "bpf", BPF_PROG_LOAD, ENOMEM}, upgrade | first | reload, 2},
    Row{{"Pin", "bpf", BPF_OBJ_PIN, ENOSPC}, upgrade | first | reload},
    Row{{"Get", "bpf", BPF_OBJ_GET, EMFILE}, upgrade | within | removal},
    Row{{"Info", "bpf", BPF_OBJ_GET_INFO_BY_FD, EFAULT}, upgrade | first | within | removal, 2},
    Row{{"LinkCreate", "bpf", BPF_LINK_CREATE, EPERM}, upgrade | first | within},
    Row{{"LinkUpdate", "bpf", BPF_LINK_UPDATE, ENOMEM}, upgrade | reload},
    Row{{"LinkDetach", "bpf", BPF_LINK_DETACH, ENOMEM}, removal, 2},
    Row{{"IterCreate", "bpf", BPF_ITER_CREATE, EMFILE}, within},
    Row{{"Btf", "bpf", BPF_BTF_LOAD, ENOMEM}, upgrade | first, 1},
    Row{{"ProgAttach", "bpf", BPF_PROG_ATTACH, ENOMEM}, upgrade_without_links, 2},
    Row{{"ProgDetach", "bpf", BPF_PROG_DETACH, ENOMEM}, removal_without_links, 2},
    Row{{"Query", "bpf", BPF_PROG_QUERY, ENOMEM}, upgrade_without_links | removal_without_links, 2},
    Row{{"Membarrier", "membarrier", -1, EPERM}, upgrade | first | within},
    Row{{"Mkdir", "mkdir", -1, ENOSPC}, upgrade | first},
    Row{{"Rename", "rename", -1, ENOSPC}, upgrade | first | reload},
    Row{{"Unlink", "unlink", -1, EPERM}, removal},
    Row{{"Rmdir", "rmdir", -1, EPERM}, removal},
    Row{{"Socket", "socket", -1, EMFILE}, upgrade | first}};

std::vector<Row> rows_of(unsigned places) {
  std::vector<Row> chosen;
  std::ranges::copy_if(rows, std::back_inserter(chosen),
                       [places](const Row& row) { return (row.places & places) != 0; });
  return chosen;
}

std::string name_of(const testing::TestParamInfo<Row>& test) { return test.param.call.name; }

class BpfFault : public Running, public testing::WithParamInterface<Row> {
 protected:
  static constexpr const char* dns_vip = "10.96.0.53";

  Finished load(const std::string& text, const std::function<void()>& prepare = {}) {
    const TemporaryDirectory directory;
    Process process({CLUSTERIP_COMMAND, "load", "--config", directory.write("services.toml", text), "--cgroup",
                     cgroup().path(), "--pin", pin(), "--plugin", CLUSTERIP_PLUGIN_PATH},
                    nullptr, prepare);
    return process.wait();
  }
  Finished unload(const std::function<void()>& prepare = {}) {
    Process process({CLUSTERIP_COMMAND, "unload", "--pin", pin(), "--plugin", CLUSTERIP_PLUGIN_PATH}, nullptr, prepare);
    return process.wait();
  }

  /// `attempt` with each of some calls failing, of those that it makes when none fails. What it returns is whether all
  /// is as it was before; else `start_again` sees to that.
  void each_fails(int most_at_the_ends, int between, const std::function<bool(const Fault&)>& attempt,
                  const std::function<void()>& start_again) {
    const Call call = GetParam().call;
    int calls = 0;
    {
      SCOPED_TRACE("nothing fails");
      const Fault none = Fault::none(call);
      EXPECT_FALSE(attempt(none));
      start_again();
      calls = none.counted();
      made_good_ = 0;
    }
    ASSERT_GT(calls, 0) << "it never comes to this call";
    int injected = 0;
    const auto chosen = positions(calls, std::min(GetParam().at_the_ends, most_at_the_ends), between);
    for (const int nth : chosen) {
      SCOPED_TRACE(fmt::format("{} number {} of {}", call.name, nth, calls));
      const Fault fault(call, nth);
      const bool is_as_before = attempt(fault);
      injected += fault.was_injected() ? 1 : 0;
      if (!is_as_before) start_again();
      if (HasFatalFailure()) return;
    }
    // Not all: how many namespaces there are to iterate over is other processes' doing.
    EXPECT_GE(2 * injected, static_cast<int>(chosen.size()));
    std::printf("%s: %d of %d calls injected, %d made good\n", call.name, injected, calls, made_good_);
  }

  /// It failed, for a reason that it told.
  static void expect_told(const Finished& finished) {
    EXPECT_LT(finished.exit_code, 124) << finished.err;
    EXPECT_EQ(finished.out, "");
    EXPECT_EQ(lines(finished.err), 1) << finished.err;
  }

  void load_again(const std::string& text, const std::function<void()>& prepare = {}) {
    if (!prepare) return void(serve(text, pinned()));  // a third of what a process takes
    const Finished mended = load(text, prepare);
    ASSERT_EQ(mended.exit_code, fine) << mended.err;
  }
  void unload_again(const std::function<void()>& prepare = {}) {
    if (!prepare) {
      ASSERT_TRUE(ok(Handle(plugin(), pinned()).detach()));
    } else {
      const Finished unloaded = unload(prepare);
      ASSERT_EQ(unloaded.exit_code, fine) << unloaded.err;
    }
    expect_nothing_left();
  }

  void expect_nothing_left() {
    EXPECT_TRUE(connect4_programs(cgroup()).empty());
    EXPECT_FALSE(std::filesystem::exists(pin()));
  }

  /// Of the old configuration, the whole and nothing of the new one.
  void expect_old() {
    EXPECT_EQ(connect4_programs(cgroup()).size(), 1U);
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
    EXPECT_EQ(connect4_programs(cgroup()).size(), 1U);
    EXPECT_EQ(ask("10.96.0.1", 80), answered_by("two"));
    EXPECT_EQ(ask("10.96.0.2", 80), answered_by("two"));
    EXPECT_EQ(ask("10.98.0.1", 80), answered_by("two"));
  }

  /// Whole, in any case. Returns whether it is the old one.
  bool expect_old_or_new() {
    const bool is_new = ask("10.96.0.1", 80) == answered_by("two");  // published; what came after it failed
    is_new ? expect_new() : expect_old();
    return !is_new;
  }

  /// An upgrade from `before` to `after`.
  void upgrade_is_whole_or_nothing(const std::function<void()>& prepare = {}) {
    constexpr std::uint32_t many = 300;  // than the maps have room for: all is made anew
    load_again(before(), prepare);
    const auto attempt = [&](const Fault& fault) {
      const Finished finished = load(after(many), [&] {
        if (prepare) prepare();
        fault.prepare();
      });
      expect_no_wrong_reason(finished);
      if (finished.exit_code == fine) {
        expect_new();
        ++made_good_;
        return false;
      }
      expect_told(finished);
      return expect_old_or_new();
    };
    each_fails(3, 1, attempt, [&] {
      // What is loaded over keeps its hooks: each attempt is to add them.
      unload_again(prepare);
      load_again(before(), prepare);
      expect_old();
    });
  }

  void removal_is_done_or_told(const std::function<void()>& prepare = {}) {
    load_again(before(), prepare);
    const auto attempt = [&](const Fault& fault) {
      const Finished finished = unload([&] {
        if (prepare) prepare();
        fault.prepare();
      });
      expect_no_wrong_reason(finished);
      if (finished.exit_code == fine) {
        expect_nothing_left();
        ++made_good_;
        return false;
      }
      expect_told(finished);
      const Finished again = unload(prepare);
      EXPECT_EQ(again.exit_code, fine) << again.err;
      EXPECT_TRUE(connect4_programs(cgroup()).empty());
      // Of a removal that fell short of the directory alone, "nothing is loaded".
      EXPECT_TRUE(!std::filesystem::exists(pin()) || std::filesystem::is_empty(pin()));
      return false;
    };
    each_fails(3, 1, attempt, [&] {
      load_again(before(), prepare);
      expect_old();
    });
  }

  /// To a child, this kernel has no bpf_link.
  static void take_links() { forbid({{SYS_bpf, BPF_LINK_CREATE, EINVAL}}); }

  const NamedServer one_{"one"};
  const NamedServer two_{"two"};
  int made_good_ = 0;

  std::string before() const { return toml({{"web", "10.96.0.1", 80, {backend(one_)}}}); }
  /// With more hooks, and, with `many`, more services than the maps of `before` have room for.
  std::string after(std::uint32_t many) const {
    auto services = more_services(many, backend(two_));
    services.push_back({"web", "10.96.0.1", 80, {backend(two_)}});
    services.push_back({"new", "10.96.0.2", 80, {backend(two_)}, "refuse", "policy = \"least_conn\"\n"});
    return toml(services, {1024, 4096});
  }
};

class Upgrade : public BpfFault {};

TEST_P(Upgrade, IsWholeOrNothing) { upgrade_is_whole_or_nothing(); }
INSTANTIATE_TEST_SUITE_P(Each, Upgrade, testing::ValuesIn(rows_of(upgrade)), name_of);

class UpgradeWithoutLinks : public BpfFault {};

TEST_P(UpgradeWithoutLinks, IsWholeOrNothing) { upgrade_is_whole_or_nothing(take_links); }
INSTANTIATE_TEST_SUITE_P(Each, UpgradeWithoutLinks, testing::ValuesIn(rows_of(upgrade_without_links)), name_of);

class FirstLoad : public BpfFault {};

TEST_P(FirstLoad, LeavesNothingBehind) {
  const auto attempt = [&](const Fault& fault) {
    const Finished finished = load(after(1), [&] { fault.prepare(); });
    expect_no_wrong_reason(finished);
    if (finished.exit_code == fine) {
      expect_new();
      ++made_good_;
      return false;
    }
    expect_told(finished);
    if (ask("10.96.0.1", 80) == answered_by("two")) {
      expect_new();  // published; what came after it failed
      return false;
    }
    expect_nothing_left();
    return true;
  };
  each_fails(2, 1, attempt, [&] { unload_again(); });
}
INSTANTIATE_TEST_SUITE_P(Each, FirstLoad, testing::ValuesIn(rows_of(first)), name_of);

class WithinTheMaps : public BpfFault {};

TEST_P(WithinTheMaps, ChangeIsWholeOrNothing) {
  const NamedUdpServer one("one");
  const NamedUdpServer two("two");
  const std::string udp = "protocol = \"udp\"\n";
  const std::string more = toml({{"web", "10.96.0.1", 80, {backend(one_)}},
                                 {"gone", "10.96.0.2", 80, {backend(one_)}},
                                 {"gone-too", "10.96.0.3", 80, {backend(one_)}},
                                 {"dns", dns_vip, 53, {backend(one)}, "refuse", udp}});
  const std::string fewer = toml({{"web", "10.96.0.1", 80, {backend(two_)}},
                                  {"dns", dns_vip, 53, {backend(two)}, "refuse", udp},
                                  {"new", "10.96.0.4", 80, {backend(two_)}}});
  ASSERT_EQ(load(more).exit_code, fine);
  std::optional<Fd> connected;
  const auto connect = [&] {
    connected.emplace(udp_socket());
    ASSERT_EQ(connect_errno(connected->get(), dns_vip, 53), 0);
  };
  connect();
  const auto expect = [&](const char* name, bool is_old) {
    EXPECT_EQ(ask("10.96.0.1", 80), answered_by(name));
    EXPECT_EQ(ask("10.96.0.2", 80), is_old ? answered_by("one") : refused_with(ENETUNREACH));
    EXPECT_EQ(ask("10.96.0.3", 80), is_old ? answered_by("one") : refused_with(ENETUNREACH));
    EXPECT_EQ(ask("10.96.0.4", 80), is_old ? refused_with(ENETUNREACH) : answered_by("two"));
    EXPECT_THAT(exchange(udp_socket().get(), dns_vip, 53), HasSubstr(name));
  };
  const auto attempt = [&](const Fault& fault) {
    const Finished finished = load(fewer, [&] { fault.prepare(); });
    expect_no_wrong_reason(finished);
    if (finished.exit_code == fine) {
      expect("two", false);
      // The socket of the backend that left has ended, or it is told that it may not have.
      if (peer_of(connected->get()) != "ENOTCONN") {
        EXPECT_THAT(finished.err, HasSubstr("connected sockets may stay with a backend that left: "));
      }
      ++made_good_;
      return false;
    }
    expect_told(finished);
    const bool is_new = ask("10.96.0.1", 80) == answered_by("two");
    expect(is_new ? "two" : "one", !is_new);
    return !is_new;
  };
  each_fails(2, 1, attempt, [&] {
    load_again(more);
    expect("one", true);
    connect();
  });
}
INSTANTIATE_TEST_SUITE_P(Each, WithinTheMaps, testing::ValuesIn(rows_of(within)), name_of);

class Removal : public BpfFault {};

TEST_P(Removal, IsDoneOrTold) { removal_is_done_or_told(); }
INSTANTIATE_TEST_SUITE_P(Each, Removal, testing::ValuesIn(rows_of(removal)), name_of);

class RemovalWithoutLinks : public BpfFault {};

TEST_P(RemovalWithoutLinks, IsDoneOrTold) { removal_is_done_or_told(take_links); }
INSTANTIATE_TEST_SUITE_P(Each, RemovalWithoutLinks, testing::ValuesIn(rows_of(removal_without_links)), name_of);

class Reload : public BpfFault {};

TEST_P(Reload, IsWholeOrNothing) {
  const std::string old = proxy_toml({web({backend(one_)}), proxied({backend(one_)})});
  auto services = more_services(300, backend(two_));
  services.insert(services.end(), {web({backend(two_)}),
                                   {"new", "10.96.0.2", 80, {backend(two_)}, "refuse", "policy = \"least_conn\"\n"},
                                   proxied({backend(two_)})});
  const std::string next = proxy_toml(services, {}, {1024, 4096});
  const auto expect_new_of_both = [&] {
    expect_new();
    EXPECT_EQ(ask(proxied_vip, vip_port), answered_by("two"));
  };
  const auto attempt = [&](const Fault& fault) {
    RunningService service(files(old), {}, [&] { fault.prepare_for_later(); });
    fault.begin();
    const std::string told = service.reload(next);
    fault.end();
    EXPECT_THAT(told, Not(HasSubstr("bug")));
    if (told.contains("the configuration that serves goes on serving")) {
      EXPECT_THAT(told, testing::ContainsRegex("[a-z]: the configuration that serves goes on serving"));
      EXPECT_EQ(ask(proxied_vip, vip_port), answered_by(expect_old_or_new() ? "one" : "two"));
    } else {
      expect_new_of_both();
      ++made_good_;
    }
    const std::string again = service.reload(next);
    EXPECT_THAT(again, Not(HasSubstr("goes on serving")));
    expect_new_of_both();
    EXPECT_EQ(service.terminate().exit_code, fine);
    return false;
  };
  each_fails(1, 0, attempt, [&] { unload_again(); });
}
INSTANTIATE_TEST_SUITE_P(Each, Reload, testing::ValuesIn(rows_of(reload)), name_of);

class LittleMemory : public BpfFault {
 protected:
  Finished load_with(rlim_t kib) {
    return load(after(300), [kib] {
      const rlimit limit{kib << 10, kib << 10};
      ::setrlimit(RLIMIT_AS, &limit);
    });
  }
};

TEST_F(LittleMemory, LoadIsWholeOrNothing) {
  ASSERT_EQ(load(before()).exit_code, fine);
  // Where the dynamic linker, or what a library does before main(), has not enough: 127, and an abort of libstdc++'s
  // ("terminate called") when yaml-cpp's own initialization runs out.
  constexpr int not_even_started = 127, aborted_before_main = 128 + 6;
  const auto is_ours = [](int code) { return code != not_even_started && code != aborted_before_main; };
  int refused = 0;
  int loaded = 0;
  // Whether it was loaded.
  const auto attempt = [&](rlim_t kib) {
    SCOPED_TRACE(fmt::format("{} KiB", kib));
    const Finished finished = load_with(kib);
    if (finished.exit_code == fine) {
      expect_new();
      ++loaded;
      load_again(before());
      return true;
    }
    if (!expect_old_or_new()) load_again(before());
    if (!is_ours(finished.exit_code)) return false;
    ++refused;
    expect_told(finished);
    expect_no_wrong_reason(finished);
    EXPECT_THAT(finished.err,
                AnyOf(HasSubstr("failed to map segment from shared object"), HasSubstr("Cannot allocate memory"),
                      HasSubstr("out of memory"), HasSubstr("not enough memory")));
    return false;
  };
  rlim_t too_little = 4 << 10;
  rlim_t enough = 400 << 10;
  while (enough - too_little > 64) {
    const rlim_t middle = (too_little + enough) / 2;
    (attempt(middle) ? enough : too_little) = middle;
  }
  // Whatever a build is like, between "cannot be started" and "fine" are some MiB.
  for (int i = 1; i <= 12; ++i) attempt(too_little - static_cast<rlim_t>(i) * 320);
  for (int i = 1; i <= 2; ++i) attempt(enough + static_cast<rlim_t>(i) * 512);
  EXPECT_GE(refused, 5);
  EXPECT_GE(loaded, 2);
  std::printf("from %lu KiB on it is loaded: %d refused, %d loaded\n", enough, refused, loaded);
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
