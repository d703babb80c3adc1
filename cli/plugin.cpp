// SPDX-License-Identifier: BSD-2-Clause
#include "cli/plugin.h"

#include <fmt/format.h>

#include <cstring>
#include <filesystem>
#include <system_error>
#include <utility>

namespace cli {

namespace {

constexpr const char* soname = "libclusterip.so.1";

/// Beside the executable, in the library directory that was installed with it, or in the build tree; else the bare
/// name, for the dynamic linker to find. A candidate that exists is the answer: if it does not load, that is said.
std::string find_plugin() {
  std::error_code error;
  const std::filesystem::path directory = std::filesystem::read_symlink("/proc/self/exe", error).parent_path();
  if (error) return soname;
  for (const char* relative : {".", "../lib", CLUSTERIP_BIN_TO_LIB, "../plugin"}) {
    const std::filesystem::path candidate = (directory / relative / soname).lexically_normal();
    if (std::filesystem::exists(candidate, error)) return candidate;
  }
  return soname;
}

/// Sets `function` to the symbol of that name; false when the library has none.
template <class Function>
bool find(void* library, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
  return function != nullptr;
}

}  // namespace

std::expected<Plugin, Failure> load_plugin(const std::string& path) {
  Plugin plugin;
  plugin.path = path.empty() ? find_plugin() : path;
  plugin.library.reset(dlopen(plugin.path.c_str(), RTLD_NOW | RTLD_LOCAL));
  if (!plugin.library) {
    return std::unexpected(Failure{.message = fmt::format("the plugin does not load: {}", dlerror())});
  }

  void* library = plugin.library.get();
  if (!find(library, "clusterip_abi_version", plugin.abi_version)) {
    return std::unexpected(Failure{.message = fmt::format("{}: is no clusterip plugin", plugin.path)});
  }
  const std::uint32_t version = plugin.abi_version();
  if (version >> 16U != CLUSTERIP_ABI_MAJOR) {
    return std::unexpected(Failure{.message = fmt::format("{}: has ABI {}.{}, this command needs ABI {}", plugin.path,
                                                          version >> 16U, version & 0xffffU, CLUSTERIP_ABI_MAJOR)});
  }
  const bool complete =
      find(library, "clusterip_version_string", plugin.version_string) &&
      find(library, "clusterip_probe", plugin.probe) && find(library, "clusterip_open", plugin.open) &&
      find(library, "clusterip_load_text", plugin.load_text) &&
      find(library, "clusterip_check_text", plugin.check_text) && find(library, "clusterip_attach", plugin.attach) &&
      find(library, "clusterip_detach", plugin.detach) && find(library, "clusterip_resolve", plugin.resolve) &&
      find(library, "clusterip_visit_services", plugin.visit_services) &&
      find(library, "clusterip_canary", plugin.canary) &&
      find(library, "clusterip_set_backends", plugin.set_backends) &&
      find(library, "clusterip_set_backend_state", plugin.set_backend_state) &&
      find(library, "clusterip_refuse_left_out", plugin.refuse_left_out) &&
      find(library, "clusterip_event_fd", plugin.event_fd) &&
      find(library, "clusterip_read_events", plugin.read_events) && find(library, "clusterip_close", plugin.close);
  if (!complete) {
    return std::unexpected(Failure{.message = fmt::format("{}: {}", plugin.path, dlerror())});
  }
  return plugin;
}

std::expected<Handle, Failure> open_handle(const Plugin& plugin, const clusterip_options& options) {
  clusterip* handle = nullptr;
  auto error = sized<clusterip_error>();
  if (plugin.open(&options, &handle, &error) < 0) return std::unexpected(failure_of(error, Call::open));
  return Handle(handle, plugin.close);
}

Failure failure_of(const clusterip_error& error, Call call) {
  return {.exit = exit_for(error.code, call), .message = static_cast<const char*>(error.message)};
}

}  // namespace cli
