// SPDX-License-Identifier: BSD-2-Clause
#include "run/metrics.h"

#include <fmt/format.h>
#include <sys/socket.h>

#include <boost/asio/as_tuple.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/http.hpp>
#include <cerrno>
#include <chrono>
#include <concepts>
#include <string_view>
#include <utility>
#include <vector>

#include "cli/endpoint.h"
#include "config/names.h"
#include "config/values.h"
#include "fallback_proxy/backend.h"

namespace run {
namespace {

namespace http = boost::beast::http;
using boost::asio::awaitable;
using namespace std::chrono_literals;

// Whoever can reach the port may ask. What one of them costs is little, and is over soon.
constexpr long max_sessions = 8;
constexpr std::uint32_t max_request = 8192;  // bytes
constexpr auto request_time = 2s;            // for a request to come
constexpr auto answer_time = 30s;            // for its answer to be taken
constexpr auto patience = 5s;                // with the service's thread, when it does something else
constexpr auto pause_time = 100ms;           // when accepting fails, as it does without descriptors

constexpr auto use_tuple = boost::asio::as_tuple(boost::asio::use_awaitable);

/// `{service="web",backend="10.0.0.1:80"}`, what the format asks for escaped.
std::string labels(std::initializer_list<std::pair<std::string_view, std::string_view>> pairs) {
  std::string text = "{";
  for (const auto& [name, value] : pairs) {
    if (text.size() > 1) text += ',';
    text.append(name).append("=\"");
    for (const char c : value) {
      if (c == '\\' || c == '"') text += '\\';
      if (c == '\n')
        text += "\\n";
      else
        text += c;
    }
    text += '"';
  }
  text += '}';
  return text;
}

/// The text of one scrape, family by family, in the order of docs/metrics.md.
class Text {
 public:
  void family(std::string_view name, std::string_view help, std::string_view type) {
    name_ = name;
    fmt::format_to(std::back_inserter(text_), "# HELP {} {}\n# TYPE {} {}\n", name, help, name, type);
  }
  /// A sample of the family that came last. `labels`: of labels(), or empty.
  template <class T>
  void sample(std::string_view labels, T value) {
    text_.append(name_).append(labels) += ' ';
    if constexpr (std::floating_point<T>)
      fmt::format_to(std::back_inserter(text_), "{}", value);
    else if constexpr (std::same_as<T, bool>)
      text_ += value ? '1' : '0';
    else
      text_ += fmt::format_int(value).str();
    text_ += '\n';
  }
  template <class T>
  void one(std::string_view name, std::string_view help, std::string_view type, T value) {
    family(name, help, type);
    sample({}, value);
  }
  void make_room(std::size_t bytes) { text_.reserve(text_.size() + bytes); }
  std::string take() { return std::move(text_); }

