// SPDX-License-Identifier: BSD-2-Clause
//
// From Kubernetes' objects to the plain model, by the rules of kube-proxy: docs/kubernetes.md has them as a table.
// Pure, may be called from any thread.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "config/config.h"
#include "kubernetes/objects.h"

namespace kubernetes {

struct Translation {
  std::vector<config::Service> services;  // one for each address, port and protocol
  std::vector<std::string> problems;      // what was skipped, a line each
};

/// `slices`: those of `service`. The order of slices and of endpoints makes no difference.
Translation translate(const Service& service, std::span<const Slice* const> slices);

}  // namespace kubernetes
