// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "tests/support/fd.h"
#include "tests/support/process.h"

namespace support {

/// Run in the shell; throws when it fails, with what it wrote to stderr.
void shell(const std::string& line);

/// Another host, as far as the network can tell: a network namespace at the far end of a virtual cable. It has
/// 10.244.0.2 and .3, fd00:244::2 and ::3; this end of the cable is `cable0`, 10.244.0.1 and fd00:244::1, and its
/// default routes lead there. One at a time.
class OtherHost {
 public:
  OtherHost();
  ~OtherHost();
  OtherHost(const OtherHost&) = delete;
  OtherHost& operator=(const OtherHost&) = delete;

  static constexpr const char* v4 = "10.244.0.2";
  static constexpr const char* more_v4 = "10.244.0.3";
  static constexpr const char* v6 = "fd00:244::2";
  static constexpr const char* more_v6 = "fd00:244::3";
  static constexpr const char* client_v4 = "10.244.0.1";
  static constexpr const char* client_v6 = "fd00:244::1";

  /// A program that runs there.
  Process start(const std::vector<std::string>& command) const;

  /// While this lives, sockets of this thread are made there.
  class Stay {
   public:
    explicit Stay(const OtherHost& host);
    ~Stay();
    Stay(const Stay&) = delete;
    Stay& operator=(const Stay&) = delete;

   private:
    const OtherHost& host_;
  };

 private:
  Fd here_;
  Fd there_;
};

}  // namespace support
