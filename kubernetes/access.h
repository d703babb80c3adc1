// SPDX-License-Identifier: BSD-2-Clause
//
// How to reach an API server, and as whom.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "config/config.h"
#include "config/result.h"

namespace kubernetes {

/// A program that prints credentials (client.authentication.k8s.io).
struct Exec {
  std::vector<std::string> command;  // with its arguments; the first is a path, or looked for in PATH
  std::map<std::string, std::string> environment;
  std::string api_version;
};

struct Access {
  std::string origin;  // how messages call it: "https://10.0.0.1:6443"
  std::string host;    // without brackets
  std::string port;
  std::string path;  // before "/api"; empty, or begins with a slash and does not end with one
  bool is_tls = true;
  std::string server_name;  // that the certificate is for; empty: the host
  std::string ca;           // PEM
  std::string ca_source;    // where it comes from; empty: the system's authorities
  std::string certificate;  // PEM, of the client; empty: none
  std::string key;
  std::string token;       // empty: none, or one of the others
  std::string token_file;  // read again for each connection: tokens are rotated
  std::optional<Exec> exec;
};

/// "https://host:port/path"; http:// is for loopback only (kubectl proxy): over the network, anybody could say where
/// connections go.
config::Result<Access> parse_server(std::string_view url);

/// A kubeconfig file's current context, or `context`. `base` is its directory, for relative paths.
config::Result<Access> read_kubeconfig(const std::string& text, const std::string& context, const std::string& base);

/// As [kubernetes] says. Reads files and the environment. -EPERM: a kubeconfig has a command, and somebody else than
/// root and this process's user may write to it.
config::Result<Access> find_access(const config::Kubernetes& choices);

/// Credentials as an `exec` command prints them.
struct Credentials {
  std::string token;
  std::string certificate;
  std::string key;
  std::optional<std::chrono::system_clock::time_point> expires;
};
config::Result<Credentials> parse_credentials(std::string_view json);

}  // namespace kubernetes
