// SPDX-License-Identifier: BSD-2-Clause
//
// Real programs, unmodified, in the cgroup.
#include "tests/support/fixture.h"

namespace {

using namespace support;

class Program : public Integration {};

TEST_F(Program, StaticallyLinkedClientReachesTheBackend) {
  const NamedServer server("server");
  const Handle handle = serve(toml({{"web", "10.96.0.1", 80, {backend(server)}}}));
  EXPECT_EQ(run({"readelf", "--program-headers", CLUSTERIP_STATIC_CLIENT}).out.find("INTERP"), std::string::npos);
  const Finished client = run_in_cgroup(cgroup(), {CLUSTERIP_STATIC_CLIENT, "10.96.0.1", "80"});
  EXPECT_EQ(client.exit_code, 0) << client.err;
  EXPECT_EQ(client.out, "server");
}

TEST_F(Program, CurlReachesTheBackend) {
  const NamedServer server("web server", "127.0.0.1", NamedServer::Speaks::http);
  const Handle handle = serve(toml({{"web", "10.96.0.1", 80, {backend(server)}}}));
  const Finished curl = run_in_cgroup(cgroup(), {"curl", "-sS", "--noproxy", "*", "http://10.96.0.1/"});
  EXPECT_EQ(curl.exit_code, 0) << curl.err;
  EXPECT_EQ(curl.out, "web server");
}

TEST_F(Program, PythonReachesTheBackend) {
  const NamedServer server("server");
  const Handle handle = serve(toml({{"web", "10.96.0.1", 80, {backend(server)}}}));
  const Finished python = run_in_cgroup(
      cgroup(),
      {"python3", "-c", "import socket; print(socket.create_connection(('10.96.0.1', 80), 10).recv(64).decode())"});
  EXPECT_EQ(python.exit_code, 0) << python.err;
  EXPECT_EQ(python.out, "server\n");
}

TEST_F(Program, Iperf3ReachesTheBackend) {
  constexpr std::uint16_t port = 5201;  // this network namespace is ours alone
  Process server({"iperf3", "--server", "--one-off", "--forceflush", "--bind", "127.0.0.7", "--port", "5201"});
  server.wait_for_output("Server listening");
  Handle handle = serve(toml({{"virtual_svc2", "192.10.100.100", 5201, {{"127.0.0.7", port}}}}));
  const Finished client = run_in_cgroup(
      cgroup(), {"iperf3", "--client", "192.10.100.100", "--port", "5201", "--bytes", "10M", "--parallel", "2"});
  EXPECT_EQ(client.exit_code, 0) << client.out << client.err;
  EXPECT_EQ(server.wait().exit_code, 0);
  EXPECT_EQ(handle.visit().at(0).connects, 3u) << "one for control and two for data";
}

TEST_F(Program, HostInC99RunsTheWholeCycle) {
  const NamedServer server("server");
  const TemporaryDirectory directory;
  const std::string file = directory.write("host.toml", toml({{"hosted", "10.96.0.1", 80, {backend(server)}}}));
  const Finished host = run_in_cgroup(cgroup(), {CLUSTERIP_C_HOST, CLUSTERIP_PLUGIN_PATH, cgroup().path(), file,
                                                 "10.96.0.1", "80", std::to_string(server.port())});
  EXPECT_EQ(host.exit_code, 0) << host.out;
  EXPECT_EQ(host.err, "");
  EXPECT_NE(host.out.find("answer: server\n"), std::string::npos) << host.out;
  EXPECT_NE(host.out.find("resolved: hosted\n"), std::string::npos) << host.out;
  EXPECT_NE(host.out.find("backends: 1\n"), std::string::npos) << host.out;
  EXPECT_EQ(server.accepted(), 2u);
  EXPECT_TRUE(connect4_programs(cgroup()).empty());
}

}  // namespace
