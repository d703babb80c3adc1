// SPDX-License-Identifier: BSD-2-Clause
//
// The C ABI as a contract: symbols, sizes, misuse, and that the library really comes and goes.
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <fstream>
#include <memory>
#include <regex>
#include <set>
#include <sstream>

#include "tests/support/fixture.h"

namespace {

using namespace support;

// Today's sizes on 64-bit machines. They only grow, with a new minor version of the ABI.
static_assert(sizeof(clusterip_error) == 536);
static_assert(sizeof(clusterip_options) == 32);
static_assert(sizeof(clusterip_capabilities) == 272);
static_assert(sizeof(clusterip_backend) == 32);
static_assert(sizeof(clusterip_service_info) == 104);
static_assert(sizeof(clusterip_backend_info) == 72);
static_assert(sizeof(clusterip_resolution) == 312);
static_assert(sizeof(clusterip_canary_result) == 16);
static_assert(offsetof(clusterip_error, message) == 24);
// What a host that was built with ABI 1.1 reads stays where it was.
static_assert(offsetof(clusterip_backend_info, reversed) == 48 && offsetof(clusterip_backend_info, failures) == 56);
static_assert(offsetof(clusterip_event, service) == 328 && offsetof(clusterip_event, backends) == 488);
static_assert(sizeof(clusterip_event) == 504);
// The same for ABI 1.2.
static_assert(offsetof(clusterip_service_info, reversed) == 88 && offsetof(clusterip_service_info, affinity_ms) == 96);

std::set<std::string> declared_functions() {
  const std::string header = read_text(CLUSTERIP_HEADER);
  const std::regex declaration(R"(^(?:int|void|uint32_t|const char \*) ?(clusterip_\w+)\()", std::regex::multiline);
  std::set<std::string> names;
  for (std::sregex_iterator match(header.begin(), header.end(), declaration), end; match != end; ++match)
    names.insert((*match)[1]);
  return names;
}

TEST(Abi, ExportsExactlyWhatTheHeaderDeclares) {
  std::set<std::string> exported;
  std::istringstream symbols(run({"nm", "-D", "--defined-only", CLUSTERIP_PLUGIN_PATH}).out);
  for (std::string address, type, name; symbols >> address >> type >> name;) {
    if (type == "A") continue;  // the name of the version itself
    EXPECT_EQ(type, "T") << name;
    exported.insert(name.substr(0, name.find('@')));
  }
  EXPECT_EQ(declared_functions().size(), 19u);
  EXPECT_EQ(exported, declared_functions());
}

TEST(Abi, SonameCarriesTheMajorVersion) {
  EXPECT_NE(run({"readelf", "--dynamic", CLUSTERIP_PLUGIN_PATH}).out.find("soname: [libclusterip.so.1]"),
            std::string::npos);
}

TEST(Abi, HeaderIsCleanC99AndCpp) {
  const std::vector<std::vector<std::string>> compilers = {{C_COMPILER, "-std=c99", "-x", "c"},
                                                           {C_COMPILER, "-std=c17", "-x", "c"},
                                                           {CXX_COMPILER, "-std=c++11", "-x", "c++"},
                                                           {CXX_COMPILER, "-std=c++23", "-x", "c++"}};
  const TemporaryDirectory directory;
  const std::string source =
      directory.write("includes_it_twice", "#include \"" CLUSTERIP_HEADER "\"\n#include \"" CLUSTERIP_HEADER "\"\n");
  for (std::vector<std::string> command : compilers) {
    const std::vector<std::string> more = {"-pedantic", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", source};
    command.insert(command.end(), more.begin(), more.end());
    const Finished compiled = run(command);
    EXPECT_EQ(compiled.exit_code, 0) << compiled.err;
    EXPECT_EQ(compiled.err, "");
  }
}

TEST(Abi, VersionIsTheHeaders) {
  const Plugin plugin;
  EXPECT_EQ(plugin.abi_version(), CLUSTERIP_ABI_MAJOR << 16 | CLUSTERIP_ABI_MINOR);
  EXPECT_TRUE(std::regex_match(plugin.version_string(), std::regex(R"(\d+\.\d+\.\d+)"))) << plugin.version_string();
}

TEST(Abi, UnloadsForReal) {
  {
    const Plugin plugin;
    EXPECT_TRUE(is_mapped("libclusterip"));
  }
  EXPECT_FALSE(is_mapped("libclusterip"));
}

TEST(Abi, CheckTextVisitsEveryMistakeInOrder) {
  const Plugin plugin;
  const std::string text =
      "[[service]]\nname = \"web\"\nvip = \"224.0.0.1\"\nport = 0\ncolour = \"blue\"\nbackends = []\n";
  std::vector<Outcome> mistakes;
  const auto visit = [](const clusterip_error* mistake, void* user) {
    static_cast<std::vector<Outcome>*>(user)->push_back(
        {mistake->code, mistake->line, mistake->column, mistake->message});
  };
  EXPECT_EQ(plugin.check_text(text.data(), text.size(), "three.toml", visit, &mistakes), -EBADMSG);
  ASSERT_EQ(mistakes.size(), 3u) << testing::PrintToString(mistakes);
  for (std::uint32_t i = 0; i < 3; ++i) {
    EXPECT_TRUE(fails_with(-EBADMSG, mistakes[i]));
    EXPECT_EQ(mistakes[i].line, i + 3);
    EXPECT_GE(mistakes[i].column, 1u);
  }
}

class AbiMisuse : public Integration {};

TEST_F(AbiMisuse, NullArgumentsAreInvalid) {
  const Plugin& p = plugin();
  Handle open_handle(p, unpinned());
  ASSERT_TRUE(ok(open_handle.load(toml({}))));
  clusterip* const handle = open_handle.get();
  clusterip_resolution resolution{};
  resolution.size = sizeof resolution;
  const sockaddr_in vip = socket_address("10.96.0.1", 80);
  const auto* address = reinterpret_cast<const sockaddr*>(&vip);
  const auto on_mistake = [](const clusterip_error*, void*) {};
  const auto on_service = [](const clusterip_service_info*, const clusterip_backend_info*, void*) { return 0; };

  EXPECT_EQ(p.probe(nullptr, nullptr), -EINVAL);
  EXPECT_EQ(p.open(nullptr, nullptr, nullptr), -EINVAL);
  EXPECT_EQ(p.load_file(nullptr, "file", nullptr), -EINVAL);
  EXPECT_EQ(p.load_file(handle, nullptr, nullptr), -EINVAL);
  EXPECT_EQ(p.load_text(nullptr, "", 0, "text", nullptr), -EINVAL);
  EXPECT_EQ(p.load_text(handle, nullptr, 5, "text", nullptr), -EINVAL);
  EXPECT_EQ(p.load_text(handle, "", 0, nullptr, nullptr), -EINVAL);
  EXPECT_EQ(p.check_text("", 0, nullptr, on_mistake, nullptr), -EINVAL);
  EXPECT_EQ(p.check_text(nullptr, 5, "text", on_mistake, nullptr), -EINVAL);
  EXPECT_EQ(p.set_backends(nullptr, "web", nullptr, 0, nullptr), -EINVAL);
  EXPECT_EQ(p.set_backends(handle, nullptr, nullptr, 0, nullptr), -EINVAL);
  EXPECT_EQ(p.refuse_left_out(nullptr, nullptr), -EINVAL);
  EXPECT_EQ(p.set_backends(handle, "web", nullptr, 1, nullptr), -EINVAL);
  EXPECT_EQ(p.attach(nullptr, nullptr), -EINVAL);
  EXPECT_EQ(p.detach(nullptr, nullptr), -EINVAL);
  EXPECT_EQ(p.resolve(nullptr, address, sizeof vip, IPPROTO_TCP, &resolution, nullptr), -EINVAL);
  EXPECT_EQ(p.resolve(handle, nullptr, sizeof vip, IPPROTO_TCP, &resolution, nullptr), -EINVAL);
  EXPECT_EQ(p.resolve(handle, address, sizeof vip, IPPROTO_TCP, nullptr, nullptr), -EINVAL);
  EXPECT_EQ(p.resolve(handle, address, sizeof vip - 9, IPPROTO_TCP, &resolution, nullptr), -EINVAL)
      << "a short address";
  EXPECT_EQ(p.resolve(handle, address, 0, IPPROTO_TCP, &resolution, nullptr), -EINVAL) << "an empty address";
  EXPECT_EQ(p.resolve(handle, address, sizeof vip, IPPROTO_SCTP, &resolution, nullptr), -EINVAL) << "another protocol";
  EXPECT_EQ(p.visit_services(nullptr, on_service, nullptr, nullptr), -EINVAL);
  EXPECT_EQ(p.visit_services(handle, nullptr, nullptr, nullptr), -EINVAL);
  EXPECT_EQ(p.canary(nullptr, nullptr, nullptr), -EINVAL);
  p.close(nullptr);
}

TEST_F(AbiMisuse, FailuresAreDescribed) {
  clusterip_error error{};
  error.size = sizeof error;
  EXPECT_EQ(plugin().attach(nullptr, &error), -EINVAL);
  EXPECT_EQ(error.code, -EINVAL);
  EXPECT_NE(error.message[0], '\0');
  EXPECT_EQ(error.line, 0u);
}

TEST_F(AbiMisuse, ErrorStructIsLeftAloneOnSuccess) {
  clusterip_error error{};
  error.size = sizeof error;
  error.code = 12345;
  std::strcpy(error.message, "untouched");
  clusterip_error const before = error;
  Handle handle(plugin(), unpinned());
  const std::string text = toml({});
  EXPECT_EQ(plugin().load_text(handle.get(), text.data(), text.size(), "good", &error), 0);
  EXPECT_EQ(std::memcmp(&error, &before, sizeof error), 0);
}

TEST_F(AbiMisuse, ImpossibleSizesAreInvalid) {
  for (const std::size_t size : {std::size_t{0}, std::size_t{1}, std::size_t{4}, sizeof(std::size_t)}) {
    clusterip_options options{};
    options.size = size;
    options.cgroup_path = cgroup().path().c_str();
    clusterip* handle = nullptr;
    EXPECT_EQ(plugin().open(&options, &handle, nullptr), -EINVAL) << "options of size " << size;
    EXPECT_EQ(handle, nullptr);
    clusterip_capabilities capabilities{};
    capabilities.size = size;
    EXPECT_EQ(plugin().probe(&capabilities, nullptr), -EINVAL) << "capabilities of size " << size;
    clusterip_error error{};
    error.size = size;
    Handle open_handle(plugin(), unpinned());
    EXPECT_LT(plugin().load_text(open_handle.get(), "x", 1, "bad", &error), 0);
    EXPECT_EQ(error.message[0], '\0') << "an error struct of size " << size << " was written to";
    clusterip_backend backend{};
    backend.size = size;
    backend.address = "127.0.0.1";
    backend.port = 80;
    ASSERT_TRUE(ok(open_handle.load(toml({{"web", "10.96.0.1", 80, {}}}))));
    EXPECT_EQ(plugin().set_backends(open_handle.get(), "web", &backend, 1, nullptr), -EINVAL)
        << "backend of size " << size;
    clusterip_canary_result canary{};
    canary.size = size;
    EXPECT_EQ(plugin().canary(open_handle.get(), &canary, nullptr), -EINVAL) << "canary result of size " << size;
    clusterip_resolution resolution{};
    resolution.size = size;
    const sockaddr_in vip = socket_address("10.96.0.1", 80);
    EXPECT_EQ(plugin().resolve(open_handle.get(), reinterpret_cast<const sockaddr*>(&vip), sizeof vip, IPPROTO_TCP,
                               &resolution, nullptr),
              -EINVAL)
        << "resolution of size " << size;
  }
}

TEST_F(AbiMisuse, ErrorOfAnyShorterMessageIsNotOverrun) {
  Handle handle(plugin(), unpinned());
  const std::string text =
      "a_key_with_quite_a_long_name_that_is_unknown_and_so_makes_the_message_long_" + std::string(200, 'x') + " = 1\n";
  for (const std::size_t message :
       {std::size_t{1}, std::size_t{2}, std::size_t{64}, std::size_t{511}, std::size_t{512}}) {
    alignas(clusterip_error) unsigned char memory[sizeof(clusterip_error) + 64];
    std::memset(memory, 0xa5, sizeof memory);
    auto* const error = reinterpret_cast<clusterip_error*>(memory);
    error->size = offsetof(clusterip_error, message) + message;
    const std::size_t size = error->size;
    EXPECT_LT(plugin().load_text(handle.get(), text.data(), text.size(), "long", error), 0);
    EXPECT_EQ(error->size, size);
    EXPECT_TRUE(std::all_of(memory + size, std::end(memory), [](unsigned char byte) { return byte == 0xa5; }))
        << message;
    if (message < 64) continue;
    EXPECT_NE(std::memchr(error->message, '\0', message), nullptr) << "no end within " << message;
    EXPECT_EQ(error->code, -EBADMSG);
    EXPECT_EQ(error->line, 1u);
  }
}

TEST_F(AbiMisuse, LargerStructsOfANewerHostAreTaken) {
  struct NewerError {
    clusterip_error error;
    char more[64];
  } newer{};
  newer.error.size = sizeof newer;
  Handle handle(plugin(), unpinned());
  EXPECT_EQ(plugin().load_text(handle.get(), "x", 1, "bad", &newer.error), -EBADMSG);
  EXPECT_EQ(newer.error.code, -EBADMSG);

  struct NewerBackend {
    clusterip_backend backend;
    std::uint64_t more;
  } backends[2] = {};
  for (NewerBackend& element : backends) element.backend.size = sizeof element;
  backends[0].backend.address = "127.0.0.1";
  backends[0].backend.port = 1;
  backends[1].backend.address = "127.0.0.2";
  backends[1].backend.port = 2;
  ASSERT_TRUE(ok(handle.load(toml({{"web", "10.96.0.1", 80, {}}}))));
  EXPECT_EQ(plugin().set_backends(handle.get(), "web", &backends[0].backend, 2, nullptr), 0);
  const auto seen = handle.visit().at(0).backends;
  ASSERT_EQ(seen.size(), 2u);
  EXPECT_EQ(seen[0].port + seen[1].port, 3);
}

TEST_F(AbiMisuse, UnknownFlagsAndReservedFieldsAreInvalid) {
  clusterip_options options{};
  options.size = sizeof options;
  options.cgroup_path = cgroup().path().c_str();
  clusterip* handle = nullptr;
  options.flags = 1u << 31;
  EXPECT_EQ(plugin().open(&options, &handle, nullptr), -EINVAL);
  options.flags = 0;
  options.reserved = 1;
  EXPECT_EQ(plugin().open(&options, &handle, nullptr), -EINVAL);
  EXPECT_EQ(handle, nullptr);
}

TEST_F(AbiMisuse, BackendStateMustBeOneOfTheThree) {
  Handle handle(plugin(), unpinned());
  ASSERT_TRUE(ok(handle.load(toml({{"web", "10.96.0.1", 80, {}}}))));
  clusterip_backend backend{};
  backend.size = sizeof backend;
  backend.address = "127.0.0.1";
  backend.port = 80;
  backend.state = 3;
  EXPECT_LT(plugin().set_backends(handle.get(), "web", &backend, 1, nullptr), 0);
  backend.state = CLUSTERIP_ACTIVE;
  backend.address = nullptr;
  EXPECT_LT(plugin().set_backends(handle.get(), "web", &backend, 1, nullptr), 0);
}

TEST_F(AbiMisuse, MistakesWithoutAVisitorAreCountedInTheResult) {
  EXPECT_LT(plugin().check_text("x", 1, "bad", nullptr, nullptr), 0);
}

TEST_F(AbiMisuse, OpenWithoutOptionsChangesNothing) {
  const std::size_t files = open_files();
  clusterip* handle = nullptr;
  EXPECT_EQ(plugin().open(nullptr, &handle, nullptr), 0);
  EXPECT_NE(handle, nullptr);
  plugin().close(handle);
  EXPECT_EQ(open_files(), files);
}

class AbiLife : public Integration {};

TEST_F(AbiLife, HandlesOnSeveralCgroupsServeDifferently) {
  const NamedServer one("one"), two("two"), three("three");
  const Cgroup other, third;
  const Handle first = serve(toml({{"web", "10.96.0.1", 80, {backend(one)}}}));
  auto second = std::make_unique<Handle>(serve(toml({{"web", "10.96.0.1", 80, {backend(two)}}}), {other.path(), {}}));
  const Handle last = serve(toml({{"web", "10.96.0.1", 443, {backend(three)}}}), {third.path(), {}});
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("one"));
  other.enter();
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("two"));
  third.enter();
  EXPECT_EQ(ask("10.96.0.1", 443), answered_by("three"));
  EXPECT_EQ(ask("10.96.0.1", 80), refused_by_program(ECONNREFUSED));
  other.enter();
  second.reset();
  EXPECT_EQ(ask("10.96.0.1", 80), refused_with(ENETUNREACH));
  cgroup().enter();
  EXPECT_EQ(ask("10.96.0.1", 80), answered_by("one"));
}

