// SPDX-License-Identifier: BSD-2-Clause
#include "tests/support/plugin.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <ostream>
#include <stdexcept>

namespace support {
namespace {

clusterip_error new_error() {
  clusterip_error error{};
  error.size = sizeof error;
  return error;
}

Outcome outcome(int code, const clusterip_error& error) {
  if (code == 0) return {};
  if (error.code != code)
    return {code, 0, 0, "the error struct has another code: " + std::to_string(error.code) + " " + error.message};
  return {code, error.line, error.column, error.message};
}

clusterip* open_handle(const Plugin& plugin, const Paths& paths) {
  clusterip_options options{};
  options.size = sizeof options;
  options.cgroup_path = paths.cgroup.empty() ? nullptr : paths.cgroup.c_str();
  options.pin_path = paths.pin.empty() ? nullptr : paths.pin.c_str();
  options.flags = paths.flags;
  clusterip_error error = new_error();
  clusterip* handle = nullptr;
  require_ok(outcome(plugin.open(&options, &handle, &error), error));
  return handle;
}

}  // namespace

Plugin::Plugin()
    : library_(::dlopen(CLUSTERIP_PLUGIN_PATH, RTLD_NOW | RTLD_LOCAL)),
      abi_version(find<decltype(abi_version)>("clusterip_abi_version")),
      version_string(find<decltype(version_string)>("clusterip_version_string")),
      probe(find<decltype(probe)>("clusterip_probe")),
      open(find<decltype(open)>("clusterip_open")),
      load_file(find<decltype(load_file)>("clusterip_load_file")),
      load_text(find<decltype(load_text)>("clusterip_load_text")),
      check_text(find<decltype(check_text)>("clusterip_check_text")),
      set_backends(find<decltype(set_backends)>("clusterip_set_backends")),
      set_backend_state(find<decltype(set_backend_state)>("clusterip_set_backend_state")),
      refuse_left_out(find<decltype(refuse_left_out)>("clusterip_refuse_left_out")),
      attach(find<decltype(attach)>("clusterip_attach")),
      detach(find<decltype(detach)>("clusterip_detach")),
      resolve(find<decltype(resolve)>("clusterip_resolve")),
      visit_services(find<decltype(visit_services)>("clusterip_visit_services")),
      canary(find<decltype(canary)>("clusterip_canary")),
      original_destination(find<decltype(original_destination)>("clusterip_original_destination")),
      event_fd(find<decltype(event_fd)>("clusterip_event_fd")),
      read_events(find<decltype(read_events)>("clusterip_read_events")),
      close(find<decltype(close)>("clusterip_close")) {}

void Plugin::Close::operator()(void* library) const { ::dlclose(library); }

void* Plugin::find(const char* symbol) const {
  void* const address = library_ ? ::dlsym(library_.get(), symbol) : nullptr;
  if (address == nullptr) throw std::runtime_error(::dlerror());
  return address;
}

std::ostream& operator<<(std::ostream& out, const Outcome& outcome) {
  out << outcome.code;
  if (outcome.code < 0) out << " (" << ::strerrorname_np(-outcome.code) << ")";
  if (outcome.line != 0) out << " at " << outcome.line << ":" << outcome.column;
  return out << " \"" << outcome.message << '"';
}

testing::AssertionResult ok(const Outcome& outcome) {
  if (outcome.code == 0) return testing::AssertionSuccess();
  return testing::AssertionFailure() << outcome;
}

testing::AssertionResult fails_with(int code, const Outcome& outcome) {
  if (outcome.code == code && !outcome.message.empty() && outcome.message.find('\n') == std::string::npos)
    return testing::AssertionSuccess();
  return testing::AssertionFailure() << outcome << ", but " << ::strerrorname_np(-code)
                                     << " with one line was expected";
}

void require_ok(const Outcome& outcome) {
  if (outcome.code != 0)
    throw std::runtime_error(std::string(::strerrorname_np(-outcome.code)) + ": " + outcome.message);
}

void require(bool condition, const std::string& what) {
  if (!condition) throw std::runtime_error(what);
}

Handle::Handle(const Plugin& plugin, const Paths& paths)
    : plugin_(plugin), handle_(open_handle(plugin, paths), plugin.close) {}

Outcome Handle::load(std::string_view text, const char* name) {
  clusterip_error error = new_error();
  return outcome(plugin_.load_text(get(), text.data(), text.size(), name, &error), error);
}

Outcome Handle::load_file(const std::string& path) {
  clusterip_error error = new_error();
  return outcome(plugin_.load_file(get(), path.c_str(), &error), error);
}

Outcome Handle::set_backends(const std::string& service, const std::vector<Backend>& backends) {
  std::vector<clusterip_backend> elements;
  for (const Backend& backend : backends) {
    clusterip_backend element{};
    element.size = sizeof element;
    element.address = backend.address.c_str();
    element.port = backend.port;
    element.weight = backend.weight;
    element.state = backend.state == "drain"  ? CLUSTERIP_DRAIN
                    : backend.state == "down" ? CLUSTERIP_DOWN
                                              : CLUSTERIP_ACTIVE;
    elements.push_back(element);
  }
  clusterip_error error = new_error();
  return outcome(plugin_.set_backends(get(), service.c_str(), elements.data(), elements.size(), &error), error);
}

Outcome Handle::set_backend_state(const std::string& service, const std::string& address, std::uint16_t port,
                                  std::uint32_t state) {
  const Endpoint backend(address, port);
  clusterip_error error = new_error();
  return outcome(plugin_.set_backend_state(get(), service.c_str(), backend.address(), backend.length(), state, &error),
                 error);
}

std::string Handle::original_destination(int socket) {
  sockaddr_storage vip{};
  if (const int code = plugin_.original_destination(get(), socket, &vip, nullptr); code != 0)
    return ::strerrorname_np(-code);
  return text_of(vip);
}

Outcome Handle::attach() {
  clusterip_error error = new_error();
  return outcome(plugin_.attach(get(), &error), error);
}

Outcome Handle::detach() {
  clusterip_error error = new_error();
  return outcome(plugin_.detach(get(), &error), error);
}

Outcome Handle::canary(clusterip_canary_result* seen) {
  clusterip_error error = new_error();
  return outcome(plugin_.canary(get(), seen, &error), error);
}

Outcome Handle::resolve(const std::string& vip, std::uint16_t port, clusterip_resolution& seen, int protocol) {
  const Endpoint address(vip, port);
  seen = {};
  seen.size = sizeof seen;
  clusterip_error error = new_error();
  return outcome(plugin_.resolve(get(), address.address(), address.length(), protocol, &seen, &error), error);
}

std::vector<SeenService> Handle::visit() {
  struct Visits {
    std::vector<SeenService> services;
    std::exception_ptr thrown;  // no exception may pass through the library
  } visits;
  const clusterip_service_visitor visitor = [](const clusterip_service_info* service,
                                               const clusterip_backend_info* backend, void* user) {
    auto& [services, thrown] = *static_cast<Visits*>(user);
    try {
      require(service != nullptr && service->size == sizeof *service, "a visit without a service");
      if (backend == nullptr) {
        services.push_back({service->name,
                            service->vip,
                            service->port,
                            service->protocol,
                            service->policy,
                            service->no_backend,
                            service->reason,
                            service->engine,
                            service->connects,
                            service->refused,
                            service->live,
                            service->reversed,
                            {}});
        services.back().backends.reserve(service->backends);
        return 0;
      }
      require(backend->size == sizeof *backend, "a backend of another size");
      require(!services.empty() && services.back().name == service->name, "a backend before its service");
      services.back().backends.push_back({backend->address, backend->port, backend->weight, backend->state,
                                          backend->connects, backend->live, backend->reversed, backend->failures,
                                          backend->ejected_ms});
      return 0;
    } catch (...) {
      thrown = std::current_exception();
      return 1;
    }
  };
  clusterip_error error = new_error();
  const int result = plugin_.visit_services(get(), visitor, &visits, &error);
  if (visits.thrown) std::rethrow_exception(visits.thrown);
  require_ok(outcome(result, error));
  std::ranges::sort(visits.services, {}, &SeenService::name);
  return std::move(visits.services);
}

Outcome open_outcome(const Plugin& plugin, const Paths& paths) {
  clusterip_options options{};
  options.size = sizeof options;
  options.cgroup_path = paths.cgroup.empty() ? nullptr : paths.cgroup.c_str();
  options.pin_path = paths.pin.empty() ? nullptr : paths.pin.c_str();
  options.flags = paths.flags;
  clusterip_error error = new_error();
  clusterip* handle = nullptr;
  const int code = plugin.open(&options, &handle, &error);
  plugin.close(handle);
  return outcome(code, error);
}

}  // namespace support
