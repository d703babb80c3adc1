// SPDX-License-Identifier: BSD-2-Clause
//
// Pipes for splice(). One pool per thread; used by that thread only.
#pragma once

#include <cstddef>
#include <optional>
#include <vector>

#include "config/fd.h"

namespace userspace {

struct Pipe {
  config::Fd read;
  config::Fd write;
  std::size_t capacity = 0;  // bytes
};

class PipePool {
 public:
  /// At most `limit` pipes exist at once: each takes two file descriptors.
  explicit PipePool(std::size_t limit) : limit_(limit) {}

  /// An empty pipe; nothing when there are none left, or the kernel gives none.
  std::optional<Pipe> take();
  /// Only empty ones.
  void give_back(Pipe pipe);
  /// One that holds bytes cannot be used again.
  void discard(Pipe pipe);

 private:
  std::size_t limit_;
  std::size_t taken_ = 0;
  std::vector<Pipe> free_;
};

}  // namespace userspace
