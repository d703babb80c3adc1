// SPDX-License-Identifier: BSD-2-Clause
#include "cli/pinned.h"

#include <fmt/format.h>

#include <cerrno>
#include <cstddef>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <utility>

#include "cli/text.h"

namespace cli {

namespace {

/// Called by the plugin, which is C: running out of memory here ends the process.
int keep_service(const clusterip_service_info* service, const clusterip_backend_info* backend, void* user) noexcept {
  auto& services = *static_cast<std::vector<SeenService>*>(user);
  if (backend == nullptr) {
    // A library of ABI 1.2 does not tell.
    const bool has_affinity = service->size > offsetof(clusterip_service_info, affinity_ms);
    services.push_back({.name = service->name,
                        .vip = service->vip,
                        .policy = service->policy,
                        .no_backend = service->no_backend,
                        .reason = service->reason,
                        .port = service->port,
                        .protocol = service->protocol,
                        .engine = service->engine,
                        .connects = service->connects,
                        .refused = service->refused,
                        .live = service->live,
                        .reversed = service->reversed,
                        .affinity_ms = has_affinity ? service->affinity_ms : 0,
                        .backends = {}});
    services.back().backends.reserve(service->backends);
  } else {
    services.back().backends.push_back({.address = backend->address,
                                        .port = backend->port,
                                        .weight = backend->weight,
                                        .state = backend->state,
                                        .connects = backend->connects,
                                        .live = backend->live,
                                        .reversed = backend->reversed,
                                        .failures = backend->failures,
                                        .ejected_ms = backend->ejected_ms});
  }
  return 0;
}

std::string errno_name(int error) {
  if (error == 0) return {};
  const char* name = strerrorname_np(error);
  return name != nullptr ? name : fmt::format("errno {}", error);
}

}  // namespace

std::expected<bool, Failure> anything_pinned(const std::string& pin) {
  std::error_code error;
  const bool empty = std::filesystem::is_empty(pin, error);
  if (error == std::errc::no_such_file_or_directory) return false;
  if (error) {
    return std::unexpected(
        Failure{.exit = exit_for(-error.value()), .message = fmt::format("{}: {}", pin, error.message())});
  }
  return !empty;
}

std::expected<Handle, Failure> open_pinned(const Plugin& plugin, const std::string& pin) {
  const auto something = anything_pinned(pin);
  if (!something) return std::unexpected(something.error());
  if (!*something) return std::unexpected(Failure{.message = fmt::format("nothing is loaded at {}", pin)});
  auto options = sized<clusterip_options>();
  options.pin_path = pin.c_str();
  return open_handle(plugin, options);
}

std::expected<std::vector<SeenService>, Failure> see_services(const Plugin& plugin, clusterip* handle) {
  std::vector<SeenService> services;
  auto error = sized<clusterip_error>();
  if (plugin.visit_services(handle, keep_service, &services, &error) < 0) return std::unexpected(failure_of(error));
  return services;
}

std::string count_services(const std::vector<SeenService>& services) {
  std::size_t backends = 0;
  for (const SeenService& service : services) backends += service.backends.size();
  return fmt::format("{}, {}", count(services.size(), "service"), count(backends, "backend"));
}

Canary run_canary(const Plugin& plugin, clusterip* handle) {
  auto error = sized<clusterip_error>();
  auto result = sized<clusterip_canary_result>();
  const int status = plugin.canary(handle, &result, &error);
  return {.passed = status == 0,
          .is_detached = status == -ENOTCONN,
          .rewrite = errno_name(result.rewrite_errno),
          .refuse = errno_name(result.refuse_errno),
          .message = status == 0 ? "" : static_cast<const char*>(error.message)};
}

std::string describe(const Canary& canary) {
  return canary.passed ? fmt::format("rewritten, refused with {}", canary.refuse)
                       : fmt::format("FAILED: {}", canary.message);
}

const char* state_name(std::uint32_t state) {
  switch (state) {
    case CLUSTERIP_DRAIN:
      return "drain";
    case CLUSTERIP_DOWN:
      return "down";
    default:
      return "active";
  }
}

const char* engine_name(std::uint32_t engine) {
  switch (engine) {
    case CLUSTERIP_ENGINE_BPF:
      return "bpf";
    case CLUSTERIP_ENGINE_USERSPACE:
      return "userspace";
    default:
      return "";
  }
}

}  // namespace cli
