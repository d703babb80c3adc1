// SPDX-License-Identifier: BSD-2-Clause
#include "run/cluster.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <boost/asio/steady_timer.hpp>
#include <chrono>
#include <set>
#include <string>
#include <utility>

#include "config/printable.h"
#include "config/values.h"
#include "kubernetes/source.h"

namespace run {
namespace {

using Clock = std::chrono::steady_clock;
using Endpoints = std::vector<boost::asio::ip::tcp::endpoint>;
using namespace std::chrono_literals;

constexpr auto retry_time = 5s;  // when a merge has failed
// When the way to the API server is not known: a file may come later, as a mounted secret does.
constexpr auto first_opening_pause = 1s;
constexpr auto last_opening_pause = 30s;
// A merge costs what all services cost: it may take a quarter of the time.
constexpr int rest_factor = 3;

/// The same but for backends.
bool have_same_shape(const std::vector<config::Service>& before, const std::vector<config::Service>& after) {
  return std::ranges::equal(before, after, [](config::Service a, const config::Service& b) {
    a.backends = b.backends;
    return a == b;
  });
}

class KubernetesCluster : public Cluster {
 public:
  KubernetesCluster(boost::asio::io_context& io, const config::Kubernetes& choices, ClusterServices kept,
                    Handlers handlers)
      : io_(io),
        choices_(choices),
        handlers_(std::move(handlers)),
        services_(std::move(kept)),
        timer_(io),
        opening_timer_(io) {
    for (const auto& [name, services] : services_) kept_.insert(name);
  }

  void open();
  [[nodiscard]] const ClusterServices& services() const override { return services_; }
  void merge_soon() override;
  [[nodiscard]] ClusterStatus status() const override;

 private:
  bool leave_out_the_server(std::vector<config::Service>& services);
  void leave_to_others(const Endpoints& server);
  void forget_kept(const std::string& space);
  void change(std::vector<kubernetes::Change> changes);

