// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include "config/fail.h"

namespace plugin {

using config::Error;
using config::fail;
using config::fail_errno;
using config::Result;

}  // namespace plugin
