// SPDX-License-Identifier: BSD-2-Clause
//
// Calls of `clusterip load`, `clusterip unload` and of a reload fail once, one after the other: it comes to nothing, in
// one line, or is made good. All of the new configuration serves, or none of it.
#include <linux/bpf.h>
#include <signal.h>
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

/// What a call is a part of.
enum Place : unsigned {
  upgrade = 1U << 0,                // more services than the maps have room for: all is made anew
  first = 1U << 1,                  // nothing was loaded
  within = 1U << 2,                 // fewer services, in the same maps, and a UDP backend that somebody is connected to
  removal = 1U << 3,                // unload
  reload = 1U << 4,                 // of `clusterip run`
  upgrade_without_links = 1U << 5,  // as before Linux 5.7
  removal_without_links = 1U << 6,
  beginning = 1U << 7,  // of `clusterip run`
  look = 1U << 8,       // `clusterip status` at the pins
};

/// Places in which a call occurs, by what must come of its failures there.
struct Outcome {
  unsigned told = 0;       // each is told, and nothing has changed, or all
  unsigned sometimes = 0;  // one at least is told; others are made good, as where something is only tried
  unsigned made_good = 0;  // each, without a word

  unsigned places() const { return told | sometimes | made_good; }
};

struct Row {
  Call call;
  Outcome outcome;
  const char* reason = "";  // that is told, as a regular expression
  int at_the_ends = 3;      // of the calls that it has in a place, so many of the first and of the last fail
  bool lasts = false;       // and all after it
};

std::ostream& operator<<(std::ostream& out, const Row& row) { return out << row.call; }

