// SPDX-License-Identifier: BSD-2-Clause
//
// The services of a cluster beside those of the file: what has come so far, and how it gets to the engines.
#pragma once

#include <boost/asio/io_context.hpp>
#include <functional>
#include <memory>
#include <vector>

#include "config/config.h"
#include "run/merge.h"
#include "run/status.h"

namespace run {

/// An interface, so that a program without clusters links none of what it takes to follow one.
class Cluster {
 public:
  struct Handlers {
    /// Services came, went, or are others now: all are to be merged with the file's. False: that failed, and is tried
    /// again.
    std::function<bool()> merge;
    /// Nothing but the backends of these has changed. It may be that they are not served.
    std::function<void(const std::vector<const config::Service*>&)> set_backends;
  };

  virtual ~Cluster() = default;
  [[nodiscard]] virtual const ClusterServices& services() const = 0;
  /// Merges again soon.
  virtual void merge_soon() = 0;
  [[nodiscard]] virtual ClusterStatus status() const = 0;
};

/// `kept`: what served before this process, until its namespace was listed. The cluster has to live until `io` runs no
/// more.
using FollowCluster = std::unique_ptr<Cluster> (*)(boost::asio::io_context& io, const config::Kubernetes& choices,
                                                   ClusterServices kept, Cluster::Handlers handlers);

/// What [kubernetes] asks for. A file that it names and that is missing or has a mistake is told of, and tried again.
std::unique_ptr<Cluster> follow_kubernetes(boost::asio::io_context& io, const config::Kubernetes& choices,
                                           ClusterServices kept, Cluster::Handlers handlers);

}  // namespace run
