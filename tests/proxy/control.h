// SPDX-License-Identifier: BSD-2-Clause
//
// For tests that speak to the control socket of a proxy.
#pragma once

#include <algorithm>
#include <boost/json.hpp>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "fallback_proxy/control_client.h"
#include "tests/proxy/proxied.h"

namespace support {

using boost::json::object;
using userspace::ControlClient;

inline constexpr int fine = 0, failed = 1, usage = 2, configuration = 3;

inline ControlClient connect_to(const FallbackProxy::Files& files) {
  auto client = ControlClient::connect(files.control());
  if (!client) throw std::runtime_error(client.error().message);
  if (!*client) throw std::runtime_error("nobody listens at " + files.control());
  return std::move(**client);
}

inline object ask_for(const FallbackProxy::Files& files, const object& request) {
  const auto answer = connect_to(files).ask(request);
  if (!answer) throw std::runtime_error(answer.error().message);
  return *answer;
}

inline object status(const FallbackProxy::Files& files) { return ask_for(files, {{"request", "status"}}); }

inline std::uint64_t number(const object& of, std::string_view key) { return of.at(key).to_number<std::uint64_t>(); }

/// The program with these arguments, until it ends.
inline Finished fallback_proxy(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), CLUSTERIP_FALLBACK_PROXY);
  return run(arguments);
}

inline std::ptrdiff_t lines(const std::string& text) { return std::ranges::count(text, '\n'); }

inline bool contains(const std::string& text, const std::string& piece) {
  return text.find(piece) != std::string::npos;
}

}  // namespace support