const std::array rows{Row{{"MapCreate", "bpf", BPF_MAP_CREATE, ENOMEM},
                          {.sometimes = upgrade | first | reload | beginning},
                          "(trying|creating) .*: Cannot allocate memory",
                          2},
                      Row{{"Lookup", "bpf", BPF_MAP_LOOKUP_ELEM, ENOMEM},
                          {.sometimes = upgrade | within | removal | look},
                          "reading .*(Meta|Service)_Map: Cannot allocate memory",
                          2},
                      Row{{"Update", "bpf", BPF_MAP_UPDATE_ELEM, ENOMEM},
                          {.told = upgrade | first | within | reload | beginning},
                          "loading the programs: Cannot allocate memory"},
                      Row{{"UpdateBatch", "bpf", BPF_MAP_UPDATE_BATCH, ENOMEM}, {.made_good = upgrade | reload}},
                      Row{{"UpdateBatchLasting", "bpf", BPF_MAP_UPDATE_BATCH, ENOMEM},
                          {.told = upgrade | within},
                          "inserting into Service_Map: Cannot allocate memory",
                          3,
                          true},
                      // Room that lacks within the maps is had in new ones; when those have none either, it is told.
                      Row{{"UpdateBatchFull", "bpf", BPF_MAP_UPDATE_BATCH, E2BIG},
                          {.told = reload, .made_good = within},
                          "inserting into Service_Map: No space left on device"},
                      Row{{"UpdateBatchFullLasting", "bpf", BPF_MAP_UPDATE_BATCH, E2BIG},
                          {.told = first | within},
                          "inserting into Service_Map: No space left on device",
                          3,
                          true},
                      Row{{"Delete", "bpf", BPF_MAP_DELETE_ELEM, ENOMEM}, {.made_good = within}},
                      Row{{"NextKey", "bpf", BPF_MAP_GET_NEXT_KEY, ENOMEM},
                          {.told = upgrade | within},
                          "listing Service_Map: Cannot allocate memory"},
                      Row{{"Freeze", "bpf", BPF_MAP_FREEZE, EBUSY},
                          {.told = upgrade | first},
                          "loading the programs: Device or resource busy"},
                      Row{{"BindMap", "bpf", BPF_PROG_BIND_MAP, ENOMEM}, {.made_good = upgrade | first}, "", 1},
                      Row{{"ProgLoad", "bpf", BPF_PROG_LOAD, ENOMEM},
                          {.sometimes = upgrade | first, .made_good = reload},
                          "trying .*: Cannot allocate memory",
                          2},
                      Row{{"ProgLoadLasting", "bpf", BPF_PROG_LOAD, ENOMEM},
                          {.told = reload},
                          "loading the programs: Cannot allocate memory",
                          1,
                          true},
                      Row{{"Pin", "bpf", BPF_OBJ_PIN, ENOSPC},
                          {.told = upgrade | first | reload | beginning},
                          "pinning /sys/fs/bpf/clusterip/next/.*: No space left on device"},
                      Row{{"Get", "bpf", BPF_OBJ_GET, EMFILE},
                          {.sometimes = upgrade | within | removal | look},
                          "opening /sys/fs/bpf/clusterip/.*: Too many open files"},
                      Row{{"Info", "bpf", BPF_OBJ_GET_INFO_BY_FD, EFAULT},
                          {.sometimes = upgrade | first | within | removal | look},
                          "(asking about|using|opening) .*: Bad address",
                          2},
                      Row{{"LinkCreate", "bpf", BPF_LINK_CREATE, EPERM},
                          {.sometimes = first, .made_good = upgrade | within},
                          "attaching sock.* to .*: Operation not permitted"},
                      Row{{"LinkUpdate", "bpf", BPF_LINK_UPDATE, ENOMEM},
                          {.told = upgrade | reload},
                          "exchanging sock.*: Cannot allocate memory"},
                      Row{{"LinkDetach", "bpf", BPF_LINK_DETACH, ENOMEM},
                          {.told = removal},
                          "detaching sock.*: Cannot allocate memory",
                          2},
                      Row{{"IterCreate", "bpf", BPF_ITER_CREATE, EMFILE}, {.made_good = within}},
                      Row{{"Btf", "bpf", BPF_BTF_LOAD, ENOMEM}, {.made_good = upgrade | first}, "", 1},
                      Row{{"ProgAttach", "bpf", BPF_PROG_ATTACH, ENOMEM}, {.made_good = upgrade_without_links}, "", 2},
                      Row{{"ProgDetach", "bpf", BPF_PROG_DETACH, ENOMEM},
                          {.told = removal_without_links},
                          "detaching sock.*: Cannot allocate memory",
                          2},
                      Row{{"Query", "bpf", BPF_PROG_QUERY, ENOMEM},
                          {.told = removal_without_links, .sometimes = upgrade_without_links},
                          "asking what is attached to .*: Cannot allocate memory",
                          2},
                      Row{{"Membarrier", "membarrier", -1, EPERM},
                          {.sometimes = upgrade | within, .made_good = first},
                          "membarrier, to wait for running programs: Operation not permitted"},
                      Row{{"Mkdir", "mkdir", -1, ENOSPC},
                          {.told = upgrade | first, .sometimes = beginning},
                          "creating /sys/fs/bpf/clusterip(/next)?: No space left on device"},
                      Row{{"Rename", "rename", -1, ENOSPC}, {.made_good = upgrade | first | reload}},
                      Row{{"Unlink", "unlink", -1, EPERM},
                          {.sometimes = removal},
                          "removing /sys/fs/bpf/clusterip/.*: Operation not permitted"},
                      Row{{"Rmdir", "rmdir", -1, EPERM},
                          {.sometimes = removal},
                          "removing /sys/fs/bpf/clusterip: Operation not permitted"},
                      Row{{"Socket", "socket", -1, EMFILE},
                          {.sometimes = upgrade | first},
                          "the canary failed: a socket for the canary: Too many open files"}};

