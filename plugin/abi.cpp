// SPDX-License-Identifier: BSD-2-Clause
//
// The C ABI: sizes are checked, structs filled, and exceptions stop here.
#include <arpa/inet.h>
#include <netinet/in.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "config/names.h"
#include "config/read_config.h"
#include "plugin/background_checks.h"
#include "plugin/bpf_engine.h"
#include "plugin/probe.h"
#include "plugin/socket_sweep.h"

// Everything is compiled hidden; what this header declares is what the library is for.
#pragma GCC visibility push(default)
#include "clusterip.h"
#pragma GCC visibility pop

struct clusterip {
  std::recursive_mutex mutex;  // a visitor may call back
  std::unique_ptr<plugin::BpfEngine> engine;
  std::unique_ptr<plugin::BackgroundChecks> checks;  // with CLUSTERIP_BACKGROUND
};

namespace {

using config::Error;
using plugin::fail;
using plugin::Result;

constexpr std::size_t oldest_error_size = offsetof(clusterip_error, message) + 1;

/// Copies what fits into the caller's struct, which may be older and smaller than ours, and keeps its `size`.
template <class Struct>
void copy_out(const Struct& value, Struct* ret) {
  const std::size_t size = ret->size;
  std::memcpy(ret, &value, std::min(size, sizeof value));
  ret->size = size;
}

/// A struct of the caller's: at least as large as in the first version, and not absurd.
template <class Struct>
bool is_valid_size(const Struct* given, std::size_t oldest = sizeof(Struct)) {
  constexpr std::size_t absurd = 65536;
  return given != nullptr && given->size >= oldest && given->size < absurd;
}

void fill(const Error& error, clusterip_error* reterr) {
  if (!is_valid_size(reterr, oldest_error_size)) {
    return;
  }
  const std::size_t room = std::min(reterr->size - offsetof(clusterip_error, message), sizeof reterr->message);
  reterr->code = error.code;
  reterr->line = error.line;
  reterr->column = error.column;
  reterr->reserved = 0;
  const std::size_t length = std::min(error.message.size(), room - 1);
  // Names and paths come from anywhere: what could steer a terminal or break the line does not pass.
  std::ranges::transform(error.message.substr(0, length), reterr->message,
                         [](char c) { return static_cast<unsigned char>(c) < ' ' || c == '\x7f' ? '?' : c; });
  reterr->message[length] = '\0';
}

/// Runs `call`, which returns a Result<int>: what a function of the ABI returns on success.
template <class Call>
int guarded(clusterip_error* reterr, Call call) noexcept {
  try {
    Result<int> result = call();
    if (result) {
      return *result;
    }
    fill(result.error(), reterr);
    return result.error().code;
  } catch (const std::bad_alloc&) {
    fill({.code = -ENOMEM, .message = "out of memory"}, reterr);  // short: needs none
    return -ENOMEM;
  } catch (const std::exception& bug) {
    fill({.code = -ENOTRECOVERABLE, .message = bug.what()}, reterr);
    return -ENOTRECOVERABLE;
  }
}

/// The same under the handle's lock: its own thread may have something to change.
template <class Call>
int guarded(clusterip* handle, clusterip_error* reterr, Call call) noexcept {
  return guarded(reterr, [&]() -> Result<int> {
    const auto lock = handle != nullptr ? std::unique_lock(handle->mutex) : std::unique_lock<std::recursive_mutex>();
    return call();
  });
}

Result<int> zero(Result<void> result) {
  if (!result) {
    return std::unexpected(result.error());
  }
  return 0;
}

std::uint32_t state_of(const config::Backend& backend) {
  switch (backend.state) {
    case config::BackendState::active:
      return CLUSTERIP_ACTIVE;
    case config::BackendState::drain:
      return CLUSTERIP_DRAIN;
    case config::BackendState::down:
      break;
  }
  return CLUSTERIP_DOWN;
}

std::optional<config::BackendState> read_state(std::uint32_t state) {
  switch (state) {
    case CLUSTERIP_ACTIVE:
      return config::BackendState::active;
    case CLUSTERIP_DRAIN:
      return config::BackendState::drain;
    case CLUSTERIP_DOWN:
      return config::BackendState::down;
    default:
      return std::nullopt;
  }
}

Result<int> load(clusterip& handle, std::string_view text, std::string_view name) {
  auto config = config::read_config(text);
  if (!config) {
    const auto& first = config.error().front();
    return std::unexpected(Error{.code = -EBADMSG,
                                 .message = std::string(name) + ":" + std::to_string(first.position.line) + ":" +
                                            std::to_string(first.position.column) + ": " + first.message,
                                 .line = first.position.line,
                                 .column = first.position.column});
  }
  return zero(handle.checks ? handle.checks->load(std::move(*config)) : handle.engine->load(std::move(*config)));
}

/// The element `index` of an array whose elements may be larger than ours.
const clusterip_backend& element(const clusterip_backend* backends, std::size_t index) {
  return *reinterpret_cast<const clusterip_backend*>(reinterpret_cast<const char*>(backends) + index * backends->size);
}

Result<std::vector<config::Backend>> read_backends(const clusterip_backend* backends, std::size_t count) {
  if (count > config::max_backends_per_service) {
    return fail(-EBADMSG, "backends: expected at most " + std::to_string(config::max_backends_per_service) + ", got " +
                              std::to_string(count));
  }
  std::vector<config::Backend> list;
  list.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    const clusterip_backend& given = element(backends, i);
    const auto reject = [i](const std::string& what) {
      return fail(-EBADMSG, "backends[" + std::to_string(i) + "]: " + what);
    };
    boost::system::error_code error;
    const auto address = boost::asio::ip::make_address(given.address != nullptr ? given.address : "", error);
    if (error) {
      return reject(std::string("expected an address, got \"") + (given.address != nullptr ? given.address : "") +
                    "\"");
    }
    const auto state = read_state(given.state);
    if (!state) {
      return reject("expected a state of CLUSTERIP_ACTIVE, CLUSTERIP_DRAIN or CLUSTERIP_DOWN, got " +
                    std::to_string(given.state));
    }
    list.push_back({.address = address,
                    .port = given.port,
                    .weight = given.weight == 0 ? 1 : given.weight,
                    .state = *state,
                    .position = {}});
  }
  return list;
}

