// SPDX-License-Identifier: BSD-2-Clause
#include "kubernetes/access.h"

#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <boost/json.hpp>
#include <cerrno>
#include <charconv>
#include <cstdlib>
#include <filesystem>
#include <iomanip>
#include <sstream>

#include "config/fail.h"
#include "config/printable.h"
#include "config/read_config.h"
#include "config/values.h"

namespace kubernetes {
namespace {

constexpr const char* account = "/var/run/secrets/kubernetes.io/serviceaccount";
constexpr std::size_t max_token = 65536;

std::unexpected<config::Error> invalid(std::string message) { return config::fail(-EINVAL, std::move(message)); }

/// What is left of a time of RFC 3339 behind its seconds: "Z", ".25Z", "+02:00".
std::optional<std::chrono::minutes> zone_offset(std::string_view text) {
  if (text.starts_with('.')) text.remove_prefix(std::min(text.find_first_not_of("0123456789", 1), text.size()));
  if (text == "Z" || text == "z") return std::chrono::minutes(0);
  if (text.size() != 6 || (text[0] != '+' && text[0] != '-') || text[3] != ':') return {};
  std::array<int, 2> parts{};
  for (const std::size_t i : {0U, 1U}) {
    const char* begin = text.data() + 1 + 3 * i;
    const auto [end, error] = std::from_chars(begin, begin + 2, parts[i]);
    if (error != std::errc{} || end != begin + 2 || parts[i] < 0) return {};
  }
  const std::chrono::minutes offset(60 * parts[0] + parts[1]);
  return text[0] == '-' ? -offset : offset;
}

/// Whoever may write a kubeconfig with a command decides what this process runs.
config::Result<void> check_writers(const struct stat& kubeconfig) {
  const bool is_trusted = kubeconfig.st_uid == 0 || kubeconfig.st_uid == ::geteuid();
  if (is_trusted && (kubeconfig.st_mode & (S_IWGRP | S_IWOTH)) == 0) return {};
  const std::string owner = ::geteuid() == 0 ? "root" : fmt::format("root or user {}", ::geteuid());
  return config::fail(-EPERM, fmt::format("exec: expected a file of {}'s that nobody else may write to, as its command "
                                          "is run with the rights of this process, got user {}'s with mode {:04o}",
                                          owner, kubeconfig.st_uid, kubeconfig.st_mode & 07777));
}

}  // namespace

config::Result<Access> parse_server(std::string_view url) {
  Access access;
  const auto expected = [&url] {
    return invalid(fmt::format("expected a URL such as \"https://10.0.0.1:6443\", got {}", config::quoted(url)));
  };
  std::string_view rest = url;
  if (rest.starts_with("https://")) {
    rest.remove_prefix(8);
  } else if (rest.starts_with("http://")) {
    access.is_tls = false;
    rest.remove_prefix(7);
  } else {
    return expected();
  }
  const std::size_t slash = std::min(rest.find('/'), rest.size());
  std::string_view authority = rest.substr(0, slash);
  access.path = rest.substr(slash);
  while (access.path.ends_with('/')) access.path.pop_back();
  if (access.path.find_first_of(" \r\n\t?#") != std::string::npos) return expected();
  access.port = access.is_tls ? "443" : "80";
  if (authority.starts_with('[')) {
    const std::size_t end = authority.find(']');
    if (end == std::string_view::npos) return expected();
    access.host = authority.substr(1, end - 1);
    authority.remove_prefix(end + 1);
  } else {
    const std::size_t colon = std::min(authority.find(':'), authority.size());
    access.host = authority.substr(0, colon);
    authority.remove_prefix(colon);
  }
  if (access.host.empty() ||
      access.host.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-:_") !=
          std::string::npos)
    return expected();
  if (!authority.empty()) {
    if (!config::parse_endpoint(fmt::format("127.0.0.1{}", authority))) return expected();
    access.port = authority.substr(1);
  }
  if (!access.is_tls) {
    const auto address = config::parse_address(access.host);
    if (access.host != "localhost" && !(address && address->is_loopback()))
      return invalid(fmt::format("expected https://, or http:// to this machine itself, got {}", config::quoted(url)));
  }
  const bool is_v6 = access.host.contains(':');
  access.origin = fmt::format("http{}://{}{}{}:{}", access.is_tls ? "s" : "", is_v6 ? "[" : "", access.host,
                              is_v6 ? "]" : "", access.port);
  return access;
}

config::Result<Access> find_access(const config::Kubernetes& choices) {
  if (!choices.kubeconfig.empty()) {
    struct stat status{};
    const auto text = config::read_file(choices.kubeconfig, &status);
    if (!text) return std::unexpected(text.error());
    const std::string base = std::filesystem::absolute(choices.kubeconfig).parent_path();
    auto access = read_kubeconfig(*text, choices.context, base);
    if (access && access->exec) {
      if (auto trusted = check_writers(status); !trusted) access = std::unexpected(trusted.error());
    }
    if (!access)
      return config::fail(access.error().code,
                          fmt::format("{}: {}", config::printable(choices.kubeconfig), access.error().message));
    return access;
  }

  std::string server = choices.server;
  const char* host = std::getenv("KUBERNETES_SERVICE_HOST");
  const char* port = std::getenv("KUBERNETES_SERVICE_PORT");
  if (server.empty() && (host == nullptr || port == nullptr))
    return config::fail(-ENOENT,
                        "kubernetes: expected a server or a kubeconfig, or to run in a pod (KUBERNETES_SERVICE_HOST)");
  if (server.empty())
    server = fmt::format(fmt::runtime(std::string_view(host).contains(':') ? "https://[{}]:{}" : "https://{}:{}"), host,
                         port);
  auto access = parse_server(server);
  if (!access) return config::fail(-EINVAL, fmt::format("kubernetes.server: {}", access.error().message));
  if (!access->is_tls && !choices.token_file.empty())
    return config::fail(-EINVAL, "kubernetes.token_file: expected none, as http:// would send the token in clear");
  if (!access->is_tls) return access;  // and the account's is not sent

  const std::string account_ca = fmt::format("{}/ca.crt", account);
  const std::string account_token = fmt::format("{}/token", account);
  std::error_code error;
  std::string ca_file = choices.ca_file;
  if (ca_file.empty() && std::filesystem::exists(account_ca, error)) ca_file = account_ca;
  if (!ca_file.empty()) {
    auto ca = config::read_file(ca_file);
    if (!ca) return std::unexpected(ca.error());
    access->ca = std::move(*ca);
    access->ca_source = ca_file;
  }
  access->token_file = choices.token_file;
  if (access->token_file.empty() && std::filesystem::exists(account_token, error)) access->token_file = account_token;
  return access;
}

config::Result<Credentials> parse_credentials(std::string_view text) {
  boost::system::error_code error;
  const auto value = boost::json::parse(text, error);
  const auto* object = !error ? value.if_object() : nullptr;
  const auto* status_value = object != nullptr ? object->if_contains("status") : nullptr;
  const auto* status = status_value != nullptr ? status_value->if_object() : nullptr;
  if (status == nullptr) return invalid("expected an ExecCredential with a status");
  const auto get = [status](std::string_view key) {
    const auto* field = status->if_contains(key);
    return field != nullptr && field->is_string() ? std::string(field->get_string()) : std::string();
  };
  Credentials result{
      .token = get("token"), .certificate = get("clientCertificateData"), .key = get("clientKeyData"), .expires = {}};
  if (result.token.empty() && result.certificate.empty())
    return invalid("expected an ExecCredential with a token or a certificate");
  if (result.token.size() > max_token || result.token.find_first_of("\r\n") != std::string::npos)
    return invalid("expected a token of one line");
  if (const std::string expires = get("expirationTimestamp"); !expires.empty()) {
    std::tm time{};
    std::istringstream in(expires);
    in.imbue(std::locale::classic());
    std::string rest;
    if (in >> std::get_time(&time, "%Y-%m-%dT%H:%M:%S")) std::getline(in, rest);
    if (const auto offset = zone_offset(rest))
      result.expires = std::chrono::system_clock::from_time_t(::timegm(&time)) - *offset;
  }
  return result;
}

}  // namespace kubernetes
