#include "fallback_proxy/local_vips.h"
namespace userspace {
config::Result<LocalVips> LocalVips::open() { return LocalVips{}; }
config::Result<std::vector<VipFailure>> LocalVips::reconcile(std::span<const config::Address>) {
  return std::vector<VipFailure>{};
}
}  // namespace userspace