Result<std::pair<config::Address, std::uint16_t>> read_sockaddr(const sockaddr* address, socklen_t length) {
  if (address == nullptr || length < sizeof address->sa_family) {
    return fail(-EINVAL, "vip: expected a socket address");
  }
  if (address->sa_family != AF_INET && address->sa_family != AF_INET6) {
    return fail(-EAFNOSUPPORT, "vip: expected a sockaddr_in or sockaddr_in6");
  }
  if (length < (address->sa_family == AF_INET ? sizeof(sockaddr_in) : sizeof(sockaddr_in6))) {
    return fail(-EINVAL, "vip: the socket address is cut short");
  }
  if (address->sa_family == AF_INET) {
    sockaddr_in v4{};
    std::memcpy(&v4, address, sizeof v4);
    return std::pair(config::Address(boost::asio::ip::make_address_v4(ntohl(v4.sin_addr.s_addr))), ntohs(v4.sin_port));
  }
  sockaddr_in6 v6{};
  std::memcpy(&v6, address, sizeof v6);
  boost::asio::ip::address_v6::bytes_type bytes;
  std::memcpy(bytes.data(), &v6.sin6_addr, sizeof bytes);
  return std::pair(config::Address(boost::asio::ip::address_v6(bytes)), ntohs(v6.sin6_port));
}

void write_sockaddr(const config::Address& address, std::uint16_t port, sockaddr_storage& out) {
  if (address.is_v4()) {
    sockaddr_in v4{};
    v4.sin_family = AF_INET;
    v4.sin_port = htons(port);
    v4.sin_addr.s_addr = htonl(address.to_v4().to_uint());
    std::memcpy(&out, &v4, sizeof v4);
  } else {
    sockaddr_in6 v6{};
    v6.sin6_family = AF_INET6;
    v6.sin6_port = htons(port);
    const auto bytes = address.to_v6().to_bytes();
    std::memcpy(&v6.sin6_addr, bytes.data(), bytes.size());
    std::memcpy(&out, &v6, sizeof v6);
  }
}

