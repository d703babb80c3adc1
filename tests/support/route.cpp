// SPDX-License-Identifier: BSD-2-Clause
#include "tests/support/route.h"

#include <stdexcept>
#include <utility>

#include "tests/support/process.h"

namespace support {
namespace {

Finished ip_route(const char* verb, const std::string& network) {
  return run({"ip", "route", verb, network, "dev", "lo"});
}

}  // namespace

Route::Route(std::string network) : network_(std::move(network)) {
  if (const Finished added = ip_route("add", network_); added.exit_code != 0) throw std::runtime_error(added.err);
}

Route::~Route() { ip_route("del", network_); }

}  // namespace support