std::vector<Row> rows_of(unsigned places) {
  std::vector<Row> chosen;
  std::ranges::copy_if(rows, std::back_inserter(chosen),
                       [places](const Row& row) { return (row.outcome.places() & places) != 0; });
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
  /// is as it was before; else `start_again` sees to that. Each that is told of goes through expect_told().
  void each_fails(Place place, int most_at_the_ends, int between, const std::function<bool(const Fault&)>& attempt,
                  const std::function<void()>& start_again) {
    const Call call = GetParam().call;
    int calls = 0;
    {
      SCOPED_TRACE("nothing fails");
      const Fault none = Fault::none(call);
      EXPECT_FALSE(attempt(none));
      EXPECT_EQ(told_, 0);
      start_again();
      calls = none.counted();
      told_ = 0;
    }
    ASSERT_GT(calls, 0) << "it never comes to this call";
    int injected = 0;
    const auto chosen = positions(calls, std::min(GetParam().at_the_ends, most_at_the_ends), between);
    for (const int nth : chosen) {
      SCOPED_TRACE(fmt::format("{} number {} of {}", call.name, nth, calls));
      const Fault fault(call, GetParam().lasts ? -nth : nth);
      const int told = told_;
      const bool is_as_before = attempt(fault);
      injected += fault.was_injected() ? 1 : 0;
      EXPECT_TRUE(fault.was_injected() || told_ == told) << "what is told has another reason";
      if (!is_as_before) start_again();
      if (HasFatalFailure()) return;
    }
    // Not all: how many namespaces there are to iterate over is other processes' doing.
    EXPECT_GE(2 * injected, static_cast<int>(chosen.size()));
    const Outcome& outcome = GetParam().outcome;
    EXPECT_TRUE((outcome.told & place) == 0 || told_ == injected) << told_ << " of " << injected << " are told";
    EXPECT_TRUE((outcome.sometimes & place) == 0 || told_ > 0) << "none is told";
    EXPECT_TRUE((outcome.made_good & place) == 0 || told_ == 0) << told_ << " are told";
    std::printf("%s: %d of %d calls injected, %d told\n", call.name, injected, calls, told_);
  }

  /// It failed, for the reason that it told.
  void expect_told(const Finished& finished) {
    expect_one_line(finished);
    expect_reason(finished.err);
  }
  void expect_reason(const std::string& told) {
    EXPECT_THAT(told, testing::ContainsRegex(GetParam().reason));
    ++told_;
  }
  static void expect_one_line(const Finished& finished) {
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

  /// What was short left nothing out: as many programs are attached as when nothing fails, which comes first.
  void expect_all_hooks() {
    std::size_t programs = 0;
    for (const bpf_attach_type hook :
         {BPF_CGROUP_INET4_CONNECT, BPF_CGROUP_INET6_CONNECT, BPF_CGROUP_UDP4_SENDMSG, BPF_CGROUP_UDP6_SENDMSG,
          BPF_CGROUP_UDP4_RECVMSG, BPF_CGROUP_UDP6_RECVMSG, BPF_CGROUP_INET4_GETPEERNAME, BPF_CGROUP_INET6_GETPEERNAME,
          BPF_CGROUP_INET_SOCK_RELEASE, BPF_CGROUP_SOCK_OPS})
      programs += programs_at(cgroup(), hook).size();
    if (hooks_ == 0) hooks_ = programs;
    EXPECT_EQ(programs, hooks_);
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
  void upgrade_is_whole_or_nothing(Place place, const std::function<void()>& prepare = {}) {
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
        expect_all_hooks();
        return false;
      }
      expect_told(finished);
      return expect_old_or_new();
    };
    each_fails(place, 3, 1, attempt, [&] {
      // What is loaded over keeps its hooks: each attempt is to add them.
      unload_again(prepare);
      load_again(before(), prepare);
      expect_old();
    });
  }

  void removal_is_done_or_told(Place place, const std::function<void()>& prepare = {}) {
    load_again(before(), prepare);
    const auto attempt = [&](const Fault& fault) {
      const Finished finished = unload([&] {
        if (prepare) prepare();
        fault.prepare();
      });
      expect_no_wrong_reason(finished);
      if (finished.exit_code == fine) {
        expect_nothing_left();
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
    each_fails(place, 3, 1, attempt, [&] {
      load_again(before(), prepare);
      expect_old();
    });
  }

  /// To a child, this kernel has no bpf_link.
  static void take_links() { forbid({{SYS_bpf, BPF_LINK_CREATE, EINVAL}}); }

  const NamedServer one_{"one"};
  const NamedServer two_{"two"};
  int told_ = 0;
  std::size_t hooks_ = 0;

  std::string before() const { return toml({{"web", "10.96.0.1", 80, {backend(one_)}}}); }
  /// With more hooks, and, with `many`, more services than the maps of `before` have room for.
  std::string after(std::uint32_t many) const {
    auto services = more_services(many, backend(two_));
    services.push_back({"web", "10.96.0.1", 80, {backend(two_)}});
    services.push_back({"new", "10.96.0.2", 80, {backend(two_)}, "refuse", "policy = \"least_conn\"\n"});
    return toml(services, {1024, 4096});
  }
};

class Probe : public Running {};

TEST_F(Probe, TakesNoShortageForWhatThisKernelLacks) {
  const Call call{"ProgLoad", "bpf", BPF_PROG_LOAD, ENOMEM};
  const auto probe = [](const Fault& fault) {
    Process process({CLUSTERIP_COMMAND, "probe", "--json", "--plugin", CLUSTERIP_PLUGIN_PATH}, nullptr,
                    [&] { fault.prepare(); });
    return process.wait();
  };
  const Fault none = Fault::none(call);
  const Finished all = probe(none);
  ASSERT_EQ(all.exit_code, fine) << all.err;
  int told = 0;
  for (int nth = 1; nth <= none.counted(); ++nth) {
    const Fault fault(call, nth);
    const Finished seen = probe(fault);
    EXPECT_TRUE(fault.was_injected()) << nth;
    if (seen.exit_code == fine) {
      EXPECT_EQ(seen.out, all.out) << nth << " of " << none.counted();
    } else {
      EXPECT_THAT(seen.err, testing::ContainsRegex("trying .*: Cannot allocate memory")) << nth;
      ++told;
    }
  }
  std::printf("%d of %d are told\n", told, none.counted());
}

class Upgrade : public BpfFault {};

TEST_P(Upgrade, IsWholeOrNothing) { upgrade_is_whole_or_nothing(upgrade); }
INSTANTIATE_TEST_SUITE_P(Each, Upgrade, testing::ValuesIn(rows_of(upgrade)), name_of);

class UpgradeWithoutLinks : public BpfFault {};

TEST_P(UpgradeWithoutLinks, IsWholeOrNothing) { upgrade_is_whole_or_nothing(upgrade_without_links, take_links); }
INSTANTIATE_TEST_SUITE_P(Each, UpgradeWithoutLinks, testing::ValuesIn(rows_of(upgrade_without_links)), name_of);

class FirstLoad : public BpfFault {};

TEST_P(FirstLoad, LeavesNothingBehind) {
  const auto attempt = [&](const Fault& fault) {
    const Finished finished = load(after(1), [&] { fault.prepare(); });
    expect_no_wrong_reason(finished);
    if (finished.exit_code == fine) {
      expect_new();
      expect_all_hooks();
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
  each_fails(first, 2, 1, attempt, [&] { unload_again(); });
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
      return false;
    }
    expect_told(finished);
    const bool is_new = ask("10.96.0.1", 80) == answered_by("two");
    expect(is_new ? "two" : "one", !is_new);
    return !is_new;
  };
  each_fails(within, 2, 1, attempt, [&] {
    load_again(more);
    expect("one", true);
    connect();
  });
}
INSTANTIATE_TEST_SUITE_P(Each, WithinTheMaps, testing::ValuesIn(rows_of(within)), name_of);

class Removal : public BpfFault {};

TEST_P(Removal, IsDoneOrTold) { removal_is_done_or_told(removal); }
INSTANTIATE_TEST_SUITE_P(Each, Removal, testing::ValuesIn(rows_of(removal)), name_of);

class RemovalWithoutLinks : public BpfFault {};

TEST_P(RemovalWithoutLinks, IsDoneOrTold) { removal_is_done_or_told(removal_without_links, take_links); }
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
      expect_reason(told.substr(0, told.find(": the configuration that serves goes on serving")));
      EXPECT_EQ(ask(proxied_vip, vip_port), answered_by(expect_old_or_new() ? "one" : "two"));
    } else {
      expect_new_of_both();
    }
    const std::string again = service.reload(next);
    EXPECT_THAT(again, Not(HasSubstr("goes on serving")));
    expect_new_of_both();
    EXPECT_EQ(service.terminate().exit_code, fine);
    return false;
  };
  each_fails(reload, 1, 0, attempt, [&] { unload_again(); });
}
INSTANTIATE_TEST_SUITE_P(Each, Reload, testing::ValuesIn(rows_of(reload)), name_of);

