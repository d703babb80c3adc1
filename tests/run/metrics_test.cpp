// SPDX-License-Identifier: BSD-2-Clause
//
// Metrics, checked by promtool and against what happened.
#include <signal.h>

#include <regex>

#include "tests/run/running.h"
#include "tests/support/tcp.h"

namespace {

using namespace support;
using testing::HasSubstr;

class RunMetrics : public Running {
 protected:
  std::string text(const std::vector<Service>& services) const {
    return fmt::format("[metrics]\nlisten = \"127.0.0.1:{}\"\n{}", port, proxy_toml(services));
  }
  static std::string url() { return fmt::format("http://127.0.0.1:{}/metrics", port); }
  std::string scrape() const {
    // "serving" is in the log a moment before there are metrics.
    const Finished got = run({"curl", "-sS", "--max-time", "20", "--retry", "5", "--retry-connrefused", url()});
    EXPECT_EQ(got.exit_code, 0) << got.err;
    return got.out;
  }
  static std::string documented_names() { return read_text(CLUSTERIP_SOURCE_DIR "/docs/metrics.md"); }

  static constexpr std::uint16_t port = 9464;
  const NamedServer one_{"one"};
};

TEST_F(RunMetrics, TellWhatHappenedOnBothEngines) {
  RunningService service(files(text({web({backend(one_)}), proxied({backend(one_)})})));
  for (int i = 0; i < 7; ++i) EXPECT_EQ(ask(fast_vip, vip_port), answered_by("one"));
  for (int i = 0; i < 5; ++i) EXPECT_EQ(ask(proxied_vip, vip_port), answered_by("one"));
  const std::string metrics = scrape();
  EXPECT_THAT(metrics, HasSubstr("clusterip_service_connects_total{service=\"web\"} 7\n"));
  EXPECT_THAT(metrics, HasSubstr("clusterip_service_connects_total{service=\"proxied\"} 5\n"));
  EXPECT_THAT(metrics,
              HasSubstr(fmt::format("clusterip_backend_connects_total{{service=\"web\",backend=\"127.0.0.1:{}\"}} 7\n",
                                    one_.port())));
  EXPECT_THAT(metrics, HasSubstr("clusterip_service_sent_bytes_total{service=\"proxied\"} 15\n"));
  EXPECT_THAT(metrics,
              HasSubstr("clusterip_service_info{service=\"proxied\",vip=\"127.0.1.2\",port=\"80\",protocol=\"tcp\","
                        "policy=\"random\",engine=\"userspace\"} 1\n"));
  EXPECT_THAT(metrics, HasSubstr("clusterip_canary_success 1\n"));
  EXPECT_THAT(metrics, HasSubstr("clusterip_fast_path 1\n"));
  EXPECT_THAT(metrics, HasSubstr("clusterip_last_reload_successful 1\n"));
  service.reload("nonsense");
  EXPECT_THAT(scrape(), testing::AllOf(HasSubstr("clusterip_reloads_total{result=\"failure\"} 1\n"),
                                       HasSubstr("clusterip_last_reload_successful 0\n")));
}

TEST_F(RunMetrics, PleasePromtoolAndAreAllDocumented) {
  RunningService service(files(text({web({backend(one_)}), proxied({backend(one_)})})));
  const TemporaryDirectory directory;
  const std::string metrics = scrape();
  const std::string file = directory.write("metrics.txt", metrics);
  const Finished checked = run({"sh", "-c", "promtool check metrics <" + file});
  EXPECT_EQ(checked.exit_code, 0) << checked.out << checked.err;
  EXPECT_EQ(checked.out + checked.err, "");

  const std::string documentation = documented_names();
  const std::regex family("# TYPE (clusterip_\\w+) (\\w+)");
  std::size_t families = 0;
  for (std::sregex_iterator found(metrics.begin(), metrics.end(), family), end; found != end; ++found, ++families) {
    EXPECT_THAT(documentation, HasSubstr("`" + (*found)[1].str() + "`"));
  }
  EXPECT_GT(families, 25u);
}

TEST_F(RunMetrics, OtherRequestsAreToldWhatThereIs) {
  RunningService service(files(text({web({backend(one_)})})));
  scrape();
  const auto ask_http = [](const std::vector<std::string>& options, const std::string& path) {
    std::vector<std::string> command = {"curl", "-sS", "--max-time", "20", "-w", "%{http_code}"};
    command.insert(command.end(), options.begin(), options.end());
    command.push_back(fmt::format("http://127.0.0.1:{}{}", port, path));
    return run(command).out;
  };
  EXPECT_EQ(ask_http({}, "/"), "the metrics are at /metrics\n404");
  EXPECT_EQ(ask_http({"-X", "POST"}, "/metrics"), "405");
  EXPECT_EQ(ask_http({"-X", "GET ME"}, "/metrics"), "bad version\n400");
  EXPECT_EQ(ask_http({"-H", "Long: " + std::string(9000, 'x')}, "/metrics"), "header limit exceeded\n400");
  EXPECT_THAT(ask_http({"-o", "/dev/null"}, "/metrics?name=clusterip_build_info"), "200");
}

TEST_F(RunMetrics, ClientsThatAskNothingHoldNobodyUpForLong) {
  RunningService service(files(text({web({backend(one_)})})));
  scrape();
  std::vector<Fd> silent;
  for (int i = 0; i < 50; ++i) silent.push_back(dial("127.0.0.1", port));
  EXPECT_TRUE(eventually([&] { return run({"curl", "-s", "-o", "/dev/null", url()}).exit_code == 0; }));
  EXPECT_EQ(ask(fast_vip, vip_port), answered_by("one"));
}

TEST_F(RunMetrics, AClientThatAsksNothingDoesNotKeepTheServiceFromEnding) {
  RunningService service(files(text({web({backend(one_)})})));
  scrape();
  const Fd silent = dial("127.0.0.1", port);
  EXPECT_EQ(service.terminate().exit_code, 0);
}

TEST_F(RunMetrics, PortInUseIsToldAndTheServicesAreServed) {
  const TcpListener other("127.0.0.1", port);
  const auto made = files(text({web({backend(one_)})}));
  RunningService service(made);
  EXPECT_THAT(service.wait_for_log("no metrics: "), HasSubstr("binding 127.0.0.1:9464: Address already in use"));
  EXPECT_EQ(ask(fast_vip, vip_port), answered_by("one"));
}

}  // namespace
