// SPDX-License-Identifier: BSD-2-Clause
//
// Real programs, unmodified, at both ends: clients in the cgroup, servers on another host.
#include <fcntl.h>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <sched.h>
#include <sys/mount.h>

#include <string>
#include <vector>

#include "tests/support/fixture.h"
#include "tests/support/other_host.h"

namespace {

using namespace support;
using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

constexpr const char* udp = "protocol = \"udp\"";

class RealProgram : public Integration {
 protected:
  Finished run_here(const std::vector<std::string>& command) const { return run_in_cgroup(cgroup(), command); }
};

/// A service's VIP, and the address of its backend on the other host.
struct Path {
  const char* vip;
  const char* backend;
  const char* client;  // whom the backend sees
};
constexpr Path web_paths[] = {{"10.96.0.10", OtherHost::v4, OtherHost::client_v4},
                              {"fd00:96::10", OtherHost::v6, OtherHost::client_v6}};

// --- iperf3 ---------------------------------------------------------------------------------------------------------

class Iperf3 : public RealProgram {
 protected:
  /// One run to the VIP; returns the client's report. UDP has a TCP connection for control, at the same port.
  std::string report(const OtherHost& host, const Path& path, const std::vector<std::string>& options) {
    Process server = host.start({"iperf3", "--server", "--one-off", "--forceflush", "--bind", path.backend});
    server.wait_for_output("Server listening");
    Handle handle = serve(toml({{"tcp", path.vip, 5201, {{path.backend, 5201}}},
                                {"udp", path.vip, 5201, {{path.backend, 5201}}, "refuse", udp}}));
    std::vector<std::string> command = {"iperf3", "--client", path.vip, "--json"};
    command.insert(command.end(), options.begin(), options.end());
    const Finished client = run_here(command);
    EXPECT_EQ(client.exit_code, 0) << client.out << client.err;
    const Finished served = server.wait();
    EXPECT_EQ(served.exit_code, 0) << served.err;
    EXPECT_THAT(served.out, HasSubstr(fmt::format("Accepted connection from {}, ", path.client)));
    const auto seen = handle.visit();
    tcp_connects_ = seen.at(0).connects;
    udp_connects_ = seen.at(1).connects;
    return client.out;
  }

  std::uint64_t tcp_connects_ = 0;
  std::uint64_t udp_connects_ = 0;
};

TEST_F(Iperf3, TcpArrives) {
  const OtherHost host;
  for (const Path& path : web_paths) {
    SCOPED_TRACE(path.vip);
    const std::string seen = report(host, path, {"--bytes", "32M", "--parallel", "2"});
    EXPECT_EQ(jq("[.start.connected[].remote_host] | unique", seen), fmt::format("[\"{}\"]\n", path.vip));
    // What has arrived is the server's word. It stops counting when the client has handed over its last byte: what the
    // buffers hold then, 20 MB at most, is not in it.
    EXPECT_EQ(jq(".end.sum_received.bytes > 8000000 and .end.sum_received.bytes <= .end.sum_sent.bytes", seen),
              "true\n")
        << seen;
    EXPECT_EQ(tcp_connects_, 3u) << "one for control and two for data";
    EXPECT_EQ(udp_connects_, 0u);
  }
}

TEST_F(Iperf3, UdpArrives) {
  const OtherHost host;
  for (const Path& path : web_paths) {
    SCOPED_TRACE(path.vip);
    const std::string seen = report(host, path, {"--udp", "--bytes", "2M", "--bitrate", "100M"});
    EXPECT_EQ(jq("[.start.connected[].remote_host]", seen), fmt::format("[\"{}\"]\n", path.vip));
    // What has arrived is the server's word. A datagram may be lost, not all of them.
    EXPECT_EQ(jq(".end.sum_received | .bytes > 1000000 and .lost_packets < .packets / 2", seen), "true\n") << seen;
    EXPECT_EQ(tcp_connects_, 1u);
    EXPECT_EQ(udp_connects_, 1u);
  }
}

// --- DNS ------------------------------------------------------------------------------------------------------------

/// dnsmasq; returns when it answers.
class Dns {
 public:
  /// On the other host, at port 53. It knows two names: `name.test` is a text, `web.test` the VIPs of the web.
  Dns(const OtherHost& host, const std::string& address, const std::string& text)
      : process_(host.start(command({"--listen-address=" + address, "--txt-record=name.test," + text,
                                     "--host-record=web.test,10.96.0.10,fd00:96::10"}))) {
    process_.wait_for_error("started");
  }

