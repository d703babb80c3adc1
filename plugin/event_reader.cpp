// SPDX-License-Identifier: BSD-2-Clause
#include "plugin/event_reader.h"

#include <bpf/bpf.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <utility>

namespace plugin {

Result<EventReader> EventReader::open(const Fd& ring) {
  EventReader reader;
  bpf_map_info info{};
  std::uint32_t length = sizeof info;
  reader.ring_ = Fd(fcntl(ring.get(), F_DUPFD_CLOEXEC, 0));
  if (!reader.ring_ || bpf_obj_get_info_by_fd(ring.get(), &info, &length) != 0) {
    return fail_errno(errno, "opening Event_Ring");
  }
  reader.page_ = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  reader.size_ = info.max_entries;
  void* consumer = mmap(nullptr, reader.page_, PROT_READ | PROT_WRITE, MAP_SHARED, reader.ring_.get(), 0);
  if (consumer == MAP_FAILED) {
    return fail_errno(errno, "mapping Event_Ring");
  }
  reader.consumer_ = consumer;
  void* producer = mmap(nullptr, reader.page_ + 2 * reader.size_, PROT_READ, MAP_SHARED, reader.ring_.get(),
                        static_cast<off_t>(reader.page_));
  if (producer == MAP_FAILED) {
    return fail_errno(errno, "mapping Event_Ring");
  }
  reader.producer_ = producer;
  return reader;
}

EventReader::EventReader(EventReader&& other) noexcept
    : ring_(std::move(other.ring_)),
      page_(other.page_),
      size_(other.size_),
      consumer_(std::exchange(other.consumer_, nullptr)),
      producer_(std::exchange(other.producer_, nullptr)) {}

EventReader::~EventReader() {
  if (consumer_ != nullptr) {
    munmap(consumer_, page_);
  }
  if (producer_ != nullptr) {
    munmap(const_cast<void*>(producer_), page_ + 2 * size_);
  }
}

/// The protocol of kernel/bpf/ringbuf.c: each element has a header whose length is stored last, with its busy bit
/// clear.
int EventReader::read(const std::function<int(const event&)>& visit) const {
  const std::atomic_ref consumed(*static_cast<unsigned long*>(consumer_));
  const std::atomic_ref produced(*static_cast<unsigned long*>(const_cast<void*>(producer_)));
  const char* data = static_cast<const char*>(producer_) + page_;
  int count = 0;
  unsigned long at = consumed.load(std::memory_order_acquire);
  while (at < produced.load(std::memory_order_acquire)) {
    const char* element = data + (at & (size_ - 1));
    const std::atomic_ref header(*reinterpret_cast<std::uint32_t*>(const_cast<char*>(element)));
    const std::uint32_t length = header.load(std::memory_order_acquire);
    if ((length & BPF_RINGBUF_BUSY_BIT) != 0) {
      break;
    }
    const std::uint32_t bytes = length & ~(BPF_RINGBUF_BUSY_BIT | BPF_RINGBUF_DISCARD_BIT);
    event seen{};
    std::memcpy(&seen, element + BPF_RINGBUF_HDR_SZ, std::min<std::size_t>(bytes, sizeof seen));
    constexpr unsigned long alignment = 8;
    at += (bytes + BPF_RINGBUF_HDR_SZ + alignment - 1) / alignment * alignment;
    consumed.store(at, std::memory_order_release);  // before the visitor: it may throw
    if ((length & BPF_RINGBUF_DISCARD_BIT) != 0) {
      continue;
    }
    ++count;
    if (const int stop = visit(seen); stop != 0) {
      return stop < 0 ? stop : count;
    }
  }
  return count;
}

}  // namespace plugin
