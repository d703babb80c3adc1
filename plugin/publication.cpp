// SPDX-License-Identifier: BSD-2-Clause
//
// Apart from publisher.cpp so that the torture test can link a wrong protocol in its place and see that it notices.
#include "plugin/publication.h"

#include <atomic>

namespace plugin {

void publish(const Maps& maps, const Key& /*key*/, std::uint32_t record, const Block& block) {
  std::atomic_ref(maps.records()[record].word).store(encode_word(block), std::memory_order_release);
}

void withdraw(const Maps& maps, const Key& /*key*/, std::uint32_t record) {
  std::atomic_ref(maps.records()[record].word).store(0, std::memory_order_release);
}

}  // namespace plugin
