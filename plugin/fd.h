// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include "config/fd.h"

namespace plugin {

using config::Fd;

}  // namespace plugin
