// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "bpf/map_layout.h"
#include "plugin/fd.h"
#include "plugin/system_error.h"

namespace plugin {

/// The reading end of Event_Ring. Not libbpf's: that waits with epoll, and cannot end at an event.
class EventReader {
 public:
  /// Takes its own descriptor of the map.
  static Result<EventReader> open(const Fd& ring);

  EventReader(EventReader&& other) noexcept;
  EventReader& operator=(EventReader&&) = delete;
  ~EventReader();

  /// Polls readable when there are events.
  int descriptor() const { return ring_.get(); }

  /// Visits what is there, without waiting. Returns how many, or the first negative value of `visit`, which ends it.
  int read(const std::function<int(const event&)>& visit) const;

 private:
  EventReader() = default;

  Fd ring_;
  std::size_t page_ = 0;
  std::size_t size_ = 0;            // of the data; mapped twice in a row, so that no element is cut
  void* consumer_ = nullptr;        // one page: how far we are
  const void* producer_ = nullptr;  // one page: how far the kernel is; then the data
};

}  // namespace plugin