  /// In the cgroup, at 127.0.0.1:5353: asks another server, and takes answers from nobody else.
  Dns(const Cgroup& cgroup, const std::string& server)
      : process_(command({"--listen-address=127.0.0.1", "--port=5353", "--cache-size=0", "--server=" + server}),
                 &cgroup) {
    process_.wait_for_error("started");
  }

  /// Blocks until a question for `name` has come; returns who has asked.
  std::string asked_for(const std::string& name) {
    const std::string line = process_.wait_for_error(name + " from ");
    return line.substr(line.rfind(' ') + 1);
  }

 private:
  static std::vector<std::string> command(const std::vector<std::string>& options) {
    std::vector<std::string> words = {
        "dnsmasq",       "--conf-file=/dev/null", "--keep-in-foreground", "--no-hosts",  "--log-facility=-",
        "--log-queries", "--user=root",           "--pid-file=",          "--no-resolv", "--bind-interfaces"};
    words.insert(words.end(), options.begin(), options.end());
    return words;
  }

  Process process_;
};

constexpr Path dns_paths[] = {{"10.96.0.53", OtherHost::v4, OtherHost::client_v4},
                              {"fd00:96::53", OtherHost::v6, OtherHost::client_v6}};

std::vector<Service> dns_services(const Path& path) {
  return {{"dns", path.vip, 53, {{path.backend, 53}}, "refuse", udp}, {"dns-tcp", path.vip, 53, {{path.backend, 53}}}};
}

TEST_F(RealProgram, DigIsAnsweredByTheVip) {
  const OtherHost host;
  for (const Path& path : dns_paths) {
    SCOPED_TRACE(path.vip);
    Dns dns(host, path.backend, "somebody");
    const Handle handle = serve(toml(dns_services(path)));
    for (const char* way : {"UDP", "TCP"}) {
      const Finished dig = run_here({"dig", "-r", way == std::string("TCP") ? "+tcp" : "+notcp", "+tries=1",
                                     fmt::format("@{}", path.vip), "name.test", "TXT"});
      EXPECT_EQ(dig.exit_code, 0) << dig.err;
      EXPECT_THAT(dig.out, AllOf(HasSubstr("\t\"somebody\"\n"),
                                 HasSubstr(fmt::format("SERVER: {0}#53({0}) ({1})", path.vip, way)),
                                 Not(HasSubstr("unexpected source"))));
      EXPECT_EQ(dns.asked_for("name.test"), path.client);
    }
  }
}

TEST_F(RealProgram, NslookupIsAnsweredByTheVip) {
  const OtherHost host;
  for (const Path& path : dns_paths) {
    SCOPED_TRACE(path.vip);
    const Dns dns(host, path.backend, "somebody");
    const Handle handle = serve(toml(dns_services(path)));
    const Finished nslookup = run_here({"nslookup", "-timeout=10", "web.test", path.vip});
    EXPECT_EQ(nslookup.exit_code, 0) << nslookup.err;
    EXPECT_THAT(nslookup.out, AllOf(HasSubstr(fmt::format("Address:\t{}#53\n", path.vip)),
                                    HasSubstr("Address: 10.96.0.10\n"), HasSubstr("Address: fd00:96::10\n")));
  }
}

// dnsmasq asks with unconnected sockets, and drops what does not come from the address that it asked.
TEST_F(RealProgram, ForwardingResolverWithUnconnectedSocketsIsAnsweredByTheVip) {
  const OtherHost host;
  for (const Path& path : dns_paths) {
    SCOPED_TRACE(path.vip);
    Dns dns(host, path.backend, "somebody");
    Handle handle = serve(toml(dns_services(path)));
    const Dns resolver(cgroup(), path.vip);
    for (int i = 0; i < 3; ++i) {
      const Finished dig =
          run_here({"dig", "-r", "+short", "+tries=1", "@127.0.0.1", "-p", "5353", "name.test", "TXT"});
      EXPECT_EQ(dig.out, "\"somebody\"\n") << dig.err;
      EXPECT_EQ(dns.asked_for("name.test"), path.client);
    }
    const SeenService seen = handle.visit().at(0);
    EXPECT_GE(seen.connects, 1u);
    EXPECT_GE(seen.reversed, 3u) << "each answer has been renamed";
    EXPECT_EQ(seen.live, 0u) << "only connected sockets count";
  }
}

// --- HTTP -----------------------------------------------------------------------------------------------------------

/// nginx on the other host, at port 80; returns when it answers. It says where it was reached, and by whom.
class Nginx {
 public:
  explicit Nginx(const OtherHost& host)
      : process_(host.start({"nginx", "-e", "stderr", "-c", directory_.write("nginx.conf", configuration())})) {
    process_.wait_for_error("event method");
  }

