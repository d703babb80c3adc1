// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <string>

namespace support {

/// Makes the addresses of a network ("10.96.0.0/16", "fd00::/64") reachable by way of `lo`, where nobody answers for
/// them, until this object ends.
class Route {
 public:
  explicit Route(std::string network);
  ~Route();
  Route(const Route&) = delete;
  Route& operator=(const Route&) = delete;

 private:
  std::string network_;
};

}  // namespace support
