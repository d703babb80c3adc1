// SPDX-License-Identifier: BSD-2-Clause
//
// The plugin as the command sees it: the functions of clusterip.h, found at run time.
#pragma once

#include <clusterip.h>
#include <dlfcn.h>

#include <memory>
#include <string>

#include "cli/outcome.h"

namespace cli {

struct Plugin {
  struct Unload {
    void operator()(void* loaded) const { dlclose(loaded); }
  };
  std::unique_ptr<void, Unload> library;
  std::string path;  // where it was found; the bare name when the dynamic linker found it

  decltype(&clusterip_abi_version) abi_version = nullptr;
  decltype(&clusterip_version_string) version_string = nullptr;
  decltype(&clusterip_probe) probe = nullptr;
  decltype(&clusterip_open) open = nullptr;
  decltype(&clusterip_load_text) load_text = nullptr;
  decltype(&clusterip_check_text) check_text = nullptr;
  decltype(&clusterip_set_backends) set_backends = nullptr;
  decltype(&clusterip_set_backend_state) set_backend_state = nullptr;
  decltype(&clusterip_refuse_left_out) refuse_left_out = nullptr;
  decltype(&clusterip_attach) attach = nullptr;
  decltype(&clusterip_detach) detach = nullptr;
  decltype(&clusterip_resolve) resolve = nullptr;
  decltype(&clusterip_visit_services) visit_services = nullptr;
  decltype(&clusterip_canary) canary = nullptr;
  decltype(&clusterip_event_fd) event_fd = nullptr;
  decltype(&clusterip_read_events) read_events = nullptr;
  decltype(&clusterip_close) close = nullptr;
};

/// Load the plugin at `path`; empty: look for it (docs/cli.md, "The plugin"). One of another ABI major is refused.
std::expected<Plugin, Failure> load_plugin(const std::string& path);

/// An open instance; it must not outlive its plugin.
using Handle = std::unique_ptr<clusterip, decltype(&clusterip_close)>;

std::expected<Handle, Failure> open_handle(const Plugin& plugin, const clusterip_options& options);

/// A struct of the ABI with its size filled in and all else 0.
template <class Struct>
Struct sized() {
  Struct empty{};
  empty.size = sizeof empty;
  return empty;
}

/// What a failed call said, as a line.
Failure failure_of(const clusterip_error& error, Call call = Call::other);

}  // namespace cli