class Beginning : public BpfFault {};

TEST_P(Beginning, ServesOrSaysWhyNotAndLeavesNothing) {
  const auto config = files(proxy_toml({web({backend(two_)}), proxied({backend(two_)})}));
  const auto attempt = [&](const Fault& fault) {
    Process service({CLUSTERIP_COMMAND, "run", "--config", config->config(), "--plugin", CLUSTERIP_PLUGIN_PATH},
                    nullptr, [&] { fault.prepare(); });
    try {
      EXPECT_THAT(service.wait_for_error("serving "), HasSubstr("1 by the fast path, 1 by the userspace engine"));
    } catch (const std::runtime_error&) {
      const Finished finished = service.wait();
      EXPECT_EQ(finished.exit_code, failed);
      expect_told(finished);
      expect_no_wrong_reason(finished);
      expect_nothing_left();
      return true;
    }
    EXPECT_EQ(ask(fast_vip, vip_port), answered_by("two"));
    EXPECT_EQ(ask(proxied_vip, vip_port), answered_by("two"));
    ::kill(service.pid(), SIGTERM);
    EXPECT_EQ(service.wait().exit_code, fine);
    return false;
  };
  each_fails(beginning, 1, 1, attempt, [&] { unload_again(); });
}
INSTANTIATE_TEST_SUITE_P(Each, Beginning, testing::ValuesIn(rows_of(beginning)), name_of);