 private:
  std::string text_;
  std::string_view name_;
};

double seconds(std::chrono::system_clock::time_point time) {
  return std::chrono::duration<double>(time.time_since_epoch()).count();
}

constexpr std::string_view counter = "counter";
constexpr std::string_view gauge = "gauge";

void add_service_itself(Text& text, const Status& status) {
  text.family("clusterip_build_info", "The version that runs.", gauge);
  text.sample(labels({{"version", status.version}}), 1);
  text.one("clusterip_start_time_seconds", "When the process began, since the epoch.", gauge, seconds(status.since));
  text.one("clusterip_fast_path", "1: the kernel rewrites connects; 0: the userspace engine carries everything.", gauge,
           status.has_fast_path);
  if (status.canary)
    text.one("clusterip_canary_success", "1: the last canary connect was rewritten, and the other refused.", gauge,
             status.canary->passed);
  text.family("clusterip_reloads_total", "Times that the configuration was read again.", counter);
  text.sample(labels({{"result", "success"}}), status.reloads.succeeded);
  text.sample(labels({{"result", "failure"}}), status.reloads.failed);
  text.one("clusterip_last_reload_successful", "0: what serves is older than what was read last.", gauge,
           status.reloads.is_last_good);
  text.one("clusterip_config_time_seconds", "When the configuration that serves was read, since the epoch.", gauge,
           seconds(status.reloads.last_good));
  text.one("clusterip_health_checked_backends", "Backends under active health checks.", gauge, status.checked_backends);
  text.family("clusterip_health_transitions_total", "Times that a health check changed the state of a backend.",
              counter);
  text.sample(labels({{"to", "up"}}), status.went_up);
  text.sample(labels({{"to", "down"}}), status.went_down);
  if (const auto& cluster = status.kubernetes) {
    text.one("clusterip_kubernetes_current", "1: changes of the cluster come as they happen.", gauge,
             cluster->is_current);
    text.one("clusterip_kubernetes_complete", "1: all of the cluster was listed once.", gauge, cluster->is_complete);
    text.one("clusterip_kubernetes_age_seconds", "For how long changes of the cluster have not come.", gauge,
             cluster->age);
    text.one("clusterip_kubernetes_services", "Services of the cluster, those that are not served included.", gauge,
             cluster->services);
    text.one("clusterip_kubernetes_endpointslices", "EndpointSlices of the cluster.", gauge, cluster->slices);
    text.one("clusterip_kubernetes_left_out", "Services of the cluster that are not served, as the log says.", gauge,
             cluster->left_out);
    text.one("clusterip_kubernetes_lists_total", "Times that services or EndpointSlices were listed.", counter,
             cluster->lists);
    text.one("clusterip_kubernetes_events_total", "Events of watches.", counter, cluster->events);
    text.one("clusterip_kubernetes_failures_total", "Connections to the API server that failed.", counter,
             cluster->failures);
  }
  text.one("clusterip_lost_events_total", "Decisions that a tracer was too slow for.", counter, status.lost_events);
  text.one("clusterip_proxied_connections", "Connections and UDP flows that the userspace engine carries now.", gauge,
           status.connections);
  text.one("clusterip_proxied_connections_limit", "As many as its file descriptors allow.", gauge,
           status.connection_limit);
}

void add_services(Text& text, const Status& status) {
  text.family("clusterip_service_info", "A service and the engine that carries it.", gauge);
  for (const ServiceStatus& service : status.services) {
    text.sample(labels({{"service", service.name},
                        {"vip", service.vip},
                        {"port", fmt::to_string(service.port)},
                        {"protocol", config::name_of(config::protocol_names, service.protocol)},
                        {"policy", service.policy},
                        {"engine", config::name_of(config::engine_names, service.engine)}}),
                1);
  }

  std::vector<std::string> names;
  bool is_any_proxied = false;
  for (const ServiceStatus& service : status.services) {
    names.push_back(labels({{"service", service.name}}));
    is_any_proxied |= service.proxied.has_value();
  }
  const auto add = [&](std::string_view name, std::string_view help, std::string_view type, auto member) {
    text.family(name, help, type);
    for (std::size_t i = 0; i < names.size(); ++i) text.sample(names[i], status.services[i].*member);
  };
  const auto add_proxied = [&](std::string_view name, std::string_view help, std::string_view type, auto member) {
    if (!is_any_proxied) return;
    text.family(name, help, type);
    for (std::size_t i = 0; i < names.size(); ++i)
      if (const auto& proxied = status.services[i].proxied) text.sample(names[i], (*proxied).*member);
  };
  add("clusterip_service_connects_total", "Connects and UDP flows that were given a backend.", counter,
      &ServiceStatus::connects);
  add("clusterip_service_refused_total", "Connects that no backend could take.", counter, &ServiceStatus::refused);
  add("clusterip_service_live_connections", "Connections that are there now.", gauge, &ServiceStatus::live);
  add_proxied("clusterip_service_serving", "Whether the userspace engine could bind its VIP.", gauge,
              &ProxiedStatus::is_serving);
  add_proxied("clusterip_service_denied_total", "Connections from addresses that are not served.", counter,
              &ProxiedStatus::denied);
  add_proxied("clusterip_service_dropped_total", "Datagrams for which there was no room.", counter,
              &ProxiedStatus::dropped);
  add_proxied("clusterip_service_received_bytes_total", "Bytes from clients, by the userspace engine.", counter,
              &ProxiedStatus::received);
  add_proxied("clusterip_service_sent_bytes_total", "Bytes to clients, by the userspace engine.", counter,
              &ProxiedStatus::sent);
}

void add_backends(Text& text, const Status& status) {
  std::vector<std::pair<std::string, const BackendStatus*>> backends;
  for (const ServiceStatus& service : status.services)
    for (const BackendStatus& backend : service.backends)
      backends.emplace_back(
          labels({{"service", service.name}, {"backend", cli::address_and_port(backend.address, backend.port)}}),
          &backend);
  if (backends.empty()) return;
  text.make_room(backends.size() * 8 * 100);  // eight families, with lines of less than 100 bytes
  const auto add = [&](std::string_view name, std::string_view help, std::string_view type, auto member) {
    text.family(name, help, type);
    for (const auto& [labels, backend] : backends) text.sample(labels, backend->*member);
  };
  const auto add_state = [&](std::string_view name, std::string_view help, std::string_view state) {
    text.family(name, help, gauge);
    for (const auto& [labels, backend] : backends) text.sample(labels, backend->state == state);
  };
  add_state("clusterip_backend_active", "1: new connections may go to it.", "active");
  add_state("clusterip_backend_down", "1: health checks have found it down.", "down");
  add_state("clusterip_backend_ejected", "1: it is skipped after failed connects.", "ejected");
  add_state("clusterip_backend_draining", "1: it gets no new connections, by the configuration.", "drain");
  add("clusterip_backend_weight", "Its weight.", gauge, &BackendStatus::weight);
  add("clusterip_backend_connects_total", "Connects and UDP flows that it was given.", counter,
      &BackendStatus::connects);
  add("clusterip_backend_failures_total", "Connects to it that failed.", counter, &BackendStatus::failures);
  add("clusterip_backend_live_connections", "Connections to it that are there now.", gauge, &BackendStatus::live);
}

}  // namespace

std::string to_metrics(const Status& status) {
  Text text;
  add_service_itself(text, status);
  add_services(text, status);
  add_backends(text, status);
  return text.take();
}

config::Result<std::unique_ptr<Metrics>> Metrics::serve(boost::asio::io_context& control, const std::string& listen,
                                                        std::function<Status()> status) {
  const auto endpoint = config::parse_endpoint(listen);
  if (!endpoint) return config::fail(-EINVAL, "metrics.listen: expected " + endpoint.error());
  const userspace::SocketAddress address(endpoint->address, endpoint->port);
  config::Fd socket(::socket(address.family(), SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!socket) return config::fail_errno(errno, "socket");
  const int on = 1;
  ::setsockopt(socket.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  if (::bind(socket.get(), address.get(), address.length) != 0 || ::listen(socket.get(), max_sessions) != 0)
    return config::fail_errno(errno, "binding " + listen);
  using boost::asio::ip::tcp;
  return std::unique_ptr<Metrics>(
      new Metrics(control, std::move(socket), address.family() == AF_INET6 ? tcp::v6() : tcp::v4(), std::move(status)));
}

Metrics::Metrics(boost::asio::io_context& control, config::Fd listening, boost::asio::ip::tcp protocol,
                 std::function<Status()> status)
    : control_(control), status_(std::move(status)), acceptor_(io_, protocol, listening.release()) {
  co_spawn(io_, accept(), boost::asio::detached);
  thread_ = std::jthread([this] { io_.run(); });
}

Metrics::~Metrics() {
  io_.stop();
  thread_.join();
}

awaitable<void> Metrics::accept() {
  boost::asio::steady_timer pause(io_);
  for (;;) {
    auto [error, client] = co_await acceptor_.async_accept(use_tuple);
    if (error) {
      pause.expires_after(pause_time);
      co_await pause.async_wait(use_tuple);
    } else if (sessions_.use_count() <= max_sessions) {
      co_spawn(io_, answer(boost::beast::tcp_stream(std::move(client)), sessions_), boost::asio::detached);
    }
  }
}

awaitable<void> Metrics::answer(boost::beast::tcp_stream client, std::shared_ptr<void> /*one_more*/) {
  boost::beast::flat_buffer buffer;
  http::request_parser<http::empty_body> parser;
  parser.header_limit(max_request);
  client.expires_after(request_time);
  const auto [error, length] = co_await http::async_read(client, buffer, parser, use_tuple);
  const auto& request = parser.get();

  http::response<http::string_body> response;
  response.keep_alive(false);  // one scrape a connection: nobody holds one of the few between two of them
  response.set(http::field::content_type, "text/plain; version=0.0.4; charset=utf-8");
  if (error) {
    const boost::system::error_code nothing_more = http::error::end_of_stream;
    if (error == nothing_more || error.category() != nothing_more.category()) co_return;  // gone, or too slow
    response.result(http::status::bad_request);
    response.body() = error.message() + "\n";
  } else if (request.method() != http::verb::get) {
    response.result(http::status::method_not_allowed);
    response.set(http::field::allow, "GET");
  } else if (request.target() != "/metrics" && !request.target().starts_with("/metrics?")) {
    response.result(http::status::not_found);
    response.body() = "the metrics are at /metrics\n";
  } else if (const auto status = co_await ask()) {
    response.body() = to_metrics(*status);
  } else {
    response.result(http::status::service_unavailable);
    response.body() = fmt::format("the daemon did not answer within {} s\n", patience.count());
  }
  response.prepare_payload();
  client.expires_after(answer_time);
  co_await http::async_write(client, response, use_tuple);
  boost::system::error_code ignored;
  client.socket().shutdown(boost::asio::ip::tcp::socket::shutdown_send, ignored);
}

/// In the service's thread. Nothing when it is busy for too long.
awaitable<std::optional<Status>> Metrics::ask() {
  // Shared with what runs in the other thread: the scrape may be over before.
  struct Answer {
    explicit Answer(boost::asio::io_context& io) : come(io, patience) {}
    std::optional<Status> status;
    boost::asio::steady_timer come;  // cancelled when it has come
  };
  const auto answer = std::make_shared<Answer>(io_);
  post(control_, [this, weak = std::weak_ptr(answer), alive = std::weak_ptr(alive_)] {
    if (alive.expired() || weak.expired()) return;
    post(io_, [weak, status = status_()]() mutable {
      const auto wanted = weak.lock();
      if (!wanted) return;
      wanted->status = std::move(status);
      wanted->come.cancel();
    });
  });
  co_await answer->come.async_wait(use_tuple);
  co_return std::move(answer->status);
}

}  // namespace run
