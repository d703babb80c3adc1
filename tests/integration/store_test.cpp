// SPDX-License-Identifier: BSD-2-Clause
//
// What a connect() finds between any two stores of a change. The torture test meets what goes wrong between them by
// chance; here one is made behind each store.
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <csignal>
#include <fstream>
#include <functional>
#include <sstream>

#include "tests/support/fixture.h"

namespace {

using namespace support;

#ifdef __x86_64__

/// Calls `look` behind each store of this process into a BPF map that it has mapped: they are read-only, a store
/// faults, is let through as a single step, and they are read-only again. For the stores of one thread.
class StoreWatch {
 public:
  explicit StoreWatch(std::function<void()> look) : look_(std::move(look)) {
    std::ifstream maps("/proc/self/maps");
    for (std::string line; std::getline(maps, line);) {
      std::uintptr_t begin = 0, end = 0;
      char dash = 0;
      std::string rights;
      std::istringstream(line) >> std::hex >> begin >> dash >> end >> rights;
      if (rights == "rw-s" && line.ends_with("anon_inode:bpf-map")) mappings_.push_back({begin, end});
    }
    current = this;
    handle(SIGSEGV, on_store, before_store_);
    handle(SIGTRAP, behind_store, before_trap_);
    let_write(false);
  }
  ~StoreWatch() {
    let_write(true);
    ::sigaction(SIGSEGV, &before_store_, nullptr);
    ::sigaction(SIGTRAP, &before_trap_, nullptr);
    current = nullptr;
  }
  StoreWatch(const StoreWatch&) = delete;
  StoreWatch& operator=(const StoreWatch&) = delete;

  std::size_t mappings() const { return mappings_.size(); }
  std::size_t stores() const { return stores_; }

 private:
  static constexpr greg_t trap_flag = 0x100;  // of EFLAGS: a trap behind the next instruction

  struct Mapping {
    std::uintptr_t begin = 0;
    std::uintptr_t end = 0;
  };

  using Handler = void (*)(int, siginfo_t*, void*);

  static void handle(int signal, Handler handler, struct sigaction& before) {
    struct sigaction action{};
    action.sa_sigaction = handler;
    action.sa_flags = SA_SIGINFO;
    checked(::sigaction(signal, &action, &before), "sigaction");
  }

  void let_write(bool allowed) const {
    for (const Mapping& mapping : mappings_)
      checked(::mprotect(reinterpret_cast<void*>(mapping.begin), mapping.end - mapping.begin,
                         allowed ? PROT_READ | PROT_WRITE : PROT_READ),
              "mprotect");
  }

  static void on_store(int /*signal*/, siginfo_t* info, void* context) {
    const auto address = reinterpret_cast<std::uintptr_t>(info->si_addr);
    if (std::ranges::none_of(current->mappings_,
                             [&](const Mapping& one) { return one.begin <= address && address < one.end; })) {
      ::sigaction(SIGSEGV, &current->before_store_, nullptr);  // a mistake somewhere: it faults once more
      return;
    }
    current->let_write(true);
    static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_EFL] |= trap_flag;
  }
  static void behind_store(int /*signal*/, siginfo_t* /*info*/, void* context) {
    static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_EFL] &= ~trap_flag;
    current->let_write(false);
    ++current->stores_;
    current->look_();
  }

  static inline StoreWatch* current = nullptr;

  std::function<void()> look_;
  std::vector<Mapping> mappings_;
  std::size_t stores_ = 0;
  struct sigaction before_store_{};
  struct sigaction before_trap_{};
};

struct Servers {
  const NamedServer one{"one"}, two{"two"};
  /// Of a service that comes first: what is not written yet is zero, and leads there.
  const NamedServer three{"three"};
};

class Store : public Integration {
 protected:
  /// What 10.96.0.1:80 answers behind each store of a change; the same in a row once.
  std::vector<Answer> answers(const std::string& from, const std::string& to) {
    Handle handle = serve(from);
    std::vector<Answer> found;
    StoreWatch watch([&found] {
      Answer answer = ask("10.96.0.1", 80);
      if (found.empty() || found.back() != answer) found.push_back(std::move(answer));
    });
    EXPECT_GT(watch.mappings(), 3U);
    EXPECT_TRUE(ok(handle.load(to)));
    stores_ = watch.stores();
    return found;
  }

  std::size_t stores_ = 0;
};

TEST_F(Store, ConnectFindsTheOldBackendThenTheNew) {
  const Servers servers;
  const auto with = [&](const NamedServer& server) {
    return toml({{"first", "10.96.0.3", 80, {backend(servers.three)}}, {"web", "10.96.0.1", 80, {backend(server)}}});
  };
  EXPECT_THAT(answers(with(servers.one), with(servers.two)),
              testing::ElementsAre(answered_by("one"), answered_by("two")));
  EXPECT_GT(stores_, 5U);
}

TEST_F(Store, ConnectFindsABackendWhileThePolicyChanges) {
  const Servers servers;
  // Another service makes room: with new maps, nothing would be stored into those that are watched.
  const auto with = [&](std::string_view policy, std::string_view of_another, const std::vector<Backend>& backends) {
    return toml({{"first", "10.96.0.3", 80, {backend(servers.three)}},
                 {"web", "10.96.0.1", 80, backends, "refuse", fmt::format("policy = \"{}\"\n", policy)},
                 {"other", "10.96.0.2", 80, backends, "refuse", fmt::format("policy = \"{}\"\n", of_another)}});
  };
  for (const auto& [from, to] : {std::pair{"random", "random"},
                                 {"random", "round_robin"},
                                 {"random", "least_conn"},
                                 {"random", "maglev"},
                                 {"round_robin", "random"},
                                 {"least_conn", "random"}}) {
    SCOPED_TRACE(fmt::format("{} to {}", from, to));
    EXPECT_THAT(answers(with(from, to, {backend(servers.one), backend(servers.two)}),
                        with(to, from, {backend(servers.two), backend(servers.one)})),
                testing::Each(testing::AnyOf(answered_by("one"), answered_by("two"))));
    EXPECT_GT(stores_, 5U);
  }
}

TEST_F(Store, ServiceIsThereAtOnceAndGoneAtOnce) {
  const Servers servers;
  const std::string without = toml({{"other", "10.96.0.2", 80, {backend(servers.one)}}});
  const std::string with =
      toml({{"other", "10.96.0.2", 80, {backend(servers.one)}}, {"web", "10.96.0.1", 80, {backend(servers.two)}}});
  const Answer no_vip = refused_with(ENETUNREACH), no_service = refused_by_program(ECONNREFUSED);
  EXPECT_THAT(answers(without, with), testing::ElementsAre(no_vip, no_service, answered_by("two")));
  EXPECT_THAT(answers(with, without), testing::ElementsAre(answered_by("two"), no_service, no_vip));
}

#endif

}  // namespace
