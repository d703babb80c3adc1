// SPDX-License-Identifier: BSD-2-Clause
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <string>

#include "kubernetes/access.h"

namespace kubernetes {
namespace {

using testing::HasSubstr;

TEST(KubernetesAccess, ReadsServerUrls) {
  const auto plain = parse_server("https://10.0.0.1:6443");
  ASSERT_TRUE(plain);
  EXPECT_EQ(plain->host, "10.0.0.1");
  EXPECT_EQ(plain->port, "6443");
  EXPECT_EQ(plain->path, "");
  EXPECT_TRUE(plain->is_tls);
  EXPECT_EQ(plain->origin, "https://10.0.0.1:6443");
  const auto path = parse_server("https://api.example.org/k8s/clusters/c1/");
  ASSERT_TRUE(path);
  EXPECT_EQ(path->host, "api.example.org");
  EXPECT_EQ(path->port, "443");
  EXPECT_EQ(path->path, "/k8s/clusters/c1");
  const auto v6 = parse_server("https://[fd00::1]:6443/");
  ASSERT_TRUE(v6);
  EXPECT_EQ(v6->host, "fd00::1");
  EXPECT_EQ(v6->origin, "https://[fd00::1]:6443");
}

TEST(KubernetesAccess, PlainHttpIsForThisMachineOnly) {
  for (const char* url : {"http://127.0.0.1:8001", "http://[::1]:8001", "http://localhost:8001"}) {
    const auto access = parse_server(url);
    ASSERT_TRUE(access) << url;
    EXPECT_FALSE(access->is_tls);
  }
  for (const char* url : {"http://10.0.0.1:8001", "http://example.org", "http://localhost.example.org"}) {
    const auto access = parse_server(url);
    ASSERT_FALSE(access) << url;
    EXPECT_THAT(access.error().message, HasSubstr("expected https://, or http:// to this machine itself"));
  }
}

TEST(KubernetesAccess, RefusesWhatIsNoUrl) {
  for (const char* url : {"", "10.0.0.1", "ftp://10.0.0.1", "https://", "https://:6443", "https://a:0", "https://a:x",
                          "https://[fd00::1", "https://fd00::1:6443", "https://a b", "https://a/x y", "https://a/?x",
                          "https://a\r\nHost: b", "https://user@a"}) {
    EXPECT_FALSE(parse_server(url)) << url;
  }
}

TEST(KubernetesAccess, ReadsExecCredentials) {
  const auto credentials = parse_credentials(
      R"({"kind":"ExecCredential","status":{"token":"t","expirationTimestamp":"2026-01-02T03:04:05Z"}})");
  ASSERT_TRUE(credentials);
  EXPECT_EQ(credentials->token, "t");
  ASSERT_TRUE(credentials->expires);
  EXPECT_EQ(std::chrono::system_clock::to_time_t(*credentials->expires), 1767323045);
  for (const char* text :
       {"", "{}", "[]", R"({"status":{}})", R"({"status":{"token":7}})", R"({"status":{"token":"a\nb"}})"})
    EXPECT_FALSE(parse_credentials(text)) << text;
}

TEST(KubernetesAccess, ReadsTheZoneOfAnExpiration) {
  const auto expires = [](const std::string& time) -> std::optional<std::time_t> {
    const auto read = parse_credentials(R"({"status":{"token":"t","expirationTimestamp":")" + time + R"("}})");
    if (!read->expires) return {};
    return std::chrono::system_clock::to_time_t(*read->expires);
  };
  EXPECT_EQ(expires("2026-01-02T03:04:05.678901Z"), 1767323045);
  EXPECT_EQ(expires("2026-01-02T05:04:05+02:00"), 1767323045);
  EXPECT_EQ(expires("2026-01-01T21:34:05.5-05:30"), 1767323045);
  for (const char* other : {"", "soon", "2026-01-02T03:04:05", "2026-01-02T03:04:05+02", "2026-01-02T03:04:05+0x:00"})
    EXPECT_EQ(expires(other), std::nullopt) << other;
}

TEST(KubernetesAccess, CredentialsDoNotGoInClear) {
  config::Kubernetes choices;
  choices.server = "http://127.0.0.1:8001";
  ASSERT_TRUE(find_access(choices));
  EXPECT_EQ(find_access(choices)->token_file, "");
  choices.token_file = "/token";
  const auto with_a_file = find_access(choices);
  ASSERT_FALSE(with_a_file);
  EXPECT_EQ(with_a_file.error().message,
            "kubernetes.token_file: expected none, as http:// would send the token in clear");

  const auto with = [](const std::string& scheme, const std::string& user) {
    return read_kubeconfig(
        "{current-context: a, contexts: [{name: a, context: {cluster: b, user: c}}], "
        "clusters: [{name: b, cluster: {server: \"" +
            scheme + "://127.0.0.1:8001\"}}], users: [{name: c, user: {" + user + "}}]}",
        "", "/");
  };
  EXPECT_TRUE(with("http", ""));
  for (const std::string user :
       {"token: t", "tokenFile: /t", "exec: {command: x, apiVersion: client.authentication.k8s.io/v1}",
        "client-certificate-data: YQ==, client-key-data: YQ=="}) {
    EXPECT_TRUE(with("https", user)) << user;
    const auto access = with("http", user);
    ASSERT_FALSE(access) << user;
    EXPECT_EQ(access.error().message,
              "user \"c\": expected none with credentials, as http:// would send them in clear, or https://");
  }
}

TEST(KubernetesAccess, UsersThatCannotBeSpokenForAreRefused) {
  const auto error_of = [](const std::string& user) {
    const auto access = read_kubeconfig(
        "{current-context: a, contexts: [{name: a, context: {cluster: b, user: c}}], "
        "clusters: [{name: b, cluster: {server: \"https://127.0.0.1:8001\"}}], users: [{name: c, user: {" +
            user + "}}]}",
        "", "/");
    return access ? std::string("accepted") : access.error().message;
  };
  EXPECT_THAT(error_of("client-certificate-data: YQ=="), HasSubstr("client-certificate and client-key: expected both"));
  EXPECT_THAT(error_of("client-key-data: YQ=="), HasSubstr("client-certificate and client-key: expected both"));
  EXPECT_THAT(error_of("exec: {command: x, apiVersion: example.org/v1}"),
              HasSubstr("exec.apiVersion: expected client.authentication.k8s.io/v1"));
  EXPECT_THAT(error_of("exec: {apiVersion: client.authentication.k8s.io/v1}"), HasSubstr("expected a command"));
}

TEST(KubernetesAccess, OfAPodIsItsEnvironments) {
  const auto look = [](const char* host) {
    ::setenv("KUBERNETES_SERVICE_HOST", host, 1);
    ::setenv("KUBERNETES_SERVICE_PORT", "6443", 1);
    auto access = find_access({});
    ::unsetenv("KUBERNETES_SERVICE_HOST");
    ::unsetenv("KUBERNETES_SERVICE_PORT");
    return access;
  };
  ASSERT_TRUE(look("10.96.0.1"));
  EXPECT_EQ(look("10.96.0.1")->origin, "https://10.96.0.1:6443");
  ASSERT_TRUE(look("fd00::1"));
  EXPECT_EQ(look("fd00::1")->origin, "https://[fd00::1]:6443");
  const auto nowhere = find_access({});
  ASSERT_FALSE(nowhere);
  EXPECT_THAT(nowhere.error().message, HasSubstr("expected a server or a kubeconfig, or to run in a pod"));
}

TEST(KubernetesAccess, KubeconfigOfAnotherKindIsRefusedWithItsPlace) {
  for (const char* text :
       {"", "[]", "7", "clusters: 7", "current-context: a", "a: [", "a: b: c", "\xff\xfe", "&a [*a]"}) {
    const auto access = read_kubeconfig(text, "", "/");
    EXPECT_FALSE(access) << text;
  }
}

/// A kubeconfig of this owner and mode, whose user has this; it ends with this object.
class Kubeconfig {
 public:
  Kubeconfig(const std::string& user, uid_t owner, mode_t mode) {
    const int file = ::mkstemp(path_.data());
    const std::string text =
        "{current-context: a, contexts: [{name: a, context: {cluster: b, user: c}}], clusters: [{name: b, cluster: "
        "{server: \"https://127.0.0.1:6443\"}}], users: [{name: c, user: {" +
        user + "}}, {name: d, user: {exec: {command: x, apiVersion: client.authentication.k8s.io/v1}}}]}";
    EXPECT_EQ(::write(file, text.data(), text.size()), static_cast<ssize_t>(text.size()));
    EXPECT_EQ(::fchmod(file, mode), 0);
    EXPECT_EQ(::fchown(file, owner, static_cast<gid_t>(-1)), 0);
    ::close(file);
  }
  ~Kubeconfig() { ::unlink(path_.c_str()); }
  Kubeconfig(const Kubeconfig&) = delete;
  Kubeconfig& operator=(const Kubeconfig&) = delete;