std::uint32_t hook_bits(plugin::Hooks hooks) {
  using enum plugin::Hook;
  const auto both = [&](plugin::Hook v4, plugin::Hook v6) { return hooks.contains(v4) && hooks.contains(v6); };
  return (hooks.contains(connect6) ? CLUSTERIP_CAN_CONNECT6 : 0u) |
         (both(sendmsg4, sendmsg6) ? CLUSTERIP_CAN_SENDMSG : 0u) |
         (both(recvmsg4, recvmsg6) ? CLUSTERIP_CAN_RECVMSG : 0u) |
         (both(getpeer4, getpeer6) ? CLUSTERIP_CAN_GETPEER : 0u) |
         (hooks.contains(release) ? CLUSTERIP_CAN_RELEASE : 0u) |
         (hooks.contains(sock_ops) ? CLUSTERIP_CAN_SOCK_OPS : 0u);
}

std::unexpected<Error> misuse(const char* what) { return fail(-EINVAL, what); }

int visit_one(const plugin::ServiceStatus& status, clusterip_service_visitor visit, void* user) {
  const auto& service = status.service;
  const std::string vip = service.vip.to_string();
  clusterip_service_info info{};
  info.size = sizeof info;
  info.name = service.name.c_str();
  info.vip = vip.c_str();
  info.policy = config::name_of(config::policy_names, service.policy).data();  // literals: NUL-terminated
  info.no_backend = config::name_of(config::no_backend_names, service.no_backend).data();
  info.reason = status.reason.c_str();
  info.connects = status.total.connects;
  info.refused = status.total.refused;
  info.engine = status.is_carried ? CLUSTERIP_ENGINE_BPF : CLUSTERIP_ENGINE_USERSPACE;
  info.reversed = status.total.reversed;
  for (const auto& backend : status.backends) {
    info.live += backend.live;
  }
  info.backends = static_cast<std::uint32_t>(service.backends.size());
  info.port = service.port;
  info.protocol = std::to_underlying(service.protocol);
  info.affinity_ms = service.affinity ? static_cast<std::uint64_t>(service.affinity->count()) : 0;
  if (const int stop = visit(&info, nullptr, user); stop != 0) {
    return stop;
  }
  for (std::size_t i = 0; i < service.backends.size(); ++i) {
    const auto& backend = service.backends[i];
    const std::string address = backend.address.to_string();
    clusterip_backend_info backend_info{};
    backend_info.size = sizeof backend_info;
    backend_info.address = address.c_str();
    backend_info.connects = status.backends[i].counted.connects;
    backend_info.weight = backend.weight;
    backend_info.state = state_of(backend);
    backend_info.port = backend.port;
    backend_info.live = status.backends[i].live;
    backend_info.reversed = status.backends[i].counted.reversed;
    backend_info.failures = status.backends[i].counted.failures;
    backend_info.ejected_ms = static_cast<std::uint32_t>(
        std::min<std::int64_t>(status.backends[i].ejected.count(), std::numeric_limits<std::uint32_t>::max()));
    if (const int stop = visit(&info, &backend_info, user); stop != 0) {
      return stop;
    }
  }
  return 0;
}

}  // namespace

static_assert(std::is_standard_layout_v<clusterip_error> && std::is_standard_layout_v<clusterip_service_info>);
#if __SIZEOF_POINTER__ == 8
static_assert(sizeof(clusterip_error) == 536 && sizeof(clusterip_options) == 32);
static_assert(sizeof(clusterip_capabilities) == 272 && sizeof(clusterip_backend) == 32);
static_assert(sizeof(clusterip_service_info) == 104 && sizeof(clusterip_backend_info) == 72);
static_assert(sizeof(clusterip_event) == 504);
static_assert(sizeof(clusterip_resolution) == 312 && sizeof(clusterip_canary_result) == 16);
#endif

std::uint32_t clusterip_abi_version(void) { return CLUSTERIP_ABI_MAJOR << 16 | CLUSTERIP_ABI_MINOR; }

const char* clusterip_version_string(void) { return CLUSTERIP_VERSION; }

