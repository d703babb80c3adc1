// SPDX-License-Identifier: BSD-2-Clause
//
// A kubeconfig file is YAML. This is the only place that knows.
#include <fmt/format.h>
#include <yaml-cpp/yaml.h>

#include <cerrno>
#include <cstdint>
#include <string>
#include <string_view>

#include "config/fail.h"
#include "config/printable.h"
#include "config/read_config.h"
#include "kubernetes/access.h"

namespace kubernetes {
namespace {

constexpr std::size_t max_text = std::size_t{4} * 1024 * 1024;

/// What is wrong with the file; caught below.
struct Fault {
  std::string message;
};

std::string text_of(const YAML::Node& node, const char* key) {
  const YAML::Node value = node[key];
  if (!value || value.IsNull()) return {};
  if (!value.IsScalar()) throw Fault{fmt::format("{}: expected a string", key)};
  return value.Scalar();
}

/// The element of `list` that is called `name`, and in it `kind`.
YAML::Node find(const YAML::Node& root, const char* list, const std::string& name, const char* kind) {
  for (const YAML::Node& one : root[list]) {
    if (one.IsMap() && text_of(one, "name") == name && one[kind].IsMap()) return one[kind];
  }
  throw Fault{fmt::format("{}: expected one with the name {}, got none", list, config::quoted(name))};
}

std::string decode(std::string_view text, const char* key) {
  static constexpr std::string_view digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string result;
  std::uint32_t bits = 0;
  int count = 0;
  for (const char c : text) {
    if (c == '=' || c == '\n' || c == '\r' || c == ' ') continue;
    const std::size_t digit = digits.find(c);
    if (digit == std::string_view::npos) throw Fault{fmt::format("{}: expected base64", key)};
    bits = bits << 6 | static_cast<std::uint32_t>(digit);
    count += 6;
    if (count >= 8) {
      count -= 8;
      result += static_cast<char>(bits >> count & 0xff);
    }
  }
  return result;
}

/// The value of `key`-data, or the file that `key` names.
std::string data_or_file(const YAML::Node& node, const std::string& key, const std::string& base,
                         std::string* source = nullptr) {
  const std::string data_key = key + "-data";
  if (const std::string data = text_of(node, data_key.c_str()); !data.empty()) {
    if (source != nullptr) *source = data_key;
    return decode(data, data_key.c_str());
  }
  std::string file = text_of(node, key.c_str());
  if (file.empty()) return {};
  if (!file.starts_with('/')) file = fmt::format("{}/{}", base, file);
  auto text = config::read_file(file);
  if (!text) throw Fault{fmt::format("{}: {}", key, text.error().message)};
  if (source != nullptr) *source = file;
  return std::move(*text);
}

Exec read_exec(const YAML::Node& node, const std::string& base) {
  Exec exec{.command = {text_of(node, "command")}, .environment = {}, .api_version = text_of(node, "apiVersion")};
  std::string& command = exec.command.front();
  if (command.empty()) throw Fault{"exec.command: expected a command"};
  if (command.contains('/') && !command.starts_with('/')) command = fmt::format("{}/{}", base, command);
  if (!exec.api_version.starts_with("client.authentication.k8s.io/"))
    throw Fault{"exec.apiVersion: expected client.authentication.k8s.io/v1"};
  if (text_of(node, "interactiveMode") == "Always") throw Fault{"exec.interactiveMode: expected Never or IfAvailable"};
  for (const YAML::Node& one : node["args"]) exec.command.push_back(one.as<std::string>());
  for (const YAML::Node& one : node["env"]) exec.environment[text_of(one, "name")] = text_of(one, "value");
  return exec;
}

Access read(const YAML::Node& root, const std::string& context, const std::string& base) {
  if (!root.IsMap()) throw Fault{"expected a kubeconfig"};
  const std::string current = context.empty() ? text_of(root, "current-context") : context;
  if (current.empty()) throw Fault{"current-context: expected a context, got none"};
  const YAML::Node chosen = find(root, "contexts", current, "context");
  const YAML::Node cluster = find(root, "clusters", text_of(chosen, "cluster"), "cluster");
  auto access = parse_server(text_of(cluster, "server"));
  if (!access) throw Fault{fmt::format("server: {}", access.error().message)};
  if (text_of(cluster, "insecure-skip-tls-verify") == "true")
    throw Fault{
        "insecure-skip-tls-verify: expected false: whoever could answer in its place would direct all connects"};
  if (!text_of(cluster, "proxy-url").empty()) throw Fault{"proxy-url: expected none: proxies are not spoken to"};
  access->server_name = text_of(cluster, "tls-server-name");
  access->ca = data_or_file(cluster, "certificate-authority", base, &access->ca_source);

  const std::string user_name = text_of(chosen, "user");
  if (user_name.empty()) return std::move(*access);
  const YAML::Node user = find(root, "users", user_name, "user");
  access->certificate = data_or_file(user, "client-certificate", base);
  access->key = data_or_file(user, "client-key", base);
  if (access->certificate.empty() != access->key.empty())
    throw Fault{"client-certificate and client-key: expected both or none"};
  access->token = text_of(user, "token");
  if (access->token.find_first_of("\r\n") != std::string::npos) throw Fault{"token: expected one line"};
  access->token_file = text_of(user, "tokenFile");
  if (!access->token_file.empty() && !access->token_file.starts_with('/'))
    access->token_file = fmt::format("{}/{}", base, access->token_file);
  if (user["exec"].IsDefined() && user["exec"].IsMap()) access->exec = read_exec(user["exec"], base);
  for (const char* key : {"username", "password", "auth-provider"})
    if (user[key].IsDefined() && !user[key].IsNull())
      throw Fault{fmt::format("{}: expected a token, a client certificate or exec", key)};
  // kubectl leaves them unused without a word; nothing here is done otherwise than it was asked for.
  const bool has_credentials =
      !access->certificate.empty() || !access->token.empty() || !access->token_file.empty() || access->exec;
  if (!access->is_tls && has_credentials)
    throw Fault{fmt::format("user {}: expected none with credentials, as http:// would send them in clear, or https://",
                            config::quoted(user_name))};
  return std::move(*access);
}

}  // namespace

config::Result<Access> read_kubeconfig(const std::string& text, const std::string& context, const std::string& base) {
  if (text.size() > max_text) return config::fail(-EFBIG, "expected at most 4 MiB");
  try {
    return read(YAML::Load(text), context, base);
  } catch (const Fault& fault) {
    return config::fail(-EINVAL, fault.message);
  } catch (const YAML::Exception& fault) {
    return config::fail(-EINVAL, fmt::format("line {}: {}", fault.mark.line + 1, config::printable(fault.msg)));
  }
}

}  // namespace kubernetes
