// SPDX-License-Identifier: BSD-2-Clause
//
// How the TOML spells the values of each enumeration: read from here, and shown from here.
#pragma once

#include <string_view>

#include "config/config.h"

namespace config {

template <class Enum>
struct Name {
  std::string_view text;
  Enum value;
};

inline constexpr Name<Protocol> protocol_names[] = {{"tcp", Protocol::tcp}, {"udp", Protocol::udp}};
inline constexpr Name<Policy> policy_names[] = {{"random", Policy::random},
                                                {"round_robin", Policy::round_robin},
                                                {"least_conn", Policy::least_conn},
                                                {"maglev", Policy::maglev}};
inline constexpr Name<Client> client_names[] = {
    {"cgroup", Client::cgroup}, {"netns", Client::netns}, {"socket", Client::socket}};
inline constexpr Name<NoBackend> no_backend_names[] = {
    {"refuse", NoBackend::refuse}, {"unreachable", NoBackend::unreachable}, {"pass", NoBackend::pass}};
inline constexpr Name<ProxyProtocol> proxy_protocol_names[] = {
    {"none", ProxyProtocol::none}, {"v1", ProxyProtocol::v1}, {"v2", ProxyProtocol::v2}};
inline constexpr Name<OnRemove> on_remove_names[] = {
    {"keep", OnRemove::keep}, {"drain", OnRemove::drain}, {"reset", OnRemove::reset}};
inline constexpr Name<OnExit> on_exit_names[] = {{"keep", OnExit::keep}, {"detach", OnExit::detach}};
inline constexpr Name<EngineMode> engine_names[] = {
    {"auto", EngineMode::automatic}, {"bpf", EngineMode::bpf}, {"userspace", EngineMode::userspace}};
inline constexpr Name<BackendState> state_names[] = {{"active", BackendState::active}, {"drain", BackendState::drain}};

/// The TOML's word for `value`: name_of(policy_names, service.policy).
template <class Enum, std::size_t count>
constexpr std::string_view name_of(const Name<Enum> (&names)[count], Enum value) {
  for (const auto& name : names)
    if (name.value == value) return name.text;
  return "";
}

}  // namespace config
