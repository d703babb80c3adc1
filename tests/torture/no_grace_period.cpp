// SPDX-License-Identifier: BSD-2-Clause
//
// A planted fault, linked in place of plugin/grace_period.cpp: what was replaced is reused at once.
#include "plugin/grace_period.h"

namespace plugin {

Result<GracePeriod> GracePeriod::create() { return GracePeriod(); }

Result<void> GracePeriod::wait() const { return {}; }

bool GracePeriod::is_worth_it(std::uint64_t retired, std::uint64_t /*capacity*/) { return retired > 0; }

}  // namespace plugin