class Look : public BpfFault {};

TEST_P(Look, ShowsAllOrSaysWhyNot) {
  load_again(after(1));
  const std::vector<std::string> command = {CLUSTERIP_COMMAND,    "status", "--pin", pin(), "--plugin",
                                            CLUSTERIP_PLUGIN_PATH};
  const Finished all = run(command);
  ASSERT_EQ(all.exit_code, fine) << all.err;
  ASSERT_THAT(all.out, HasSubstr("10.96.0.2"));
  const auto attempt = [&](const Fault& fault) {
    Process process(command, nullptr, [&] { fault.prepare(); });
    const Finished finished = process.wait();
    expect_no_wrong_reason(finished);
    // What the canary lacks stands in the first line, and is no reason to show less.
    const auto services = [](const std::string& out) { return out.substr(out.find('\n') + 1); };
    if (finished.exit_code == fine) {
      EXPECT_EQ(finished.out, all.out);
    } else if (finished.out.contains("canary: FAILED: ")) {
      EXPECT_EQ(services(finished.out), services(all.out));
      EXPECT_EQ(finished.err, "");
      expect_reason(finished.out);
    } else {
      expect_told(finished);
    }
    return false;
  };
  each_fails(look, 2, 1, attempt, [] {});
}
INSTANTIATE_TEST_SUITE_P(Each, Look, testing::ValuesIn(rows_of(look)), name_of);