int clusterip_probe(clusterip_capabilities* ret, clusterip_error* reterr) {
  return guarded(reterr, [&]() -> Result<int> {
    if (!is_valid_size(ret)) {
      return misuse("ret: expected a clusterip_capabilities with its size set");
    }
    const auto can = plugin::probe();
    if (!can) {
      return std::unexpected(can.error());
    }
    clusterip_capabilities out{};
    out.can = (can->hooks.contains(plugin::Hook::connect4) ? CLUSTERIP_CAN_CONNECT4 : 0u) |
              (can->map_memory ? CLUSTERIP_CAN_MAP_MEMORY : 0u) | (can->set_errno ? CLUSTERIP_CAN_SET_ERRNO : 0u) |
              (can->link ? CLUSTERIP_CAN_LINK : 0u) | (can->membarrier ? CLUSTERIP_CAN_MEMBARRIER : 0u) |
              (can->batch ? CLUSTERIP_CAN_BATCH : 0u) | (can->sessions ? CLUSTERIP_CAN_SESSIONS : 0u) |
              (can->mark ? CLUSTERIP_CAN_MARK : 0u) | (can->netns_client ? CLUSTERIP_CAN_NETNS_CLIENT : 0u) |
              (can->cgroup_client ? CLUSTERIP_CAN_CGROUP_CLIENT : 0u) | (can->events ? CLUSTERIP_CAN_EVENTS : 0u) |
              (plugin::can_end_sockets() ? CLUSTERIP_CAN_DESTROY : 0u) | hook_bits(can->hooks);
    can->reason.copy(out.reason, sizeof out.reason - 1);
    copy_out(out, ret);
    return 0;
  });
}

int clusterip_open(const clusterip_options* options, clusterip** ret, clusterip_error* reterr) {
  return guarded(reterr, [&]() -> Result<int> {
    if (ret == nullptr) {
      return misuse("ret: expected a place for the handle, got NULL");
    }
    *ret = nullptr;
    plugin::EngineOptions engine_options;
    if (options != nullptr) {
      if (!is_valid_size(options)) {
        return misuse("options: expected a clusterip_options with its size set");
      }
      if ((options->flags &
           ~(CLUSTERIP_ENGINE_TABLE | CLUSTERIP_ALLOW_PARTIAL | CLUSTERIP_BACKGROUND | CLUSTERIP_ANY_MODE)) != 0 ||
          options->reserved != 0) {
        return misuse("options: flags has a bit that this version does not know, or reserved is not 0");
      }
      engine_options.cgroup = options->cgroup_path != nullptr ? options->cgroup_path : "";
      engine_options.pin = options->pin_path != nullptr ? options->pin_path : "";
      engine_options.engine_table = (options->flags & CLUSTERIP_ENGINE_TABLE) != 0;
      engine_options.allow_partial = (options->flags & CLUSTERIP_ALLOW_PARTIAL) != 0;
      engine_options.any_mode = (options->flags & CLUSTERIP_ANY_MODE) != 0;
    }
    auto engine = plugin::BpfEngine::open(std::move(engine_options));
    if (!engine) {
      return std::unexpected(engine.error());
    }
    auto handle = std::make_unique<clusterip>();
    handle->engine = std::move(*engine);
    if (options != nullptr && (options->flags & CLUSTERIP_BACKGROUND) != 0) {
      handle->checks = std::make_unique<plugin::BackgroundChecks>(*handle->engine, handle->mutex);
    }
    *ret = handle.release();
    return 0;
  });
}

int clusterip_load_file(clusterip* handle, const char* path, clusterip_error* reterr) {
  return guarded(handle, reterr, [&]() -> Result<int> {
    if (handle == nullptr || path == nullptr) {
      return misuse("expected a handle and a path, got NULL");
    }
    const auto text = config::read_file(path);
    if (!text) {
      return std::unexpected(text.error());
    }
    return load(*handle, *text, path);
  });
}

int clusterip_load_text(clusterip* handle, const char* toml, std::size_t length, const char* name,
                        clusterip_error* reterr) {
  return guarded(handle, reterr, [&]() -> Result<int> {
    if (handle == nullptr || (toml == nullptr && length > 0) || name == nullptr) {
      return misuse("expected a handle, a text and a name, got NULL");
    }
    return load(*handle, {toml, length}, name);
  });
}

int clusterip_check_text(const char* toml, std::size_t length, const char* name, clusterip_error_visitor visit,
                         void* user) {
  return guarded(nullptr, [&]() -> Result<int> {
    if ((toml == nullptr && length > 0) || name == nullptr || visit == nullptr) {
      return misuse("expected a text, a name and a visitor, got NULL");
    }
    const auto config = config::read_config({toml, length});
    if (config) {
      return 0;
    }
    for (const auto& mistake : config.error()) {
      clusterip_error out{};
      out.size = sizeof out;
      fill({.code = -EBADMSG,
            .message = mistake.message,
            .line = mistake.position.line,
            .column = mistake.position.column},
           &out);
      visit(&out, user);
    }
    return fail(-EBADMSG, std::string(name) + " is not valid");
  });
}

