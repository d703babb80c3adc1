// SPDX-License-Identifier: BSD-2-Clause
//
// The rules that hold between services and between backends: what one key alone cannot break.
#pragma once

#include <string>
#include <vector>

#include "config/mistakes.h"

namespace config {

/// Where the file says what a service is known by.
struct ServicePositions {
  Position name;
  Position vip;
  Position proxy_protocol;
  Position health;
  Position eject;
};

/// How messages call a service: by its name, or by its place among the services.
std::string service_label(const Service& service, std::size_t index);

/// `positions` has one element per service. A value that could not be read (no name, port 0, the unspecified address)
/// has been reported already and is passed over.
void validate(const Config& config, const std::vector<ServicePositions>& positions, Mistakes& mistakes);

}  // namespace config