 private:
  std::string configuration() const {
    std::string text = fmt::format(
        "daemon off; master_process off; error_log stderr notice; pid {0}/pid;\nevents {{}}\nhttp {{ access_log off;\n"
        "server {{ listen {1}:80; listen [{2}]:80; return 200 \"nginx at $server_addr for $remote_addr\"; }}\n",
        directory_.path(), OtherHost::v4, OtherHost::v6);
    for (const char* kind : {"client_body", "proxy", "fastcgi", "uwsgi", "scgi"})
      text += fmt::format("{}_temp_path {}/{};\n", kind, directory_.path(), kind);
    return text + "}\n";
  }

  TemporaryDirectory directory_;
  Process process_;
};

std::vector<Service> web_services() {
  std::vector<Service> services;
  for (const Path& path : web_paths)
    services.push_back({fmt::format("web-{}", services.size()), path.vip, 8080, {{path.backend, 80}}});
  return services;
}

std::string url_host(const std::string& address) {
  return address.find(':') == std::string::npos ? address : "[" + address + "]";
}

std::vector<std::string> curl(const std::string& url, const std::string& family) {
  return {
      "curl", "-q", "-sS", "-g", family, "--noproxy", "*", "--max-time", "10", "--write-out", " by way of %{remote_ip}",
      url};
}

TEST_F(RealProgram, CurlSeesTheVipAndNginxTheClient) {
  const OtherHost host;
  const Nginx nginx(host);
  for (const bool peer_names : {true, false}) {
    const Handle handle = serve(fmt::format("[engine]\npeer_names = {}\n", peer_names) + toml(web_services()));
    for (const Path& path : web_paths) {
      const Finished seen = run_here(
          curl(fmt::format("http://{}:8080/", url_host(path.vip)), path.backend == OtherHost::v6 ? "-6" : "-4"));
      EXPECT_EQ(seen.exit_code, 0) << seen.err;
      EXPECT_EQ(seen.out, fmt::format("nginx at {} for {} by way of {}", path.backend, path.client,
                                      peer_names ? path.vip : path.backend));
    }
  }
}

// All of it: glibc's resolver asks a VIP, is told VIPs, sorts them by connects to their port 0, and curl connects to
// them.
TEST_F(RealProgram, GetaddrinfoAsksTheVipAndCurlGoesWhereItSays) {
  const OtherHost host;
  const Nginx nginx(host);
  const TemporaryDirectory directory;
  const std::string switches = directory.write("nsswitch.conf", "hosts: dns\n");
  for (const Path& path : dns_paths) {
    SCOPED_TRACE(path.vip);
    Dns dns(host, path.backend, "");
    auto services = web_services();
    for (const Service& service : dns_services(path)) services.push_back(service);
    const Handle handle = serve(toml(services));
    const std::string resolver = directory.write("resolv.conf", fmt::format("nameserver {}\n", path.vip));
    const auto use_resolver = [&] {
      checked(::unshare(CLONE_NEWNS), "unshare");
      checked(::mount(resolver.c_str(), "/etc/resolv.conf", nullptr, MS_BIND, nullptr), "resolv.conf");
      checked(::mount(switches.c_str(), "/etc/nsswitch.conf", nullptr, MS_BIND, nullptr), "nsswitch.conf");
    };
    for (const char* family : {"-4", "-6"}) {
      const Finished seen = Process(curl("http://web.test:8080/", family), &cgroup(), use_resolver).wait();
      EXPECT_EQ(seen.exit_code, 0) << seen.err;
      const Path& web = web_paths[family == std::string("-6") ? 1 : 0];
      EXPECT_EQ(seen.out, fmt::format("nginx at {} for {} by way of {}", web.backend, web.client, web.vip));
      EXPECT_EQ(dns.asked_for("web.test"), path.client);
    }
    const Finished getent = Process({"getent", "ahosts", "web.test"}, &cgroup(), use_resolver).wait();
    EXPECT_EQ(getent.exit_code, 0) << getent.err;
    EXPECT_THAT(getent.out, AllOf(HasSubstr("10.96.0.10"), HasSubstr("fd00:96::10"))) << "both are reachable";
  }
}

// --- a connection that lives long ------------------------------------------------------------------------------------

/// redis-server on the other host, at port 6379; returns when it answers. The key `name` tells them apart.
class Redis {
 public:
  Redis(const OtherHost& host, const std::string& address, const std::string& name)
      : process_(host.start(
            {"redis-server", "--bind", address, "--save", "", "--dir", directory_.path(), "--protected-mode", "no"})) {
    process_.wait_for_output("Ready to accept connections");
    EXPECT_EQ(run({"redis-cli", "-h", address, "SET", "name", name}).out, "OK\n");
  }