int clusterip_set_backends(clusterip* handle, const char* service, const clusterip_backend* backends, std::size_t count,
                           clusterip_error* reterr) {
  return guarded(handle, reterr, [&]() -> Result<int> {
    if (handle == nullptr || service == nullptr || (count > 0 && !is_valid_size(backends))) {
      return misuse("expected a handle, a service and backends with their size set");
    }
    auto list = read_backends(backends, count);
    if (!list) {
      return std::unexpected(list.error());
    }
    return zero(handle->checks ? handle->checks->set_backends(service, std::move(*list))
                               : handle->engine->set_backends(service, std::move(*list)));
  });
}

int clusterip_set_backend_state(clusterip* handle, const char* service, const sockaddr* backend, socklen_t length,
                                std::uint32_t state, clusterip_error* reterr) {
  return guarded(handle, reterr, [&]() -> Result<int> {
    const auto wanted = read_state(state);
    if (handle == nullptr || service == nullptr || !wanted) {
      return misuse("expected a handle, a service, and CLUSTERIP_ACTIVE, CLUSTERIP_DRAIN or CLUSTERIP_DOWN");
    }
    const auto endpoint = read_sockaddr(backend, length);
    if (!endpoint) {
      return std::unexpected(endpoint.error());
    }
    const auto& [address, port] = *endpoint;
    return zero(handle->checks ? handle->checks->set_backend_state(service, address, port, *wanted)
                               : handle->engine->set_backend_state(service, address, port, *wanted));
  });
}

int clusterip_refuse_left_out(clusterip* handle, clusterip_error* reterr) {
  return guarded(handle, reterr, [&]() -> Result<int> {
    if (handle == nullptr) {
      return misuse("expected a handle, got NULL");
    }
    return zero(handle->engine->refuse_left_out());
  });
}

int clusterip_attach(clusterip* handle, clusterip_error* reterr) {
  return guarded(handle, reterr, [&]() -> Result<int> {
    if (handle == nullptr) {
      return misuse("expected a handle, got NULL");
    }
    auto attached = handle->engine->attach();
    return zero(attached && handle->checks ? handle->checks->resume() : std::move(attached));
  });
}

int clusterip_detach(clusterip* handle, clusterip_error* reterr) {
  if (handle != nullptr && handle->checks) {
    handle->checks->stop();  // which waits for its thread, and that for the lock
  }
  return guarded(handle, reterr, [&]() -> Result<int> {
    if (handle == nullptr) {
      return misuse("expected a handle, got NULL");
    }
    auto detached = handle->engine->detach();
    if (!detached && handle->checks) {
      (void)handle->checks->resume();  // what is attached still is checked; why it is attached still says more
    }
    return zero(std::move(detached));
  });
}

int clusterip_resolve(clusterip* handle, const sockaddr* vip, socklen_t length, int protocol, clusterip_resolution* ret,
                      clusterip_error* reterr) {
  return guarded(handle, reterr, [&]() -> Result<int> {
    if (handle == nullptr || !is_valid_size(ret)) {
      return misuse("expected a handle and a clusterip_resolution with its size set");
    }
    if (protocol != IPPROTO_TCP && protocol != IPPROTO_UDP) {
      return misuse("protocol: expected IPPROTO_TCP or IPPROTO_UDP");
    }
    const auto endpoint = read_sockaddr(vip, length);
    if (!endpoint) {
      return std::unexpected(endpoint.error());
    }
    const auto resolution =
        handle->engine->resolve(endpoint->first, endpoint->second, static_cast<config::Protocol>(protocol));
    if (!resolution) {
      return std::unexpected(resolution.error());
    }
    clusterip_resolution out{};
    out.verdict = std::to_underlying(resolution->verdict);
    out.engine = resolution->service.empty() ? 0u
                 : resolution->is_left_out   ? CLUSTERIP_ENGINE_USERSPACE
                                             : CLUSTERIP_ENGINE_BPF;
    out.backends = resolution->backends;
    resolution->service.copy(out.service, sizeof out.service - 1);
    if (resolution->backend) {
      write_sockaddr(resolution->backend->address, resolution->backend->port, out.backend);
    }
    copy_out(out, ret);
    return 0;
  });
}

