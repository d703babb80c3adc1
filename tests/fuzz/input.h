// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <algorithm>
#include <cstddef>
#include <string_view>

namespace fuzz {

/// The bytes of an input, taken one after the other. Behind its end there are zeros.
class Input {
 public:
  Input(const unsigned char* data, std::size_t size) : data_(data), size_(size) {}

  bool is_over() const { return size_ == 0; }

  unsigned char byte() {
    if (size_ == 0) return 0;
    --size_;
    return *data_++;
  }

  std::size_t below(std::size_t end) { return byte() % end; }
  bool flag() { return (byte() & 1) != 0; }

  /// At most so many bytes.
  std::string_view text(std::size_t most) {
    const std::size_t length = std::min(most, size_);
    const std::string_view taken(reinterpret_cast<const char*>(data_), length);
    data_ += length;
    size_ -= length;
    return taken;
  }

 private:
  const unsigned char* data_;
  std::size_t size_;
};

}  // namespace fuzz
