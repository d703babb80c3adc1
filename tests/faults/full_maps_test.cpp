// SPDX-License-Identifier: BSD-2-Clause
//
// Maps that are full, although by their size they have room: new ones take their place, and nothing is lost.
#include <arpa/inet.h>
#include <linux/bpf.h>

#include <cerrno>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "bpf/map_layout.h"
#include "tests/run/running.h"

namespace {

using namespace support;

using KeyBytes = std::vector<unsigned char>;

int change_key(const Fd& map, bpf_cmd command, const service_key& key, std::uint32_t record) {
  bpf_attr attr{};
  attr.map_fd = static_cast<std::uint32_t>(map.get());
  attr.key = reinterpret_cast<std::uint64_t>(&key);
  if (command == BPF_MAP_UPDATE_ELEM) attr.value = reinterpret_cast<std::uint64_t>(&record);
  return bpf(command, attr);
}

std::set<KeyBytes> keys_of(const Fd& map) {
  std::set<KeyBytes> keys;
  KeyBytes key(sizeof(service_key)), next(sizeof(service_key));
  bpf_attr attr{};
  attr.map_fd = static_cast<std::uint32_t>(map.get());
  attr.next_key = reinterpret_cast<std::uint64_t>(next.data());
  while (bpf(BPF_MAP_GET_NEXT_KEY, attr) == 0 && keys.insert(next).second) {
    key = next;
    attr.key = reinterpret_cast<std::uint64_t>(key.data());
  }
  return keys;
}

std::uint32_t id_of(const Fd& map) {
  bpf_map_info info{};
  bpf_attr attr{};
  attr.info.bpf_fd = static_cast<std::uint32_t>(map.get());
  attr.info.info_len = sizeof info;
  attr.info.info = reinterpret_cast<std::uint64_t>(&info);
  checked(bpf(BPF_OBJ_GET_INFO_BY_FD, attr), "BPF_OBJ_GET_INFO_BY_FD");
  return info.id;
}

class FullMaps : public Running {
 protected:
  /// Keys of nobody's, until so many more find room.
  static void fill(const Fd& service_map, std::uint32_t room) {
    service_key key{};
    key.address[2] = htonl(0xffff);
    key.protocol = IPPROTO_TCP;
    std::uint32_t made = 0;
    for (; made < 10'000; ++made) {
      key.address[3] = htonl(0x0ac80000 + made);
      if (change_key(service_map, BPF_MAP_UPDATE_ELEM, key, 0) != 0) break;
    }
    ASSERT_EQ(errno, E2BIG);
    for (std::uint32_t i = 0; i < room; ++i) {
      key.address[3] = htonl(0x0ac80000 + i);
      ASSERT_EQ(change_key(service_map, BPF_MAP_DELETE_ELEM, key, 0), 0);
    }
  }

  std::string before() const { return toml({web({backend(one_)})}); }
  std::string after() const {
    return toml(
        {web({backend(two_)}), {"b", "10.96.0.2", 80, {backend(two_)}}, {"c", "10.96.0.3", 80, {backend(two_)}}});
  }
  void expect_after() const {
    for (const char* vip : {fast_vip, "10.96.0.2", "10.96.0.3"}) EXPECT_EQ(ask(vip, 80), answered_by("two")) << vip;
  }

  const NamedServer one_{"one"};
  const NamedServer two_{"two"};
};

TEST_F(FullMaps, ServiceMapWithoutRoomIsReplacedAndWhatFoundRoomIsTakenBack) {
  Handle handle = serve(before(), pinned());
  const Fd full = pinned_map(pin(), "Service_Map");
  fill(full, 2);  // of the four keys that two services take
  const auto keys = keys_of(full);
  ASSERT_TRUE(ok(handle.load(after())));
  expect_after();
  EXPECT_NE(id_of(pinned_map(pin(), "Service_Map")), id_of(full));
  EXPECT_EQ(keys_of(full), keys);
  // The new one is as large as its services need, and has none of the others.
  ASSERT_TRUE(ok(handle.load(before())));
  EXPECT_EQ(ask(fast_vip, 80), answered_by("one"));
}

TEST_F(FullMaps, AnotherProcessLoadsOverOneWithoutRoom) {
  serve(before(), pinned());
  fill(pinned_map(pin(), "Service_Map"), 0);
  const TemporaryDirectory directory;
  const Finished loaded = clusterip(
      {"load", "--config", directory.write("services.toml", after()), "--cgroup", cgroup().path(), "--pin", pin()});
  EXPECT_EQ(loaded.exit_code, fine) << loaded.err;
  expect_after();
}

TEST_F(FullMaps, ServiceThatReloadsReplacesOneWithoutRoom) {
  RunningService service(files(before()));
  fill(pinned_map(pin(), "Service_Map"), 1);
  EXPECT_THAT(service.reload(after()), testing::HasSubstr("serving 3 services"));
  expect_after();
  EXPECT_EQ(service.terminate().exit_code, fine);
}

// Of backends that have left, the places are kept as long as connections count there.
TEST_F(FullMaps, BackendsThatConnectionsHoldFindTheirSuccessorsRoomInNewMaps) {
  constexpr int at_once = 1000;
  const auto backends = [](int generation) {
    std::vector<Backend> made;
    for (int i = 0; i < at_once; ++i)
      made.push_back({fmt::format("127.{}.{}.{}", generation, i / 200, 1 + i % 200), 80});
    return made;
  };
  const auto text = [&](int generation, const NamedServer& server) {
    return toml({{"many", "10.96.0.2", 80, backends(generation)}, web({backend(server)})});
  };
  for (const bool by_load : {true, false}) {
    SCOPED_TRACE(by_load ? "a load" : "set_backends");
    Handle handle = serve(text(1, one_), pinned());
    const Fd held = pinned_map(pin(), "Backend_Map");
    const std::uint32_t room = 2 * read_element<meta_record>(pinned_map(pin(), "Meta_Map"), 0).backends;
    const auto hold_all = [&] {
      for (std::uint32_t index = 0; index < room; ++index) {
        auto record = read_element<backend_record>(held, index);
        if (record.state != BACKEND_ACTIVE) continue;
        record.live = 1;
        write_element(held, index, record);
      }
    };
    hold_all();
    ASSERT_TRUE(ok(handle.load(text(2, one_))));
    EXPECT_EQ(id_of(pinned_map(pin(), "Backend_Map")), id_of(held)) << "there is room for two of three";
    hold_all();
    if (by_load)
      ASSERT_TRUE(ok(handle.load(text(3, two_))));
    else
      ASSERT_TRUE(ok(handle.set_backends("many", backends(3))));
    EXPECT_NE(id_of(pinned_map(pin(), "Backend_Map")), id_of(held));
    EXPECT_EQ(ask(fast_vip, 80), answered_by(by_load ? "two" : "one"));
    const auto seen = handle.visit();
    ASSERT_EQ(seen.at(0).name, "many");
    ASSERT_EQ(seen.at(0).backends.size(), at_once);
    EXPECT_EQ(seen.at(0).backends.back().address, backends(3).back().address);
    ASSERT_TRUE(ok(handle.detach()));
  }
}

}  // namespace