  boost::asio::io_context& io_;
  const config::Kubernetes choices_;
  const Handlers handlers_;
  ClusterServices services_;
  boost::asio::steady_timer timer_;
  boost::asio::steady_timer opening_timer_;
  Clock::duration opening_pause_ = first_opening_pause;
  std::string opening_problem_;
  Clock::time_point next_merge_;  // not before
  bool is_merge_due_ = false;
  std::set<std::string> kept_;  // names that an earlier process left
  bool has_new_list_ = false;   // the first of a namespace
  Endpoints server_;            // where the API server is
  bool has_told_of_the_server_ = false;
  std::unique_ptr<kubernetes::Source> source_;
};

/// Again and again, until it is known where the API server is, and who asks it.
void KubernetesCluster::open() {
  auto source = kubernetes::Source::create(
      io_, choices_, kubernetes::Pace{},
      {.listed = [this](const std::string& space) { forget_kept(space); },
       .changed = [this](std::vector<kubernetes::Change> changes) { change(std::move(changes)); },
       .resolved = [this](const Endpoints& server) { leave_to_others(server); },
       .tell =
           [](bool is_error, const std::string& line) {
             spdlog::log(is_error ? spdlog::level::err : spdlog::level::info, "{}", line);
           }});
  if (source) {
    source_ = std::move(*source);
    opening_problem_.clear();
    return;
  }
  if (std::exchange(opening_problem_, source.error().message) != source.error().message)
    spdlog::error("{}{}: no service of the cluster comes or goes until that is mended",
                  opening_problem_.starts_with("kubernetes") ? "" : "kubernetes: ", opening_problem_);
  opening_timer_.expires_after(opening_pause_);
  opening_timer_.async_wait([this](const boost::system::error_code& cancelled) {
    if (!cancelled) open();
  });
  opening_pause_ = std::min<Clock::duration>(2 * opening_pause_, last_opening_pause);
}

/// A service by which this process itself reaches the API server is somebody else's: with backends that have moved,
/// there would be no way to learn where they are. True when it was there.
bool KubernetesCluster::leave_out_the_server(std::vector<config::Service>& services) {
  const auto is_server = [this](const config::Service& service) {
    return service.protocol == config::Protocol::tcp &&
           std::ranges::find(server_, boost::asio::ip::tcp::endpoint(service.vip, service.port)) != server_.end();
  };
  const auto found = std::ranges::find_if(services, is_server);
  if (found == services.end()) return false;
  if (!std::exchange(has_told_of_the_server_, true))
    spdlog::warn(
        "kubernetes: service {} is how {} is reached: it is not served, but left to kube-proxy; to have it served, "
        "give kubernetes.server the API server's own address",
        config::printable(found->name), source_->status().server);
  std::erase_if(services, is_server);
  return true;
}

/// Before it is connected to, whatever name it has.
void KubernetesCluster::leave_to_others(const Endpoints& server) {
  server_ = server;
  bool is_any_served = false;
  for (auto& [name, services] : services_) is_any_served = leave_out_the_server(services) || is_any_served;
  if (is_any_served && !handlers_.merge()) merge_soon();
}

/// What an earlier process left of a namespace, and is not in its list, is gone; so is what is not asked for any more.
void KubernetesCluster::forget_kept(const std::string& space) {
  std::erase_if(kept_, [&](const std::string& name) {
    const std::string of = name.substr(0, name.find('/'));
    const bool is_asked_for = std::ranges::find(choices_.namespaces, of) != choices_.namespaces.end();
    if (!space.empty() && of != space && is_asked_for) return false;
    services_.erase(name);
    return true;
  });
  has_new_list_ = true;
}

void KubernetesCluster::change(std::vector<kubernetes::Change> changes) {
  bool has_new_shape = std::exchange(has_new_list_, false);
  std::set<std::pair<std::string, std::size_t>> places;  // not pointers: a server that lies may tell of one twice
  for (kubernetes::Change& change : changes) {
    leave_out_the_server(change.services);
    if (change.services.empty()) {
      has_new_shape = services_.erase(change.name) != 0 || has_new_shape;
      continue;
    }
    auto& services = services_[change.name];
    const auto before = std::exchange(services, std::move(change.services));
    if (!have_same_shape(before, services)) {
      has_new_shape = true;
      continue;
    }
    for (std::size_t i = 0; i < services.size(); ++i)
      if (services[i].backends != before[i].backends) places.emplace(change.name, i);
  }
  std::vector<const config::Service*> changed;
  for (const auto& [name, i] : places) {
    const auto found = services_.find(name);
    if (found != services_.end() && i < found->second.size()) changed.push_back(&found->second[i]);
  }
  if (!changed.empty()) handlers_.set_backends(changed);
  if (has_new_shape) merge_soon();
}

void KubernetesCluster::merge_soon() {
  if (std::exchange(is_merge_due_, true)) return;
  timer_.expires_at(next_merge_);
  timer_.async_wait([this](const boost::system::error_code& cancelled) {
    if (cancelled) return;
    is_merge_due_ = false;
    const auto began = Clock::now();
    const bool is_merged = handlers_.merge();
    const auto ended = Clock::now();
    next_merge_ = ended + (is_merged ? rest_factor * (ended - began) : retry_time);
    if (!is_merged) merge_soon();
  });
}

ClusterStatus KubernetesCluster::status() const {
  if (!source_) return {.server = {}, .problem = opening_problem_};
  const kubernetes::SourceStatus seen = source_->status();
  const auto age = seen.is_current ? 0s : Clock::now() - seen.last_current;
  return {.server = seen.server,
          .is_complete = seen.is_complete,
          .is_current = seen.is_current,
          .age = std::chrono::duration<double>(age).count(),
          .problem = seen.problem,
          .services = seen.services,
          .slices = seen.slices,
          .lists = seen.counts.lists,
          .events = seen.counts.events,
          .failures = seen.counts.failures};
}

}  // namespace

std::unique_ptr<Cluster> follow_kubernetes(boost::asio::io_context& io, const config::Kubernetes& choices,
                                           ClusterServices kept, Cluster::Handlers handlers) {
  auto cluster = std::make_unique<KubernetesCluster>(io, choices, std::move(kept), std::move(handlers));
  cluster->open();
  return cluster;
}

}  // namespace run
