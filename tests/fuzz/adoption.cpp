// SPDX-License-Identifier: BSD-2-Clause
//
// Pinned maps that somebody has written into: a process that adopts them says that they are damaged, or takes what is
// whole, and then each load has its whole effect. With the kernel's maps, pinned in a BPF filesystem of this program's
// own; programs that would read them are not there, and so no grace period is, nor are links, nor an exchange of maps.
#include <bpf/bpf.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "config/values.h"
#include "plugin/maps.h"
#include "plugin/publisher.h"
#include "tests/fuzz/input.h"
#include "tests/fuzz/require.h"
#include "tests/support/environment.h"

namespace {

std::uint64_t adopted = 0;
std::uint64_t refused = 0;

constexpr std::size_t most_entries = 10'000;                             // of four services with Maglev's tables
const std::string directory = std::string(support::bpffs) + "/adopted";  // NOLINT(cert-err58-cpp)

config::Address address(std::size_t number, bool is_v6) {
  return boost::asio::ip::make_address((is_v6 ? "fd00::" : "10.0.0.") + std::to_string(number));
}

config::Backend backend(fuzz::Input& input, std::size_t number, bool is_v6) {
  const unsigned char how = input.byte();
  return {.address = address(100 + number, is_v6),
          .port = static_cast<std::uint16_t>(8000 + how % 2),
          .weight = how / 32U + 1U,
          .state = how % 16 == 15   ? config::BackendState::down
                   : how % 16 == 14 ? config::BackendState::drain
                                    : config::BackendState::active,
          .position = {}};
}

/// Services as a configuration may have them, each with a key and a name of its own.
std::vector<config::Service> services(fuzz::Input& input) {
  std::vector<config::Service> made(input.below(5));
  for (std::size_t i = 0; i < made.size(); ++i) {
    const unsigned char how = input.byte();
    const unsigned char more = input.byte();
    const bool is_v6 = how % 8 == 7;
    config::Service& service = made[i];
    service.name = (more & 128 ? "a" : "b") + std::to_string(i);
    service.vip = address(i / 2 + 1, is_v6);
    service.port = static_cast<std::uint16_t>(80 + i);
    service.protocol = how & 8 ? config::Protocol::udp : config::Protocol::tcp;
    service.policy = static_cast<config::Policy>(how / 16U % 4);
    if (how & 64) service.affinity = std::chrono::seconds(1);
    if (how & 128) service.eject.emplace();
    service.client = static_cast<config::Client>(more % 3);
    service.on_remove = static_cast<config::OnRemove>(more / 4U % 3);
    service.no_backend = static_cast<config::NoBackend>(more / 16U % 3);
    service.panic = (more & 64) != 0;
    service.mark = more % 4;
    const std::size_t backends = input.below(6);
    for (std::size_t b = 0; b < backends; ++b) service.backends.push_back(backend(input, 10 * i + b, is_v6));
  }
  return made;
}

/// Some bytes of an array of the maps are others: mostly near its beginning, where services are.
template <class T>
void damage(fuzz::Input& input, std::span<T> array) {
  static constexpr std::array<std::uint32_t, 8> values = {0, 1, 2, 0xff, 0xffff, 0x7fffffff, 0xfffffffe, 0xffffffff};
  const auto bytes = std::as_writable_bytes(array);
  const std::size_t element = input.flag() ? input.below(8) : input.byte() * 256U + input.byte();
  const std::size_t at = (element % array.size()) * sizeof(T) + input.byte() % sizeof(T);
  const unsigned char how = input.byte();
  std::uint32_t value = how < 128 ? values[how % values.size()] : input.byte();
  const std::size_t length = std::min<std::size_t>(std::size_t{1} << how / 16U % 3, bytes.size() - at);
  std::memcpy(&bytes[at], &value, length);
}

/// A key that may be a service's, a marker's or nobody's, and leads anywhere or nowhere.
void damage_keys(fuzz::Input& input, const plugin::Maps& maps) {
  const unsigned char which = input.byte();
  plugin::Key key = plugin::encode_key(address(which % 4 + 1U, which % 8 == 7),
                                       static_cast<std::uint16_t>(which & 8 ? 0 : 80 + which / 16U % 4),
                                       which & 128 ? config::Protocol::udp : config::Protocol::tcp);
  if (which & 8) key = plugin::marker_of(key);
  if (input.flag()) {
    require(maps.erase_key(key).has_value());
    return;
  }
  if (input.byte() == 0xff) key.zero = 1;
  const unsigned char where = input.byte();
  const std::uint32_t record = where == 0xff ? MARKER_RECORD : where == 0xfe ? maps.capacity().records() : where % 8U;
  require(maps.insert_keys({&key, 1}, {&record, 1}).has_value());
}

void damage(fuzz::Input& input, const plugin::Maps& maps) {
  switch (input.below(8)) {
    case 0:
    case 1:
      return damage(input, maps.records());
    case 2:
    case 3:
      return damage(input, maps.slots());
    case 4:
      return damage(input, maps.backends());
    case 5:
      return damage(input, maps.filter());
    case 6:
      return damage(input, std::span(&maps.meta(), 1));
    default:
      return damage_keys(input, maps);
  }
}

void is_told_as_damage(const plugin::Error& error) {
  require(error.code == -EPROTO && error.message.contains("clusterip unload"));
}

using Backends = std::multiset<std::string>;
std::string text(const config::Backend& backend) {
  return backend.address.to_string() + " " + std::to_string(backend.port) + " " + std::to_string(backend.weight) + " " +
         std::to_string(static_cast<int>(backend.state));
}

std::string text(const plugin::Key& key) { return {reinterpret_cast<const char*>(&key), sizeof key}; }

/// Nobody looks at what a marker leads to.
std::map<std::string, std::uint32_t> keys_of(const plugin::Maps& maps) {
  std::map<std::string, std::uint32_t> keys;
  for (const plugin::Key& key : *maps.all_keys())
    keys.emplace(text(key), plugin::is_marker(key) ? MARKER_RECORD : maps.find_key(key)->value());
  return keys;
}

void is_same(const config::Service& seen, const config::Service& wanted) {
  require(seen.name == wanted.name && seen.vip == wanted.vip && seen.port == wanted.port);
  require(seen.protocol == wanted.protocol && seen.policy == wanted.policy && seen.affinity == wanted.affinity);
  require(seen.client == wanted.client && seen.panic == wanted.panic && seen.mark == wanted.mark);
  require(seen.no_backend == wanted.no_backend && seen.on_remove == wanted.on_remove && seen.eject == wanted.eject);
  Backends a;
  Backends b;
  for (const config::Backend& backend : seen.backends) a.insert(text(backend));
  for (const config::Backend& backend : wanted.backends) b.insert(text(backend));
  require(a == b);
}

void are_same(const std::vector<plugin::PublishedService>& seen, const std::vector<config::Service>& wanted) {
  require(seen.size() == wanted.size());
  for (const plugin::PublishedService& one : seen) {
    const auto same = std::ranges::find_if(wanted, [&](const config::Service& service) {
      return plugin::encode_key(service) == plugin::encode_key(one.service);
    });
    require(same != wanted.end());
    is_same(one.service, *same);
  }
}

/// Nothing that is published lies outside the maps, or in another's place, and the maps have nothing besides it.
void is_whole(const plugin::Maps& maps, const plugin::Publisher& publisher) {
  std::vector<bool> entries(maps.slots().size());
  std::vector<bool> backends(maps.backends().size());
  std::vector<bool> bits(maps.capacity().filter_bits());
  std::map<std::string, std::uint32_t> keys;
  for (const plugin::PublishedService& one : publisher.published()) {
    if (one.service.name.empty()) continue;
    require(config::parse_name(one.service.name).has_value() && one.service.port != 0);
    require(one.service.policy <= config::Policy::maglev && one.service.no_backend <= config::NoBackend::pass &&
            one.service.client <= config::Client::socket);
    const plugin::Key key = plugin::encode_key(one.service);
    require(keys.emplace(text(key), one.record).second);
    keys.emplace(text(plugin::marker_of(key)), MARKER_RECORD);
    bits[maps.filter_bit(key)] = true;
    require(one.record < maps.records().size() && one.block.is_within(entries.size()));
    for (std::uint32_t i = 0; i < one.block.size(); ++i) {
      require(!entries[one.block.header + i]);
      entries[one.block.header + i] = true;
    }
    require(one.backends.size() == one.service.backends.size());
    for (const std::uint32_t index : one.backends) {
      require(index < backends.size() && !backends[index]);
      backends[index] = true;
    }
  }
  require(keys_of(maps) == keys);
  for (std::uint32_t bit = 0; bit < bits.size(); ++bit)
    require((maps.filter()[bit / 64] >> bit % 64 & 1) == static_cast<std::uint64_t>(bits[bit]));
  for (std::uint32_t record = 0; record < maps.records().size(); ++record)
    require(maps.records()[record].word == 0 || !publisher.published()[record].service.name.empty());
}

/// Publishes, and sees that nothing else is there. False: there is no room, and nothing has changed.
bool load(plugin::Maps& maps, plugin::Publisher& publisher, const std::vector<config::Service>& wanted,
          bool peer_names) {
  const auto before = publisher.services();
  std::vector<config::Service> copy = wanted;
  const auto done = publisher.apply(copy, peer_names);
  require(done.has_value() || (done.error().code == -ENOSPC && copy == wanted));
  is_whole(maps, publisher);
  are_same(plugin::read_published(maps), done ? wanted : before);
  return done.has_value();
}

/// All that programs and processes read.
struct Content {
  std::vector<std::byte> bytes;
  std::map<std::string, std::uint32_t> keys;
  bool operator==(const Content&) const = default;
};

Content content_of(const plugin::Maps& maps) {
  Content content{.bytes = {}, .keys = keys_of(maps)};
  const auto add = [&content](auto array) {
    const auto bytes = std::as_bytes(array);
    content.bytes.insert(content.bytes.end(), bytes.begin(), bytes.end());
  };
  add(maps.records());
  add(maps.slots());
  add(maps.backends());
  add(maps.filter());
  add(std::span(&maps.meta(), 1));
  return content;
}

/// The same maps for every input, as empty as at first: to make some takes longer than all that is done with them.
void empty_maps() {
  static const plugin::Maps maps = [] {
    require(::mkdir(directory.c_str(), 0700) == 0);
    auto made = plugin::Maps::create(plugin::Capacity::for_need({.entries = most_entries}), nullptr);
    require(made.has_value() && made->pin(directory).has_value());
    return std::move(*made);
  }();
  static const meta_record meta = maps.meta();
  for (const plugin::Key& key : *maps.all_keys()) require(maps.erase_key(key).has_value());
  std::ranges::fill(maps.records(), service_record{});
  std::ranges::fill(maps.slots(), block_entry{});
  std::ranges::fill(maps.backends(), backend_record{});
  std::ranges::fill(maps.filter(), 0);
  maps.meta() = meta;
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int* /*argc*/, char*** /*argv*/) {
  support::enter_private_environment();
  if (!support::missing_privilege().empty()) {
    std::fprintf(stderr, "fuzz_adoption: cannot run here: %s\n", support::missing_privilege().c_str());
    std::exit(77);
  }
  // A run in which all is refused, or nothing, is no test.
  std::atexit([] {
    std::fprintf(stderr, "%llu adopted, %llu refused\n", static_cast<unsigned long long>(adopted),
                 static_cast<unsigned long long>(refused));
    require(adopted + refused < 1000 || (adopted > 100 && refused > 100));
  });
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  fuzz::Input input(data, size);
  const std::vector<config::Service> first = services(input);
  const bool peer_names = input.flag();
  empty_maps();
  {
    auto before = plugin::Maps::open(directory);
    require(before.has_value());
    auto publisher = plugin::Publisher::create(*before, nullptr);
    require(publisher.has_value() && load(*before, *publisher, first, peer_names));
    const std::size_t changes = input.below(12);
    for (std::size_t i = 0; i < changes; ++i) damage(input, *before);
  }
  auto maps = plugin::Maps::open(directory);
  if (!maps) {
    is_told_as_damage(maps.error());
    return 0;
  }
  const Content before = content_of(*maps);
  auto publisher = plugin::Publisher::adopt(*maps);
  if (!publisher) {
    is_told_as_damage(publisher.error());
    require(content_of(*maps) == before);
    ++refused;
    return 0;
  }
  ++adopted;
  is_whole(*maps, *publisher);
  // The same file once more is what heals; a block that somebody has made as large as the map leaves no room for
  // another, and the engine makes new maps then.
  const bool is_same_file = input.flag();
  const auto wanted = is_same_file ? first : services(input);
  if (!load(*maps, *publisher, wanted, is_same_file ? peer_names : input.flag())) return 0;
  // Whoever comes next finds nothing that is damaged. The ring of round_robin does not say in which order the file has
  // its backends, and may be another for the same.
  auto next = plugin::Publisher::adopt(*maps);
  require(next.has_value());
  is_whole(*maps, *next);
  for (const plugin::PublishedService& one : next->published())
    require(one.intact || one.service.policy == config::Policy::round_robin);
  const auto seen = next->services();
  require(seen.size() == wanted.size());
  for (const config::Service& service : seen) is_same(service, *publisher->find(plugin::encode_key(service)));
  return 0;
}
