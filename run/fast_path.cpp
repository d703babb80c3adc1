// SPDX-License-Identifier: BSD-2-Clause
#include "run/fast_path.h"

#include <utility>

#include "fallback_proxy/backend.h"

namespace run {
namespace {

using cli::Failure;

std::uint32_t to_abi(config::BackendState state) {
  switch (state) {
    case config::BackendState::drain:
      return CLUSTERIP_DRAIN;
    case config::BackendState::down:
      return CLUSTERIP_DOWN;
    case config::BackendState::active:
      break;
  }
  return CLUSTERIP_ACTIVE;
}

std::expected<void, Failure> outcome(int status, const clusterip_error& error, cli::Call call = cli::Call::other) {
  if (status < 0) return std::unexpected(cli::failure_of(error, call));
  return {};
}

}  // namespace

std::expected<FastPath, Failure> FastPath::open(const cli::Plugin& plugin, bool is_partial) {
  auto options = cli::sized<clusterip_options>();
  options.flags = CLUSTERIP_ENGINE_TABLE | CLUSTERIP_ANY_MODE | (is_partial ? CLUSTERIP_ALLOW_PARTIAL : 0u);
  auto handle = cli::open_handle(plugin, options);
  if (!handle) return std::unexpected(handle.error());
  return FastPath(plugin, std::move(*handle));
}

std::expected<void, Failure> FastPath::load(std::string_view text, const std::string& name) {
  auto error = cli::sized<clusterip_error>();
  // With the engine table, the paths of the file are opened by the first load: its errors mean what they mean at open.
  const int status = plugin_->load_text(handle_.get(), text.data(), text.size(), name.c_str(), &error);
  if (status < 0) return outcome(status, error, is_attached_ ? cli::Call::other : cli::Call::open);
  return is_attached_ ? std::expected<void, Failure>{} : attach();
}

std::expected<void, Failure> FastPath::attach() {
  auto error = cli::sized<clusterip_error>();
  const auto attached = outcome(plugin_->attach(handle_.get(), &error), error);
  is_attached_ = is_attached_ || attached.has_value();
  return attached;
}

std::expected<void, Failure> FastPath::refuse_left_out() {
  auto error = cli::sized<clusterip_error>();
  return outcome(plugin_->refuse_left_out(handle_.get(), &error), error);
}

std::expected<void, Failure> FastPath::detach() {
  auto error = cli::sized<clusterip_error>();
  return outcome(plugin_->detach(handle_.get(), &error), error);
}

std::expected<std::vector<cli::SeenService>, Failure> FastPath::services() const {
  return cli::see_services(*plugin_, handle_.get());
}

std::expected<clusterip_resolution, Failure> FastPath::resolve(const cli::Endpoint& vip) const {
  auto found = cli::sized<clusterip_resolution>();
  auto error = cli::sized<clusterip_error>();
  const auto* address = reinterpret_cast<const sockaddr*>(&vip.socket_address);
  if (plugin_->resolve(handle_.get(), address, vip.length, vip.protocol, &found, &error) < 0)
    return std::unexpected(cli::failure_of(error));
  return found;
}

std::expected<void, Failure> FastPath::set_backends(const std::string& service,
                                                    const std::vector<config::Backend>& backends) {
  std::vector<std::string> addresses;
  addresses.reserve(backends.size());
  std::vector<clusterip_backend> list;
  list.reserve(backends.size());
  for (const config::Backend& backend : backends) {
    auto& one = list.emplace_back(cli::sized<clusterip_backend>());
    one.address = addresses.emplace_back(backend.address.to_string()).c_str();
    one.port = backend.port;
    one.weight = backend.weight;
    one.state = to_abi(backend.state);
  }
  auto error = cli::sized<clusterip_error>();
  return outcome(plugin_->set_backends(handle_.get(), service.c_str(), list.data(), list.size(), &error), error);
}

std::expected<void, Failure> FastPath::set_backend_state(const std::string& service, const config::Address& address,
                                                         std::uint16_t port, config::BackendState state) {
  const userspace::SocketAddress backend(address, port);
  auto error = cli::sized<clusterip_error>();
  return outcome(
      plugin_->set_backend_state(handle_.get(), service.c_str(), backend.get(), backend.length, to_abi(state), &error),
      error);
}

std::expected<int, Failure> FastPath::enable_events(std::uint32_t seconds) {
  auto error = cli::sized<clusterip_error>();
  const int fd = plugin_->event_fd(handle_.get(), seconds, &error);
  if (fd < 0) return std::unexpected(cli::failure_of(error));
  return fd;
}

void FastPath::read_events(const std::function<void(const clusterip_event&)>& visit) {
  const auto hand_on = [](const clusterip_event* event, void* user) noexcept {
    (*static_cast<const std::function<void(const clusterip_event&)>*>(user))(*event);
    return 0;
  };
  plugin_->read_events(handle_.get(), hand_on, const_cast<void*>(static_cast<const void*>(&visit)), nullptr);
}

}  // namespace run
