#pragma once
#include <span>
#include <string>
#include <vector>

#include "config/config.h"
#include "config/fail.h"
namespace userspace {
struct VipFailure {
  config::Address vip;
  std::string reason;
};
class LocalVips {
 public:
  static config::Result<LocalVips> open();
  config::Result<std::vector<VipFailure>> reconcile(std::span<const config::Address> wanted);
};
}  // namespace userspace
