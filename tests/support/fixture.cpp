// SPDX-License-Identifier: BSD-2-Clause
#include "tests/support/fixture.h"

#include <filesystem>

namespace support {

void Integration::SetUp() {
  if (!missing_privilege().empty()) SKIP_OR_FAIL(missing_privilege());
  plugin_.emplace();
  cgroup_.emplace();
  cgroup_->enter();
  stderr_.emplace();
  open_files_ = open_files();
}

void Integration::TearDown() {
  if (!cgroup_) return;
  EXPECT_EQ(open_files(), open_files_) << "files were left open";
  EXPECT_EQ(stderr_->text(), "");
  stderr_.reset();
  Cgroup::leave();
  cgroup_.reset();
  std::error_code ignored;
  std::filesystem::remove_all(pin(), ignored);  // after a failure: the next test in this process begins with nothing
}

bool Integration::can(std::uint32_t capability) const {
  clusterip_capabilities found{};
  found.size = sizeof found;
  require(plugin().probe(&found, nullptr) == 0, "probe");
  return (found.can & capability) != 0;
}

Handle Integration::serve(const std::string& text, const Paths& paths) const {
  Handle handle(plugin(), paths);
  require_ok(handle.load(text));
  require_ok(handle.attach());
  return handle;
}

}  // namespace support