int clusterip_visit_services(clusterip* handle, clusterip_service_visitor visit, void* user, clusterip_error* reterr) {
  return guarded(handle, reterr, [&]() -> Result<int> {
    if (handle == nullptr || visit == nullptr) {
      return misuse("expected a handle and a visitor, got NULL");
    }
    const auto services = handle->engine->status();
    if (!services) {
      return std::unexpected(services.error());
    }
    for (const auto& service : *services) {
      if (const int stop = visit_one(service, visit, user); stop != 0) {
        return stop;
      }
    }
    return 0;
  });
}

int clusterip_canary(clusterip* handle, clusterip_canary_result* ret, clusterip_error* reterr) {
  return guarded(handle, reterr, [&]() -> Result<int> {
    if (handle == nullptr || (ret != nullptr && !is_valid_size(ret))) {
      return misuse("expected a handle, and a clusterip_canary_result with its size set or NULL");
    }
    const auto seen = handle->engine->canary();
    if (!seen) {
      return std::unexpected(seen.error());
    }
    if (ret != nullptr) {
      clusterip_canary_result out{};
      out.rewrite_errno = seen->rewrite_errno;
      out.refuse_errno = seen->refuse_errno;
      copy_out(out, ret);
    }
    if (seen->rewrite_errno == EADDRNOTAVAIL) {
      return fail(-ENOTCONN, "a connect() in the cgroup was not rewritten");
    }
    if (seen->rewrite_errno != 0) {
      auto error = plugin::fail_errno(seen->rewrite_errno, "a connect() in the cgroup was not rewritten");
      error.error().code = -ENOTCONN;
      return error;
    }
    if (seen->refuse_errno == 0) {
      return fail(-EPROTO, "a connect() to a port that no service has was not refused");
    }
    return 0;
  });
}

int clusterip_original_destination(clusterip* handle, int socket, sockaddr_storage* ret, clusterip_error* reterr) {
  return guarded(handle, reterr, [&]() -> Result<int> {
    if (handle == nullptr || ret == nullptr) {
      return misuse("expected a handle and a place for the address, got NULL");
    }
    const auto destination = handle->engine->original_destination(socket);
    if (!destination) {
      return std::unexpected(destination.error());
    }
    *ret = {};
    write_sockaddr(destination->vip, destination->port, *ret);
    return 0;
  });
}

int clusterip_event_fd(clusterip* handle, std::uint32_t seconds, clusterip_error* reterr) {
  return guarded(handle, reterr, [&]() -> Result<int> {
    if (handle == nullptr) {
      return misuse("expected a handle, got NULL");
    }
    return handle->engine->enable_events(std::chrono::seconds(seconds));
  });
}

int clusterip_read_events(clusterip* handle, clusterip_event_visitor visit, void* user, clusterip_error* reterr) {
  return guarded(handle, reterr, [&]() -> Result<int> {
    if (handle == nullptr || visit == nullptr) {
      return misuse("expected a handle and a visitor, got NULL");
    }
    return handle->engine->read_events([&](const event& seen) {
      clusterip_event out{};
      out.size = sizeof out;
      out.time = seen.time;
      out.cookie = seen.cookie;
      out.cgroup = seen.cgroup;
      out.pid = seen.pid;
      out.verdict = seen.verdict;
      out.reason = seen.reason;
      out.error = static_cast<std::int32_t>(seen.error);
      out.protocol = seen.asked.protocol;
      write_sockaddr(plugin::decode_address(seen.asked.address), ntohs(seen.asked.port), out.vip);
      out.backends = seen.backends;
      out.lost = seen.lost;
      if (seen.verdict == EVENT_REWRITTEN || seen.verdict == EVENT_EJECTED) {
        write_sockaddr(plugin::decode_address(seen.backend), ntohs(seen.backend_port), out.backend);
      }
      std::memcpy(out.comm, seen.comm, sizeof out.comm);
      std::memcpy(out.service, seen.service, sizeof out.service);
      return visit(&out, user);
    });
  });
}

void clusterip_close(clusterip* handle) { delete handle; }
