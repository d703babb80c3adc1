// SPDX-License-Identifier: BSD-2-Clause
//
// The services of a cluster beside those of the file: what has come so far, and how it gets to the engines.
#pragma once

#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cli/pinned.h"
#include "config/config.h"
#include "config/result.h"
#include "run/merge.h"
#include "run/status.h"

namespace kubernetes {
class Source;
struct Change;
}  // namespace kubernetes

namespace run {

class Cluster {
 public:
  struct Handlers {
    /// Services came, went, or are others now: all are to be merged with the file's. False: that failed, and is tried
    /// again.
    std::function<bool()> merge;
    /// Nothing but the backends of these has changed. It may be that they are not served.
    std::function<void(const std::vector<const config::Service*>&)> set_backends;
  };

  /// `kept`: what served before this process, until all was listed. It has to live until `io` runs no more.
  static config::Result<std::unique_ptr<Cluster>> follow(boost::asio::io_context& io, const config::Kubernetes& choices,
                                                         ClusterServices kept, Handlers handlers);
  ~Cluster();

  [[nodiscard]] const ClusterServices& services() const { return services_; }
  /// Merges again soon.
  void merge_soon();
  [[nodiscard]] ClusterStatus status() const;

 private:
  Cluster(boost::asio::io_context& io, ClusterServices kept, Handlers handlers);
  void change(std::vector<kubernetes::Change> changes);

  const Handlers handlers_;
  ClusterServices services_;
  boost::asio::steady_timer timer_;
  std::chrono::steady_clock::time_point next_merge_;  // not before
  bool is_merge_due_ = false;
  bool is_listed_ = false;
  std::unique_ptr<kubernetes::Source> source_;
};

/// What of a fast path that an earlier process left is a cluster's. Of affinity it does not tell.
ClusterServices cluster_services(const std::vector<cli::SeenService>& seen);

}  // namespace run
