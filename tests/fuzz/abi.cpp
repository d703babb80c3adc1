// SPDX-License-Identifier: BSD-2-Clause
//
// Any sequence of calls of the C ABI, with three handles of which two have the same pin path: each call keeps what the
// header says of results and of the structs that it is given, and what a handle has loaded is what it shows. With the
// real kernel, in a cgroup, a network and a BPF filesystem of this program's own: nothing is attached anywhere else.
#include <linux/membarrier.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "config/fd.h"
#include "config/read_config.h"
#include "plugin/include/clusterip.h"
#include "tests/fuzz/input.h"
#include "tests/fuzz/require.h"
#include "tests/support/cgroup.h"
#include "tests/support/environment.h"

namespace {

constexpr std::size_t most_calls = 24;  // some take 100 ms
constexpr std::size_t guard = 1024;     // larger than any struct
constexpr unsigned char untouched = 0xa5;

/// This process is in the cgroup.
struct Stage {
  support::Cgroup cgroup;
  Stage() { cgroup.enter(); }
  ~Stage() { support::Cgroup::leave(); }
};

Stage& stage() {
  static Stage one;
  return one;
}

/// Room for a struct of the ABI, of which the caller may know less than the library, or nothing; what lies behind what
/// it knows is nobody's to write.
template <class Struct>
class Room {
 public:
  explicit Room(std::size_t size) : size_(size) {
    bytes_.fill(untouched);
    std::memcpy(bytes_.data() + offsetof(Struct, size), &size, sizeof size);
  }

  Struct* get() { return reinterpret_cast<Struct*>(bytes_.data()); }
  Struct value() const {
    Struct value;
    std::memcpy(&value, bytes_.data(), sizeof value);
    return value;
  }
  bool is_untouched_from(std::size_t begin) const {
    for (std::size_t i = begin; i < bytes_.size(); ++i) {
      if (bytes_[i] != untouched) return false;
    }
    return true;
  }
  bool is_untouched() const { return is_untouched_from(sizeof(std::size_t)); }
  std::size_t size() const { return size_; }

