// SPDX-License-Identifier: BSD-2-Clause
//
// What happens after a fixed time, for many objects at once: since all wait equally long, the order in which they came
// is the order in which they are due, and a list is enough. No timer per connection, no allocation.
#pragma once

#include <boost/intrusive/list.hpp>
#include <optional>

#include "fallback_proxy/backend.h"

namespace userspace {

/// Base of what can wait. It leaves its list when it is destroyed.
struct Waiting : boost::intrusive::list_base_hook<boost::intrusive::link_mode<boost::intrusive::auto_unlink>> {
  Clock::time_point due;
};

template <class Item>
class Deadlines {
 public:
  /// 0: nothing ever waits here.
  explicit Deadlines(Clock::duration time) : time_(time) {}

  bool is_used() const { return time_ != Clock::duration::zero(); }
  Clock::duration time() const { return time_; }

  /// Adds it, or moves it to the end.
  void add(Item& item, Clock::time_point now) {
    Waiting& waiting = item;
    if (waiting.is_linked()) waiting.unlink();
    waiting.due = now + time_;
    items_.push_back(item);
  }

  std::optional<Clock::time_point> next() const {
    if (items_.empty()) return {};
    return items_.front().due;
  }

  /// The one that waits for longest. Null when none waits.
  Item* first() { return items_.empty() ? nullptr : &items_.front(); }

  /// Takes the first out if it is due.
  Item* pop(Clock::time_point now) {
    if (items_.empty() || items_.front().due > now) return nullptr;
    Item& item = items_.front();
    items_.pop_front();
    return &item;
  }

 private:
  Clock::duration time_;
  boost::intrusive::list<Item, boost::intrusive::constant_time_size<false>> items_;
};

}  // namespace userspace
