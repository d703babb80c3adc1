// SPDX-License-Identifier: BSD-2-Clause
//
// What the connections of one thread of the userspace engine share: deadlines, pipes, and their number.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <atomic>
#include <iterator>
#include <optional>
#include <thread>
#include <vector>

#include "fallback_proxy/admission.h"
#include "fallback_proxy/deadlines.h"
#include "fallback_proxy/pipe_pool.h"

namespace {

using namespace std::chrono_literals;
using userspace::Admission;
using userspace::Clock;
using userspace::Deadlines;
using userspace::Pipe;
using userspace::PipePool;

struct Item : userspace::Waiting {};

const Clock::time_point start = Clock::now();

TEST(Deadlines, AreDueInTheOrderInWhichTheyCame) {
  Deadlines<Item> deadlines(1s);
  Item one, two;
  EXPECT_EQ(deadlines.next(), std::nullopt);
  deadlines.add(one, start);
  deadlines.add(two, start + 100ms);
  EXPECT_EQ(deadlines.next(), start + 1s);
  EXPECT_EQ(deadlines.pop(start + 999ms), nullptr);
  EXPECT_EQ(deadlines.pop(start + 1s), &one);
  EXPECT_EQ(deadlines.pop(start + 1s), nullptr);
  EXPECT_EQ(deadlines.next(), start + 1100ms);
  EXPECT_EQ(deadlines.pop(start + 2s), &two);
  EXPECT_EQ(deadlines.next(), std::nullopt);
}

TEST(Deadlines, ArePutOffByAddingAgain) {
  Deadlines<Item> deadlines(1s);
  Item one, two;
  deadlines.add(one, start);
  deadlines.add(two, start);
  deadlines.add(one, start + 500ms);
  EXPECT_EQ(deadlines.pop(start + 1s), &two);
  EXPECT_EQ(deadlines.pop(start + 1s), nullptr);
  EXPECT_EQ(deadlines.pop(start + 1500ms), &one);
}

TEST(Deadlines, MoveWithTheirItem) {
  Deadlines<Item> first(1s), second(2s);
  Item one;
  first.add(one, start);
  second.add(one, start);
  EXPECT_EQ(first.next(), std::nullopt);
  EXPECT_EQ(second.pop(start + 2s), &one);
}

TEST(Deadlines, AreForgottenWithTheirItem) {
  Deadlines<Item> deadlines(1s);
  Item other;
  {
    Item one;
    deadlines.add(one, start);
    deadlines.add(other, start);
  }
  EXPECT_EQ(deadlines.pop(start + 1s), &other);
  EXPECT_EQ(deadlines.pop(start + 1s), nullptr);
}

TEST(Deadlines, OfNoTimeAreUnused) {
  EXPECT_FALSE(Deadlines<Item>(0s).is_used());
  EXPECT_TRUE(Deadlines<Item>(1ms).is_used());
}

TEST(PipesOfAPool, AreNoMoreThanItsLimit) {
  PipePool pool(2);
  auto one = pool.take();
  auto two = pool.take();
  ASSERT_TRUE(one && two);
  EXPECT_FALSE(pool.take());
  pool.give_back(std::move(*one));
  EXPECT_TRUE(pool.take());
  EXPECT_FALSE(pool.take());
  pool.discard(std::move(*two));
  EXPECT_TRUE(pool.take());
}

TEST(PipesOfAPool, AreUsedAgain) {
  PipePool pool(2);
  auto one = pool.take();
  ASSERT_TRUE(one);
  const int read = one->read.get();
  pool.give_back(std::move(*one));
  one = pool.take();
  ASSERT_TRUE(one);
  EXPECT_EQ(one->read.get(), read);
}

TEST(PipesOfAPool, AreKeptOnlyInSmallNumber) {
  const auto open_files = [] {
    int count = 0;
    for (int fd = 0; fd < 1024; ++fd) count += ::fcntl(fd, F_GETFD) >= 0;
    return count;
  };
  const int before = open_files();
  PipePool pool(100);
  std::vector<Pipe> taken;
  for (int i = 0; i < 100; ++i) {
    auto pipe = pool.take();
    ASSERT_TRUE(pipe);
    taken.push_back(std::move(*pipe));
  }
  EXPECT_EQ(open_files(), before + 200);
  for (Pipe& pipe : taken) pool.give_back(std::move(pipe));
  EXPECT_LE(open_files(), before + 32);
  EXPECT_GT(open_files(), before);
}

TEST(PipesOfAPool, HoldAsMuchAsTheySay) {
  PipePool pool(1);
  auto pipe = pool.take();
  ASSERT_TRUE(pipe);
  EXPECT_EQ(pipe->capacity, static_cast<std::size_t>(::fcntl(pipe->read.get(), F_GETPIPE_SZ)));
  // It never blocks, and no child inherits it.
  for (const int fd : {pipe->read.get(), pipe->write.get()}) {
    EXPECT_NE(::fcntl(fd, F_GETFL) & O_NONBLOCK, 0);
    EXPECT_NE(::fcntl(fd, F_GETFD) & FD_CLOEXEC, 0);
  }
}

TEST(PipesOfAPool, AreMissingWithoutDescriptors) {
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &before), 0);
  const rlimit none{0, before.rlim_max};
  PipePool pool(1);
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &none), 0);
  const auto pipe = pool.take();
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &before), 0);
  EXPECT_FALSE(pipe);
  // The attempt does not count.
  EXPECT_TRUE(pool.take());
}