  const std::string& path() const { return path_; }
  /// The reason why it is no use; empty: it is one.
  std::string refusal() const {
    config::Kubernetes choices;
    choices.kubeconfig = path_;
    const auto access = find_access(choices);
    return access ? "" : access.error().message;
  }

 private:
  std::string path_ = "/tmp/kubeconfig-XXXXXX";
};

constexpr const char* with_command = "exec: {command: x, apiVersion: client.authentication.k8s.io/v1}";

TEST(KubernetesAccess, CommandIsRunOnlyOfAFileThatNobodyElseMayWriteTo) {
  for (const mode_t mode : {0400U, 0600U, 0644U, 0755U}) {
    const Kubeconfig own(with_command, ::geteuid(), mode);
    EXPECT_EQ(own.refusal(), "") << mode;
  }
  for (const mode_t mode : {0620U, 0602U, 0664U, 0666U, 0777U}) {
    const Kubeconfig shared(with_command, ::geteuid(), mode);
    EXPECT_THAT(shared.refusal(), testing::StartsWith(shared.path() + ": exec: expected a file of root")) << mode;
    EXPECT_THAT(shared.refusal(), testing::EndsWith(fmt::format("'s with mode {:04o}", mode)));
    const Kubeconfig without("token: t", ::geteuid(), mode);
    EXPECT_EQ(without.refusal(), "") << "another user's command is not run";
  }
}

TEST(KubernetesAccess, CommandIsRunOnlyOfAFileOfRootsOrOfThisUser) {
  if (::geteuid() != 0) GTEST_SKIP() << "gives files away";
  const Kubeconfig theirs(with_command, 65534, 0644);
  EXPECT_EQ(theirs.refusal(),
            theirs.path() +
                ": exec: expected a file of root's that nobody else may write to, as its command is run with "
                "the rights of this process, got user 65534's with mode 0644");
  EXPECT_EQ(Kubeconfig("token: t", 65534, 0644).refusal(), "");
  const Kubeconfig of_root(with_command, 0, 0644);
  const Kubeconfig own(with_command, 65534, 0600);
  const Kubeconfig of_another(with_command, 1, 0644);
  ASSERT_EQ(::seteuid(65534), 0);
  const std::string said = of_another.refusal(), said_of_root = of_root.refusal(), said_of_own = own.refusal();
  ASSERT_EQ(::seteuid(0), 0);
  EXPECT_THAT(said, HasSubstr("expected a file of root or user 65534's that"));
  EXPECT_EQ(said_of_root, "");
  EXPECT_EQ(said_of_own, "");
}

}  // namespace
}  // namespace kubernetes
