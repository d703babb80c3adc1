// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <string>

#include "config/fail.h"

namespace run {

/// What the proxy at the control socket `path` tells about itself: as it sends it (JSON), or as tables for people.
config::Result<std::string> show_status(const std::string& path, bool json);

}  // namespace run
