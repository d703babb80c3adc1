// SPDX-License-Identifier: BSD-2-Clause
#include "fallback_proxy/pipe_pool.h"

#include <fcntl.h>
#include <unistd.h>

#include <utility>

namespace userspace {
namespace {

// Larger ones save system calls no more, and count against fs.pipe-user-pages-soft.
constexpr int wanted_capacity = 256 * 1024;
constexpr std::size_t kept = 16;  // free ones

}  // namespace

std::optional<Pipe> PipePool::take() {
  if (!free_.empty()) {
    Pipe pipe = std::move(free_.back());
    free_.pop_back();
    ++taken_;
    return pipe;
  }
  int ends[2];
  if (taken_ >= limit_ || ::pipe2(ends, O_CLOEXEC | O_NONBLOCK) != 0) return {};
  ++taken_;
  Pipe pipe{config::Fd(ends[0]), config::Fd(ends[1])};
  // Beyond fs.pipe-user-pages-soft an unprivileged process keeps what it was given.
  int capacity = ::fcntl(pipe.write.get(), F_SETPIPE_SZ, wanted_capacity);
  if (capacity < 0) capacity = ::fcntl(pipe.write.get(), F_GETPIPE_SZ);
  pipe.capacity = static_cast<std::size_t>(capacity);
  return pipe;
}

void PipePool::give_back(Pipe pipe) {
  --taken_;
  if (free_.size() < kept) free_.push_back(std::move(pipe));
}

void PipePool::discard(Pipe) { --taken_; }

}  // namespace userspace
