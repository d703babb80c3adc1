// SPDX-License-Identifier: BSD-2-Clause
#include "run/metrics.h"

#include <prometheus/collectable.h>
#include <prometheus/metric_family.h>
#include <sys/socket.h>

#include <atomic>
#include <boost/asio/post.hpp>
#include <cerrno>
#include <chrono>
#include <future>
#include <optional>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "cli/endpoint.h"
#include "config/fd.h"
#include "config/names.h"
#include "config/values.h"

namespace run {
namespace {

using prometheus::ClientMetric;
using prometheus::MetricFamily;
using prometheus::MetricType;
using Labels = std::vector<ClientMetric::Label>;

constexpr std::string_view threads = "4";
constexpr std::string_view request_time =
    "1000";  // ms for a request to come: whoever says nothing holds a thread for so long
// A scrape ends without metrics when the service does something else for so long.
constexpr auto patience = std::chrono::seconds(5);

/// The families of one scrape, in the order of docs/metrics.md.
class Families {
 public:
  void add(std::string_view name, std::string_view help, MetricType type) {
    families_.push_back({.name = std::string(name), .help = std::string(help), .type = type, .metric = {}});
  }
  /// A sample of the family that was added last.
  void sample(Labels labels, double value) {
    ClientMetric& metric = families_.back().metric.emplace_back();
    metric.label = std::move(labels);
    if (families_.back().type == MetricType::Counter)
      metric.counter.value = value;
    else
      metric.gauge.value = value;
  }
  void one(std::string_view name, std::string_view help, MetricType type, double value) {
    add(name, help, type);
    sample({}, value);
  }

  /// A sample for each service of which `value` knows something.
  void of_services(const Status& status, std::string_view name, std::string_view help, MetricType type,
                   std::optional<double> (*value)(const ServiceStatus&)) {
    add(name, help, type);
    for (const ServiceStatus& service : status.services)
      if (const auto known = value(service)) sample({{"service", service.name}}, *known);
    drop_if_empty();
  }
  void of_backends(const Status& status, std::string_view name, std::string_view help, MetricType type,
                   double (*value)(const BackendStatus&)) {
    add(name, help, type);
    for (const ServiceStatus& service : status.services)
      for (const BackendStatus& backend : service.backends)
        sample({{"service", service.name}, {"backend", cli::address_and_port(backend.address, backend.port)}},
               value(backend));
    drop_if_empty();
  }

  std::vector<MetricFamily> take() { return std::move(families_); }

 private:
  void drop_if_empty() {
    if (families_.back().metric.empty()) families_.pop_back();
  }

