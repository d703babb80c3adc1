// SPDX-License-Identifier: BSD-2-Clause
//
// Reads what a running service has answered. Another version may have: what is missing or of another kind throws, see
// userspace::ControlClient::understand().
#pragma once

#include <boost/json.hpp>
#include <cstdint>
#include <string>
#include <string_view>

#include "cli/endpoint.h"

namespace run {

inline std::string text(const boost::json::object& of, std::string_view key) {
  return boost::json::value_to<std::string>(of.at(key));
}

inline std::uint64_t number(const boost::json::object& of, std::string_view key) {
  return of.at(key).to_number<std::uint64_t>();
}

/// `address` and "port" as they are written together.
inline std::string endpoint(const boost::json::object& of, std::string_view address) {
  return cli::address_and_port(text(of, address), of.at("port").to_number<std::uint16_t>());
}

}  // namespace run