TEST(Admissions, AreSoManyAndNoMore) {
  Admission admission(4, 4);  // descriptors: two for each connection
  EXPECT_EQ(admission.limit(), 2);
  EXPECT_TRUE(admission.take());
  EXPECT_TRUE(admission.take());
  EXPECT_FALSE(admission.take());
  EXPECT_FALSE(admission.take());
  admission.give_back();
  EXPECT_TRUE(admission.take());
  EXPECT_FALSE(admission.take());
}

TEST(Admissions, LeaveRoomForListeners) {
  Admission admission(4, 4);
  admission.listener_opened();
  EXPECT_EQ(admission.limit(), 1);
  EXPECT_TRUE(admission.take());
  EXPECT_FALSE(admission.take());
  admission.listener_closed();
  EXPECT_EQ(admission.limit(), 2);
  EXPECT_TRUE(admission.take());
  for (int i = 0; i < 5; ++i) admission.listener_opened();
  EXPECT_EQ(admission.limit(), 0);
}

TEST(Admissions, OfFlowsLeaveRoomForConnections) {
  Admission admission(4, 2);
  EXPECT_TRUE(admission.take_flow());
  EXPECT_TRUE(admission.take_flow());
  EXPECT_FALSE(admission.take_flow());
  EXPECT_TRUE(admission.take());
  EXPECT_FALSE(admission.take());
  admission.give_back_flow();
  EXPECT_FALSE(admission.take()) << "a flow has one descriptor, a connection two";
  EXPECT_TRUE(admission.take_flow());
  admission.give_back();
  EXPECT_FALSE(admission.take_flow());
  EXPECT_TRUE(admission.take());
}

TEST(Admissions, OfFlowsWaitForConnectionsToo) {
  Admission admission(2, 2);
  EXPECT_TRUE(admission.take());
  EXPECT_FALSE(admission.take_flow());
  admission.give_back();
  EXPECT_TRUE(admission.take_flow());
  EXPECT_TRUE(admission.take_flow());
}

TEST(Admissions, AreNotLostAmongThreads) {
  constexpr int places = 3;
  Admission admission(std::int64_t{2} * places, 0);
  std::atomic<int> inside = 0;
  std::atomic<int> most = 0;
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int turn = 0; turn < 20000; ++turn) {
        if (!admission.take()) continue;
        const int now = ++inside;
        for (int seen = most; now > seen && !most.compare_exchange_weak(seen, now);) {
        }
        --inside;
        admission.give_back();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_LE(most, places);
  for (int i = 0; i < places; ++i) EXPECT_TRUE(admission.take());
  EXPECT_FALSE(admission.take());
}

}  // namespace
