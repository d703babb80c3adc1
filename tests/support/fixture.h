// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "tests/support/bpf_objects.h"
#include "tests/support/cgroup.h"
#include "tests/support/client.h"
#include "tests/support/environment.h"
#include "tests/support/named_server.h"
#include "tests/support/observe.h"
#include "tests/support/plugin.h"
#include "tests/support/process.h"
#include "tests/support/restrict.h"
#include "tests/support/toml.h"

/// Ends a test that this machine cannot run, with the reason: skipped, or failed where everything must run.
#define SKIP_OR_FAIL(reason)                     \
  do {                                           \
    if (support::must_run()) FAIL() << (reason); \
    GTEST_SKIP() << (reason);                    \
  } while (false)

namespace support {

/// A test with the real kernel: the process is in a cgroup of its own. Whatever a test does, nothing may appear on
/// stderr and no file may stay open.
class Integration : public testing::Test {
 protected:
  void SetUp() override;
  void TearDown() override;

  const Plugin& plugin() const { return *plugin_; }
  const Cgroup& cgroup() const { return *cgroup_; }

  /// For tests that load it themselves.
  void unload_plugin() { plugin_.reset(); }

  /// Where a test pins. Not there yet.
  static std::string pin() { return std::string(bpffs) + "/clusterip"; }

  Paths unpinned() const { return {cgroup().path(), {}, 0}; }
  Paths pinned() const { return {cgroup().path(), pin(), 0}; }

  /// Whether the plugin's probe finds this CLUSTERIP_CAN_*.
  bool can(std::uint32_t capability) const;

  /// A handle with this configuration, attached. Throws when that fails.
  Handle serve(const std::string& text, const Paths& paths) const;
  Handle serve(const std::string& text) const { return serve(text, unpinned()); }

 private:
  std::optional<Plugin> plugin_;
  std::optional<Cgroup> cgroup_;
  std::optional<StderrCapture> stderr_;
  std::size_t open_files_ = 0;
};

}  // namespace support