 private:
  alignas(Struct) std::array<unsigned char, guard> bytes_;
  std::size_t size_;
};

/// Makes the call, and judges what it says of a failure. Returns the result.
template <class Call>
int judged(fuzz::Input& input, Call call) {
  constexpr std::size_t shortest = offsetof(clusterip_error, message) + 1;
  constexpr std::array<std::size_t, 6> sizes = {sizeof(clusterip_error), shortest, shortest + 20, guard, 3, 0};
  const unsigned char how = input.byte();
  if (how % 8 == 7) return call(static_cast<clusterip_error*>(nullptr));
  Room<clusterip_error> room(sizes[how % 8 % sizes.size()]);
  const int result = call(room.get());
  require(result != -ENOTRECOVERABLE && result != -ENOMEM);
  if (result >= 0 || room.size() < shortest) {
    require(room.is_untouched());
    return result;
  }
  const clusterip_error error = room.value();
  const std::size_t length = std::min(room.size(), sizeof error) - offsetof(clusterip_error, message);
  require(error.code == result && error.size == room.size() && room.is_untouched_from(room.size()));
  const void* end = std::memchr(error.message, '\0', length);
  require(end != nullptr && std::memchr(error.message, '\n', length) == nullptr);
  require(length == 1 || error.message[0] != '\0');
  return result;
}

/// Services as visits show them: how many backends each has.
using Services = std::map<std::string, std::size_t>;

struct Slot {
  clusterip* handle = nullptr;
  std::optional<Services>
      loaded;  // nothing known: nothing was loaded by this handle, or something has changed it since
};

constexpr std::array<const char*, 6> vips = {"10.96.0.1", "10.96.0.2", "10.96.0.3", "fd00::1", "fd00::2", "192.0.0.8"};
constexpr std::array<const char*, 5> addresses = {"127.0.0.1", "127.0.0.2", "::1", "10.96.0.1", "x"};

/// Text that may be a configuration, and mostly is one.
std::string configuration(fuzz::Input& input) {
  static constexpr std::array<const char*, 4> limits = {"", "[limits]\nservices = 8\nbackends = 16\n",
                                                        "[limits]\nservices = 2\nbackends = 3\n",
                                                        "[engine]\npeer_names = false\n"};
  static constexpr std::array<const char*, 12> keys = {"policy = \"round_robin\"\n",
                                                       "policy = \"least_conn\"\n",
                                                       "policy = \"maglev\"\nclient = \"netns\"\n",
                                                       "affinity = \"10s\"\n",
                                                       "mark = 7\n",
                                                       "no_backend = \"unreachable\"\n",
                                                       "no_backend = \"pass\"\n",
                                                       "health = { interval = \"100ms\", timeout = \"50ms\" }\n",
                                                       "eject = { failures = 1, time = \"1s\" }\n",
                                                       "engine = \"userspace\"\n",
                                                       "panic = true\nhealth = {}\n",
                                                       "on_remove = \"reset\"\n"};
  if (input.byte() % 16 == 15) return std::string(input.text(64));
  std::string text = limits[input.below(limits.size())];
  const unsigned char shape = input.byte();
  // Many outgrow the maps of few.
  const std::size_t services = shape >= 250 ? 70 : shape % 4;
  for (std::size_t i = 0; i < services; ++i) {
    const bool is_one_of_many = services > 4;
    const unsigned char which = is_one_of_many ? static_cast<unsigned char>(0) : input.byte();
    text += "[[service]]\nname = \"" + std::string(which >= 252 ? 160 - which % 4 : 1, 's') + std::to_string(i) +
            "\"\nvip = \"" + vips[which % vips.size()] + "\"\nport = " + std::to_string(80 + i) + "\n";
    if (which % 5 == 1) text += "protocol = \"udp\"\n";
    const unsigned char more = is_one_of_many ? static_cast<unsigned char>(0xff) : input.byte();
    if (more < 2 * keys.size()) text += keys[more % keys.size()];
    const bool is_v6 = which % vips.size() == 3 || which % vips.size() == 4;
    text += "backends = [";
    for (std::size_t b = 0; b < which % 4U; ++b)
      text += std::string("\"") + (is_v6 ? "[::1]:" : "127.0.0.1:") + std::to_string(8000 + b) + "\", ";
    text += "]\n";
  }
  return text;
}

sockaddr_storage endpoint(fuzz::Input& input, socklen_t& length) {
  sockaddr_storage storage{};
  const unsigned char which = input.byte();
  const char* address = which % 2 == 0 ? vips[which / 2U % vips.size()] : addresses[which / 2U % addresses.size()];
  boost::system::error_code error;
  const auto parsed = boost::asio::ip::make_address(address, error);
  const auto port = static_cast<std::uint16_t>(which % 2 == 0 ? 80 + input.below(4) : 8000 + input.below(4));
  if (parsed.is_v6()) {
    sockaddr_in6 v6{};
    v6.sin6_family = AF_INET6;
    v6.sin6_port = htons(port);
    std::memcpy(&v6.sin6_addr, parsed.to_v6().to_bytes().data(), 16);
    std::memcpy(&storage, &v6, sizeof v6);
    length = sizeof v6;
  } else {
    sockaddr_in v4{};
    v4.sin_family = AF_INET;
    v4.sin_port = htons(port);
    v4.sin_addr.s_addr = htonl(parsed.to_v4().to_uint());
    std::memcpy(&storage, &v4, sizeof v4);
    length = sizeof v4;
  }
  // Of another family, or cut short.
  const unsigned char wrong = input.byte();
  if (wrong == 0xff) storage.ss_family = AF_UNIX;
  if (wrong >= 0xf8) length = wrong & 7;
  return storage;
}

void open(fuzz::Input& input, Slot& slot, bool is_pinned) {
  const unsigned char how = input.byte();
  if (how == 0xff) {
    // Of everything; only looked at.
    clusterip* handle = nullptr;
    if (judged(input, [&](auto* error) { return clusterip_open(nullptr, &handle, error); }) == 0)
      clusterip_close(handle);
    return;
  }
  const std::string pin = std::string(support::bpffs) + "/clusterip";
  clusterip_options options{};
  options.size = how == 0xfe ? 5 : sizeof options;
  options.cgroup_path = how == 0xfd ? "/nowhere" : how == 0xfc ? "/proc" : stage().cgroup.path().c_str();
  options.pin_path = how == 0xfb ? "/tmp/nowhere" : is_pinned ? pin.c_str() : nullptr;
  options.flags = how == 0xfa ? 1U << 31U
                              : (how & 1 ? CLUSTERIP_ALLOW_PARTIAL : 0) | (how & 2 ? CLUSTERIP_BACKGROUND : 0) |
                                    (how & 4 ? CLUSTERIP_ANY_MODE : 0);
  if (slot.handle != nullptr) clusterip_close(slot.handle);
  slot = {};
  if (how == 0xf9) {
    require(clusterip_open(&options, nullptr, nullptr) == -EINVAL);
    return;
  }
  const int result = judged(input, [&](auto* error) { return clusterip_open(&options, &slot.handle, error); });
  require((result == 0) == (slot.handle != nullptr));
}

struct Visited {
  Services services;
  std::string now;
  std::size_t left = 0;  // visits of backends that are to follow
  int stop_after = 0;
};

int visit(const clusterip_service_info* service, const clusterip_backend_info* backend, void* user) {
  auto& visited = *static_cast<Visited*>(user);
  require(service != nullptr && service->size == sizeof *service);
  if (backend == nullptr) {
    require(visited.left == 0);
    visited.now = service->name;
    visited.left = service->backends;
    require(visited.services.emplace(service->name, service->backends).second);
  } else {
    require(visited.left > 0 && backend->size == sizeof *backend && visited.now == service->name);
    --visited.left;
  }
  return visited.stop_after > 0 && --visited.stop_after == 0 ? 7 : 0;
}

void load(fuzz::Input& input, Slot& slot) {
  const std::string text = configuration(input);
  const auto config = config::read_config(text);
  const int result = judged(input, [&](auto* error) {
    return clusterip_load_text(slot.handle, text.data(), text.size(), "fuzz.toml", error);
  });
  if (slot.handle == nullptr) return;
  require(config.has_value() || result == -EBADMSG);
  if (result != 0) return;
  Services services;
  for (const config::Service& service : config->services) services.emplace(service.name, service.backends.size());
  slot.loaded = std::move(services);
}

void look(fuzz::Input& input, Slot& slot) {
  Visited visited;
  visited.stop_after = static_cast<int>(input.below(4));
  const int limit = visited.stop_after;
  const int result =
      judged(input, [&](auto* error) { return clusterip_visit_services(slot.handle, visit, &visited, error); });
  if (result != 0) {
    require(result < 0 || (result == 7 && limit > 0));
    return;
  }
  require(visited.left == 0);
  if (slot.loaded) require(visited.services == *slot.loaded);
}

void set_backends(fuzz::Input& input, Slot& slot) {
  const std::string service = input.flag() ? "s" + std::to_string(input.below(3)) : "nobody";
  const std::size_t count = input.below(5);
  std::vector<clusterip_backend> backends(count);
  for (clusterip_backend& backend : backends) {
    const unsigned char which = input.byte();
    backend.size = sizeof backend;
    backend.address = which == 0xff ? nullptr : addresses[which % addresses.size()];
    backend.port = static_cast<std::uint16_t>(which == 0xfe ? 0 : 8000 + which % 4);
    backend.weight = which == 0xfd ? 65536 : which % 3U;
    backend.state = which == 0xfc ? 9 : which / 4U % 3U;
  }
  if (count > 0 && input.byte() == 0xff) backends.front().size = 8;
  const int result = judged(input, [&](auto* error) {
    return clusterip_set_backends(slot.handle, service.c_str(), backends.data(), count, error);
  });
  if (result != 0 || slot.handle == nullptr || !slot.loaded) return;
  require(slot.loaded->contains(service));
  (*slot.loaded)[service] = count;
}

void resolve(fuzz::Input& input, Slot& slot) {
  socklen_t length = 0;
  const sockaddr_storage vip = endpoint(input, length);
  Room<clusterip_resolution> room(input.byte() == 0xff ? 7 : sizeof(clusterip_resolution));
  const int protocol = input.flag() ? IPPROTO_UDP : IPPROTO_TCP;
  const int result = judged(input, [&](auto* error) {
    return clusterip_resolve(slot.handle, reinterpret_cast<const sockaddr*>(&vip), length, protocol, room.get(), error);
  });
  require(room.is_untouched_from(std::max(room.size(), sizeof(std::size_t))));
  if (result != 0) {
    require(room.is_untouched());
    return;
  }
  const clusterip_resolution seen = room.value();
  require(seen.verdict <= CLUSTERIP_VERDICT_NO_SERVICE && std::memchr(seen.service, '\0', sizeof seen.service));
  require((seen.verdict == CLUSTERIP_VERDICT_REWRITTEN) == (seen.backend.ss_family != 0));
}

void connect(fuzz::Input& input, Slot& slot) {
  socklen_t length = 0;
  const sockaddr_storage vip = endpoint(input, length);
  const config::Fd fd(::socket(vip.ss_family == AF_INET6 ? AF_INET6 : AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  (void)::connect(fd.get(), reinterpret_cast<const sockaddr*>(&vip), length);
  const int socket = input.byte() == 0xff ? -1 : fd.get();
  sockaddr_storage asked{};
  judged(input, [&](auto* error) {
    return clusterip_original_destination(slot.handle, socket, input.byte() == 0xff ? nullptr : &asked, error);
  });
}

void call(fuzz::Input& input, std::array<Slot, 3>& slots) {
  const unsigned char what = input.byte();
  const std::size_t number = what / 16U % slots.size();
  Slot& slot = slots[number];
  switch (what % 16) {
    case 0:
      return open(input, slot, number != 0);
    case 1:
      return load(input, slot);
    case 2:
      judged(input, [&](auto* error) { return clusterip_attach(slot.handle, error); });
      return;
    case 3:
      if (judged(input, [&](auto* error) { return clusterip_detach(slot.handle, error); }) == 0) {
        for (Slot& one : slots) one.loaded.reset();
      }
      return;
    case 4:
      return look(input, slot);
    case 5:
      return set_backends(input, slot);
    case 6: {
      socklen_t length = 0;
      const sockaddr_storage backend = endpoint(input, length);
      const unsigned char state = input.byte();
      judged(input, [&](auto* error) {
        return clusterip_set_backend_state(slot.handle, state & 64 ? "s0" : "s1",
                                           reinterpret_cast<const sockaddr*>(&backend), length, state % 4, error);
      });
      return;
    }
    case 7:
      return resolve(input, slot);
    case 8:
      return connect(input, slot);
    case 9: {
      Room<clusterip_canary_result> room(input.byte() == 0xff ? 1 : sizeof(clusterip_canary_result));
      judged(input, [&](auto* error) { return clusterip_canary(slot.handle, room.get(), error); });
      require(room.is_untouched_from(std::max(room.size(), sizeof(std::size_t))));
      return;
    }
    case 10:
      judged(input, [&](auto* error) {
        return std::min(clusterip_event_fd(slot.handle, static_cast<std::uint32_t>(input.below(3)), error), 0);
      });
      return;
    case 11:
      judged(input, [&](auto* error) {
        return clusterip_read_events(
            slot.handle,
            [](const clusterip_event* event, void*) {
              require(event->size == sizeof *event && std::memchr(event->service, '\0', sizeof event->service));
              return 0;
            },
            nullptr, error);
      });
      return;
    case 12: {
      const std::string text = configuration(input);
      int mistakes = 0;
      const int result = clusterip_check_text(
          text.data(), text.size(), "fuzz.toml",
          [](const clusterip_error* mistake, void* user) {
            require(mistake->code == -EBADMSG && mistake->line > 0);
            ++*static_cast<int*>(user);
          },
          &mistakes);
      require(result == (mistakes == 0 ? 0 : -EBADMSG));
      return;
    }
    case 13:
      judged(input, [&](auto* error) { return clusterip_refuse_left_out(slot.handle, error); });
      return;
    case 14: {
      Room<clusterip_capabilities> room(input.byte() == 0xff ? 2 : sizeof(clusterip_capabilities));
      judged(input, [&](auto* error) { return clusterip_probe(room.get(), error); });
      require(room.is_untouched_from(std::max(room.size(), sizeof(std::size_t))));
      return;
    }
    default:
      if (slot.handle != nullptr) clusterip_close(slot.handle);
      slot = {};
  }
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int* /*argc*/, char*** /*argv*/) {
  support::enter_private_environment();
  if (!support::missing_privilege().empty()) {
    std::fprintf(stderr, "fuzz_abi: cannot run here: %s\n", support::missing_privilege().c_str());
    std::exit(77);
  }
  stage();
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  fuzz::Input input(data, size);
  std::array<Slot, 3> slots;
  for (std::size_t i = 0; i < most_calls && !input.is_over(); ++i) call(input, slots);
  for (Slot& slot : slots) {
    if (slot.handle != nullptr) clusterip_close(slot.handle);
    slot.handle = nullptr;
  }
  // What is pinned is the next input's to find nothing of.
  clusterip_options options{};
  options.size = sizeof options;
  options.cgroup_path = stage().cgroup.path().c_str();
  const std::string pin = std::string(support::bpffs) + "/clusterip";
  options.pin_path = pin.c_str();
  clusterip* last = nullptr;
  require(clusterip_open(&options, &last, nullptr) == 0 && clusterip_detach(last, nullptr) == 0);
  clusterip_close(last);
  // Programs that are gone are freed by now, not all at once some day.
  ::syscall(SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0);
  return 0;
}
