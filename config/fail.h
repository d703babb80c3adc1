// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <cerrno>
#include <cstring>
#include <expected>
#include <string>
#include <utility>

#include "config/result.h"

namespace config {

/// A failure that is not about the configuration. `code` is a negative errno.
inline std::unexpected<Error> fail(int code, std::string message) {
  return std::unexpected(Error{.code = code, .message = std::move(message)});
}

/// "what: text of the errno", with what raises the limit of descriptors. `error` is the positive errno.
inline std::unexpected<Error> fail_errno(int error, std::string what) {
  // The GNU strerror_r: thread-safe, and may return a static string instead of filling the buffer.
  char buffer[128];
  const char* const remedy = error == EMFILE ? " (LimitNOFILE=, ulimit -n)" : "";
  return fail(-error, std::move(what) + ": " + strerror_r(error, buffer, sizeof buffer) + remedy);
}

}  // namespace config