 private:
  TemporaryDirectory directory_;
  Process process_;
};

/// redis-cli, told line by line what to ask.
class RedisClient {
 public:
  RedisClient(const Cgroup& cgroup, const std::string& address) : RedisClient(cgroup, address, make_pipe()) {}

  /// Blocks until it has been answered `name` and the number that the server has given to this connection.
  void ask(const std::string& mark) {
    const std::string lines = "GET name\nCLIENT ID\nECHO " + mark + "\n";
    ASSERT_EQ(::write(input_.get(), lines.data(), lines.size()), static_cast<ssize_t>(lines.size()));
    process_.wait_for_output(mark + "\n");
  }

  /// No more is asked; returns all answers.
  std::string end() {
    input_.reset();
    return process_.wait().out;
  }

 private:
  struct Pipe {
    Fd read;
    Fd write;
  };
  static Pipe make_pipe() {
    int fds[2];
    checked(::pipe2(fds, O_CLOEXEC), "pipe");
    return {Fd(fds[0]), Fd(fds[1])};
  }

  RedisClient(const Cgroup& cgroup, const std::string& address, const Pipe& pipe)
      : input_(checked(::fcntl(pipe.write.get(), F_DUPFD_CLOEXEC, 0), "dup")),
        process_({"redis-cli", "-h", address}, &cgroup,
                 [&] { checked(::dup2(pipe.read.get(), STDIN_FILENO), "stdin"); }) {}

  Fd input_;
  Process process_;
};

TEST_F(RealProgram, RedisConnectionsGoOnWhileTheirBackendDrainsAndHasLeft) {
  const OtherHost host;
  const Redis one(host, OtherHost::v4, "one"), two(host, OtherHost::more_v4, "two");
  const auto service = [](const std::vector<Backend>& backends) {
    return toml({{"redis", "10.96.0.79", 6379, backends, "refuse", "on_remove = \"drain\""}});
  };
  const Backend stays{OtherHost::more_v4, 6379};
  Handle handle = serve(service({{OtherHost::v4, 6379}}));
  RedisClient client(cgroup(), "10.96.0.79");
  ASSERT_NO_FATAL_FAILURE(client.ask("at-first"));
  Process subscriber({"redis-cli", "-h", "10.96.0.79", "SUBSCRIBE", "news"}, &cgroup());
  subscriber.wait_for_output("subscribe\nnews\n");
  const auto name_at_the_vip = [&] { return run_here({"redis-cli", "-h", "10.96.0.79", "GET", "name"}).out; };
  EXPECT_EQ(name_at_the_vip(), "one\n");

  ASSERT_TRUE(ok(handle.load(service({{OtherHost::v4, 6379, 1, "drain"}, stays}))));
  ASSERT_NO_FATAL_FAILURE(client.ask("draining"));
  for (int i = 0; i < 10; ++i) EXPECT_EQ(name_at_the_vip(), "two\n");
  EXPECT_EQ(handle.visit().at(0).backends.size(), 2u);
  EXPECT_EQ(handle.visit().at(0).live, 2u);

  ASSERT_TRUE(ok(handle.load(service({stays}))));
  ASSERT_NO_FATAL_FAILURE(client.ask("removed"));
  for (int i = 0; i < 10; ++i) EXPECT_EQ(name_at_the_vip(), "two\n");
  EXPECT_EQ(run_here({"redis-cli", "-h", OtherHost::v4, "PUBLISH", "news", "from one"}).out, "1\n");
  subscriber.wait_for_output("message\nnews\nfrom one\n");

  // A client that connects anew would have been given another number.
  const std::string answers = client.end();
  const std::string number = answers.substr(4, answers.find('\n', 4) - 4);
  EXPECT_EQ(answers, fmt::format("one\n{0}\nat-first\none\n{0}\ndraining\none\n{0}\nremoved\n", number));
}

}  // namespace