  std::vector<MetricFamily> families_;
};

double seconds(std::chrono::system_clock::time_point time) {
  return std::chrono::duration<double>(time.time_since_epoch()).count();
}

template <auto member>
std::optional<double> of_proxy(const ServiceStatus& service) {
  if (!service.proxied) return {};
  return static_cast<double>((*service.proxied).*member);
}

std::vector<MetricFamily> to_metrics(const Status& status) {
  constexpr auto counter = MetricType::Counter;
  constexpr auto gauge = MetricType::Gauge;
  Families families;

  families.add("clusterip_build_info", "The version that runs.", gauge);
  families.sample({{"version", status.version}}, 1);
  families.one("clusterip_start_time_seconds", "When the process began, since the epoch.", gauge,
               seconds(status.since));
  families.one("clusterip_fast_path", "1: the kernel rewrites connects; 0: the userspace engine carries everything.",
               gauge, status.has_fast_path ? 1 : 0);
  if (status.canary)
    families.one("clusterip_canary_success", "1: the last canary connect was rewritten, and the other refused.", gauge,
                 status.canary->passed ? 1 : 0);
  families.add("clusterip_reloads_total", "Times that the configuration was read again.", counter);
  families.sample({{"result", "success"}}, static_cast<double>(status.reloads.succeeded));
  families.sample({{"result", "failure"}}, static_cast<double>(status.reloads.failed));
  families.one("clusterip_last_reload_successful", "0: what serves is older than what was read last.", gauge,
               status.reloads.is_last_good ? 1 : 0);
  families.one("clusterip_config_time_seconds", "When the configuration that serves was read, since the epoch.", gauge,
               seconds(status.reloads.last_good));
  families.one("clusterip_health_checked_backends", "Backends under active health checks.", gauge,
               static_cast<double>(status.checked_backends));
  families.add("clusterip_health_transitions_total", "Times that a health check changed the state of a backend.",
               counter);
  families.sample({{"to", "up"}}, static_cast<double>(status.went_up));
  families.sample({{"to", "down"}}, static_cast<double>(status.went_down));
  families.one("clusterip_lost_events_total", "Decisions that a tracer was too slow for.", counter,
               static_cast<double>(status.lost_events));
  families.one("clusterip_proxied_connections", "Connections and UDP flows that the userspace engine carries now.",
               gauge, static_cast<double>(status.connections));
  families.one("clusterip_proxied_connections_limit", "As many as its file descriptors allow.", gauge,
               static_cast<double>(status.connection_limit));

  families.add("clusterip_service_info", "A service and the engine that carries it.", gauge);
  for (const ServiceStatus& service : status.services) {
    families.sample({{"service", service.name},
                     {"vip", service.vip},
                     {"port", std::to_string(service.port)},
                     {"protocol", std::string(config::name_of(config::protocol_names, service.protocol))},
                     {"policy", service.policy},
                     {"engine", std::string(config::name_of(config::engine_names, service.engine))}},
                    1);
  }
  families.of_services(
      status, "clusterip_service_connects_total", "Connects and UDP flows that were given a backend.", counter,
      [](const ServiceStatus& service) { return std::optional(static_cast<double>(service.connects)); });
  families.of_services(
      status, "clusterip_service_refused_total", "Connects that no backend could take.", counter,
      [](const ServiceStatus& service) { return std::optional(static_cast<double>(service.refused)); });
  families.of_services(status, "clusterip_service_live_connections", "Connections that are there now.", gauge,
                       [](const ServiceStatus& service) { return std::optional(static_cast<double>(service.live)); });
  families.of_services(status, "clusterip_service_serving", "Whether the userspace engine could bind its VIP.", gauge,
                       of_proxy<&ProxiedStatus::is_serving>);
  families.of_services(status, "clusterip_service_denied_total", "Connections from addresses that are not served.",
                       counter, of_proxy<&ProxiedStatus::denied>);
  families.of_services(status, "clusterip_service_dropped_total", "Datagrams for which there was no room.", counter,
                       of_proxy<&ProxiedStatus::dropped>);
  families.of_services(status, "clusterip_service_received_bytes_total", "Bytes from clients, by the userspace engine.",
                       counter, of_proxy<&ProxiedStatus::received>);
  families.of_services(status, "clusterip_service_sent_bytes_total", "Bytes to clients, by the userspace engine.",
                       counter, of_proxy<&ProxiedStatus::sent>);

  families.of_backends(status, "clusterip_backend_active", "1: new connections may go to it.", gauge,
                       [](const BackendStatus& backend) { return backend.state == "active" ? 1.0 : 0.0; });
  families.of_backends(status, "clusterip_backend_down", "1: health checks have found it down.", gauge,
                       [](const BackendStatus& backend) { return backend.state == "down" ? 1.0 : 0.0; });
  families.of_backends(status, "clusterip_backend_ejected", "1: it is skipped after failed connects.", gauge,
                       [](const BackendStatus& backend) { return backend.state == "ejected" ? 1.0 : 0.0; });
  families.of_backends(status, "clusterip_backend_draining", "1: it gets no new connections, by the configuration.",
                       gauge, [](const BackendStatus& backend) { return backend.state == "drain" ? 1.0 : 0.0; });
  families.of_backends(status, "clusterip_backend_weight", "Its weight.", gauge,
                       [](const BackendStatus& backend) { return static_cast<double>(backend.weight); });
  families.of_backends(status, "clusterip_backend_connects_total", "Connects and UDP flows that it was given.", counter,
                       [](const BackendStatus& backend) { return static_cast<double>(backend.connects); });
  families.of_backends(status, "clusterip_backend_failures_total", "Connects to it that failed.", counter,
                       [](const BackendStatus& backend) { return static_cast<double>(backend.failures); });
  families.of_backends(status, "clusterip_backend_live_connections", "Connections to it that are there now.", gauge,
                       [](const BackendStatus& backend) { return static_cast<double>(backend.live); });
  return families.take();
}

/// The library only says that it failed: why, the kernel tells here.
config::Result<userspace::SocketAddress> try_to_bind(const std::string& listen) {
  const auto endpoint = config::parse_endpoint(listen);
  if (!endpoint) return config::fail(-EINVAL, "metrics.listen: expected " + endpoint.error());
  const userspace::SocketAddress address(endpoint->address, endpoint->port);
  const config::Fd socket(::socket(address.family(), SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!socket) return config::fail_errno(errno, "socket");
  const int on = 1;
  ::setsockopt(socket.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  if (::bind(socket.get(), address.get(), address.length) != 0 || ::listen(socket.get(), 1) != 0)
    return config::fail_errno(errno, "binding " + listen);
  return address;
}

}  // namespace

/// Called by the threads of the library, asks the service's thread.
class Metrics::Collector : public prometheus::Collectable {
 public:
  Collector(boost::asio::io_context& io, std::function<Status()> status) : io_(io), status_(std::move(status)) {}

  std::vector<MetricFamily> Collect() const override {
    auto answer = std::make_shared<std::promise<Status>>();
    auto future = answer->get_future();
    boost::asio::post(io_, [weak = std::weak_ptr(answer), status = status_] {
      if (const auto asked = weak.lock()) asked->set_value(status());  // unless the scrape was given up
    });
    // In steps: when the service ends, nobody answers any more.
    for (auto waited = std::chrono::milliseconds(0); waited < patience && !is_over_;
         waited += std::chrono::milliseconds(20)) {
      if (future.wait_for(std::chrono::milliseconds(20)) == std::future_status::ready) return to_metrics(future.get());
    }
    return {};
  }

  void end() { is_over_ = true; }

 private:
  boost::asio::io_context& io_;
  const std::function<Status()> status_;
  std::atomic<bool> is_over_ = false;
};

config::Result<std::unique_ptr<Metrics>> Metrics::serve(boost::asio::io_context& io, const std::string& listen,
                                                        std::function<Status()> status) {
  const auto address = try_to_bind(listen);
  if (!address) return std::unexpected(address.error());
  try {
    return std::unique_ptr<Metrics>(new Metrics(std::make_shared<Collector>(io, std::move(status)), listen, *address));
  } catch (const std::exception& error) {
    return config::fail(-EADDRINUSE, "binding " + listen + ": " + error.what());
  }
}

Metrics::Metrics(std::shared_ptr<Collector> collector, const std::string& listen,
                 const userspace::SocketAddress& address)
    : address_(address), collector_(std::move(collector)) {
  exposer_.emplace(std::vector<std::string>{"listening_ports", listen, "num_threads", std::string(threads),
                                            "request_timeout_ms", std::string(request_time)});
  exposer_->RegisterCollectable(collector_);
}

Metrics::~Metrics() {
  collector_->end();
  // The library's thread that accepts looks for its end every 2 s, and after each connection.
  const std::jthread waker([this](const std::stop_token& is_over) {
    while (!is_over.stop_requested()) {
      const config::Fd socket(::socket(address_.family(), SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
      ::connect(socket.get(), address_.get(), address_.length);
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
  });
  exposer_.reset();
}

}  // namespace run