class LittleMemory : public BpfFault {
 protected:
  Finished load_with(rlim_t kib) {
    return load(after(300), [kib] {
      const rlimit limit{kib << 10, kib << 10};
      ::setrlimit(RLIMIT_AS, &limit);
    });
  }

  /// Where the dynamic linker, or what a library does before main(), has not enough: 127, and an abort of libstdc++'s
  /// ("terminate called") when yaml-cpp's own initialization runs out.
  static bool is_ours(int code) {
    constexpr int not_even_started = 127, aborted_before_main = 128 + 6;
    return code != not_even_started && code != aborted_before_main;
  }

  static void expect_out_of_memory(const Finished& finished) {
    expect_no_wrong_reason(finished);
    EXPECT_THAT(finished.err,
                AnyOf(HasSubstr("failed to map segment from shared object"), HasSubstr("Cannot allocate memory"),
                      HasSubstr("out of memory"), HasSubstr("not enough memory")));
  }

  /// `attempt` with limits in KiB, as many as it takes to find the least that suffices, and around that one; `below` of
  /// them below.
  static rlim_t around_the_least(int below, const std::function<bool(rlim_t)>& attempt) {
    rlim_t too_little = 4 << 10;
    rlim_t enough = 400 << 10;
    while (enough - too_little > 64) {
      const rlim_t middle = (too_little + enough) / 2;
      (attempt(middle) ? enough : too_little) = middle;
    }
    // Whatever a build is like, between "cannot be started" and "fine" are some MiB.
    for (int i = 1; i <= below; ++i) attempt(too_little - static_cast<rlim_t>(i) * 320);
    for (int i = 1; i <= 2; ++i) attempt(enough + static_cast<rlim_t>(i) * 512);
    return enough;
  }
};

TEST_F(LittleMemory, LoadIsWholeOrNothing) {
  ASSERT_EQ(load(before()).exit_code, fine);
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
    expect_one_line(finished);
    expect_out_of_memory(finished);
    return false;
  };
  const rlim_t enough = around_the_least(12, attempt);
  EXPECT_GE(refused, 5);
  EXPECT_GE(loaded, 2);
  std::printf("from %lu KiB on it is loaded: %d refused, %d loaded\n", enough, refused, loaded);
}

TEST_F(LittleMemory, ProgramsThatServeBeginOrSayWhyNot) {
  const auto both =
      files(proxy_toml({web({backend(two_)}), proxied({backend(two_)})}, {}, {}), "on_exit = \"detach\"\n");
  const auto one = files(proxy_toml({proxied({backend(two_)})}));
  const std::vector<std::vector<std::string>> programs = {
      {CLUSTERIP_COMMAND, "run", "--config", both->config(), "--plugin", CLUSTERIP_PLUGIN_PATH},
      {CLUSTERIP_FALLBACK_PROXY, "--config", one->config()}};
  for (const auto& command : programs) {
    SCOPED_TRACE(command.front());
    int refused = 0;
    const auto attempt = [&](rlim_t kib) {
      SCOPED_TRACE(fmt::format("{} KiB", kib));
      Process program(command, nullptr, [kib] {
        const rlimit limit{kib << 10, kib << 10};
        ::setrlimit(RLIMIT_AS, &limit);
      });
      try {
        program.wait_for_error("serving ");
      } catch (const std::runtime_error&) {
        const Finished finished = program.wait();
        if (!is_ours(finished.exit_code)) return false;
        ++refused;
        expect_one_line(finished);
        expect_out_of_memory(finished);
        return false;
      }
      EXPECT_EQ(ask(proxied_vip, vip_port), answered_by("two"));
      ::kill(program.pid(), SIGTERM);
      const Finished finished = program.wait();
      EXPECT_EQ(finished.exit_code, fine) << finished.err;
      return true;
    };
    const rlim_t enough = around_the_least(4, attempt);
    EXPECT_GE(refused, 3);
    std::printf("from %lu KiB on it serves: %d refused\n", enough, refused);
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