TEST_F(AbiLife, ComesAndGoes1000Times) {
  constexpr int warm_up = 50, cycles = 1000;
  const NamedServer server("server");
  const std::string text = toml({{"web", "10.96.0.1", 80, {backend(server)}}}, {16, 16});
  EXPECT_EQ(in_child([&] {
              unload_plugin();  // the fixture's own, in this process
              std::size_t files = 0, resident = 0, objects = 0;
              for (int cycle = 0; cycle < warm_up + cycles; ++cycle) {
                if (cycle == warm_up) {
                  files = open_files();
                  resident = resident_bytes();
                  objects = count_all_objects();
                }
                {
                  const Plugin plugin;
                  Handle handle(plugin, unpinned());
                  require_ok(handle.load(text));
                  require_ok(handle.attach());
                  if (cycle % 100 == 0) require(ask("10.96.0.1", 80) == answered_by("server"), "not served");
                  if (cycle % 2 == 0) require_ok(handle.detach());
                }
                require(!is_mapped("libclusterip"), "still mapped after dlclose");
                require(!is_mapped("bpf-map"), "a map is still mapped");
              }
              require(open_files() == files, "files were left open");
              const std::size_t grown = resident_bytes() - std::min(resident, resident_bytes());
              require(grown < 1'000'000, "memory grew by " + std::to_string(grown));
              require(eventually([&] { return count_all_objects() < objects + cycles / 2; }), "BPF objects were left");
            }),
            "");
  EXPECT_TRUE(connect4_programs(cgroup()).empty());
}

TEST_F(AbiLife, ReloadsKeepNothing) {
  constexpr int warm_up = 50, cycles = 1000;
  const NamedServer one("one"), two("two");
  const std::string texts[] = {
      toml({{"a", "10.96.0.1", 80, {backend(one)}}, {"b", "10.96.0.2", 80, {backend(two)}}}, {16, 16}),
      toml({{"a", "10.96.0.1", 80, {backend(two)}}, {"c", "10.96.0.3", 80, {backend(two)}}}, {32, 32})};
  Handle handle = serve(texts[0]);
  std::size_t files = 0, resident = 0;
  for (int cycle = 0; cycle < warm_up + cycles; ++cycle) {
    if (cycle == warm_up) {
      files = open_files();
      resident = resident_bytes();
    }
    // The limits change rarely: they need other maps and another program.
    const std::string& text = texts[cycle % 2];
    ASSERT_TRUE(ok(handle.load(cycle % 50 < 2 ? text : texts[1])));
    ASSERT_TRUE(ok(handle.set_backends("a", {backend(cycle % 3 == 0 ? one : two)})));
  }
  EXPECT_EQ(open_files(), files);
  EXPECT_LT(resident_bytes(), resident + 1'000'000);
}

}  // namespace
