// SPDX-License-Identifier: BSD-2-Clause
//
// The plugin as a host has it: loaded with dlopen, known by its header alone.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <iosfwd>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "plugin/include/clusterip.h"
#include "tests/support/client.h"
#include "tests/support/toml.h"

namespace support {

/// libclusterip.so.1, unloaded with this object.
class Plugin {
 public:
  Plugin();

 private:
  struct Close {
    void operator()(void* library) const;
  };
  void* find(const char* symbol) const;
  template <class Function>
  Function find(const char* symbol) const {
    return reinterpret_cast<Function>(find(symbol));
  }

  std::unique_ptr<void, Close> library_;

 public:
  decltype(&clusterip_abi_version) abi_version;
  decltype(&clusterip_version_string) version_string;
  decltype(&clusterip_probe) probe;
  decltype(&clusterip_open) open;
  decltype(&clusterip_load_file) load_file;
  decltype(&clusterip_load_text) load_text;
  decltype(&clusterip_check_text) check_text;
  decltype(&clusterip_set_backends) set_backends;
  decltype(&clusterip_set_backend_state) set_backend_state;
  decltype(&clusterip_refuse_left_out) refuse_left_out;
  decltype(&clusterip_attach) attach;
  decltype(&clusterip_detach) detach;
  decltype(&clusterip_resolve) resolve;
  decltype(&clusterip_visit_services) visit_services;
  decltype(&clusterip_canary) canary;
  decltype(&clusterip_original_destination) original_destination;
  decltype(&clusterip_event_fd) event_fd;
  decltype(&clusterip_read_events) read_events;
  decltype(&clusterip_close) close;
};

/// What a call returned, and what it said about it.
struct Outcome {
  int code = 0;
  std::uint32_t line = 0;
  std::uint32_t column = 0;
  std::string message;
};
std::ostream& operator<<(std::ostream& out, const Outcome& outcome);

/// For EXPECT_TRUE: shows the message when it is not so.
testing::AssertionResult ok(const Outcome& outcome);

/// For EXPECT_TRUE: the code is `code`, and the message is one line that says something.
testing::AssertionResult fails_with(int code, const Outcome& outcome);

/// For children, where GoogleTest's assertions count for nothing: throws when the outcome is a failure.
void require_ok(const Outcome& outcome);

/// Throws `what` when the condition is false.
void require(bool condition, const std::string& what);

struct SeenBackend {
  std::string address;
  std::uint16_t port = 0;
  std::uint32_t weight = 0;
  std::uint32_t state = 0;
  std::uint64_t connects = 0;
  std::uint64_t live = 0;
  std::uint64_t reversed = 0;
  std::uint64_t failures = 0;
  std::uint32_t ejected_ms = 0;
};

struct SeenService {
  std::string name;
  std::string vip;
  std::uint16_t port = 0;
  int protocol = 0;
  std::string policy;
  std::string no_backend;
  std::string reason;
  std::uint32_t engine = 0;
  std::uint64_t connects = 0;
  std::uint64_t refused = 0;
  std::uint64_t live = 0;
  std::uint64_t reversed = 0;
  std::vector<SeenBackend> backends;
};

struct Paths {
  std::string cgroup;
  std::string pin;  // empty: nothing is pinned
  std::uint32_t flags = 0;
};

/// An open handle.
class Handle {
 public:
  /// Throws when it cannot be opened.
  Handle(const Plugin& plugin, const Paths& paths);

  Outcome load(std::string_view text, const char* name = "test.toml");
  Outcome load_file(const std::string& path);
  Outcome set_backends(const std::string& service, const std::vector<Backend>& backends);
  Outcome set_backend_state(const std::string& service, const std::string& address, std::uint16_t port,
                            std::uint32_t state);

  /// "10.96.0.1:80", or the name of the errno.
  std::string original_destination(int socket);

  Outcome attach();
  Outcome detach();
  Outcome canary(clusterip_canary_result* seen = nullptr);
  Outcome resolve(const std::string& vip, std::uint16_t port, clusterip_resolution& seen, int protocol = IPPROTO_TCP);

  /// Throws when the visits fail. Sorted by name.
  std::vector<SeenService> visit();

  clusterip* get() const { return handle_.get(); }

 private:
  const Plugin& plugin_;
  std::unique_ptr<clusterip, decltype(&clusterip_close)> handle_;
};

/// Open and close.
Outcome open_outcome(const Plugin& plugin, const Paths& paths);

}  // namespace support
