// SPDX-License-Identifier: BSD-2-Clause
//
// Hot paths with fixed input, for `compare` to count the instructions of. Each is a function of its own, named path_*,
// which callgrind counts with everything that it calls; what it needs is made before. Without an argument all of them
// run; with --bpf, the programs' lengths are printed.
#include <bpf/libbpf.h>
#include <fmt/format.h>

#include <boost/asio/ip/address.hpp>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "clusterip.skel.h"
#include "config/read_config.h"
#include "fallback_proxy/service.h"
#include "plugin/map_encoding.h"

namespace {

constexpr std::uint32_t services = 100;
constexpr std::uint32_t backends = 10;
constexpr std::uint32_t choices = 10000;

std::string configuration(std::string_view more = "") {
  std::string text;
  for (std::uint32_t i = 0; i < services; ++i) {
    text += fmt::format("[[service]]\nname = \"service-{0}\"\nvip = \"10.96.{1}.{2}\"\nport = 80\n{3}backends = [", i,
                        i / 250, i % 250 + 1, more);
    for (std::uint32_t k = 0; k < backends; ++k)
      text += fmt::format("{}{{ address = \"10.{}.{}.{}\", port = 8080, weight = {} }}", k > 0 ? ", " : "", 128 + k,
                          i / 250, i % 250 + 1, k + 1);
    text += "]\n";
  }
  return text;
}

config::Config parsed(const std::string& text) {
  auto config = config::read_config(text);
  if (!config) std::exit(1);
  return *std::move(config);
}

userspace::Service service_of(const std::string& more) {
  const config::Service settings = parsed(configuration(more)).services.front();
  std::vector<userspace::BackendPointer> of_it;
  for (const config::Backend& backend : settings.backends)
    of_it.push_back(std::make_shared<userspace::Backend>(backend.address, backend.port));
  return {settings, std::move(of_it), std::make_shared<userspace::ServiceState>()};
}

std::uintptr_t seen = 0;  // printed in the end, so that nothing is left out

/// What the fast path's publication of all services computes: blocks, keys and backends of maps.
void encode(const config::Config& config) {
  std::vector<block_entry> block;
  const std::vector<std::uint32_t> indices = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10};
  std::uint32_t record = 0;
  for (const config::Service& service : config.services) {
    block.resize(plugin::block_size(service));
    plugin::encode_block(service, ++record, indices, true, block);
    seen += block[1].slot.backend + plugin::KeyHash()(plugin::encode_key(service));
    for (const config::Backend& backend : service.backends) seen += plugin::encode_backend(backend, record).address[3];
  }
}

void choose(const userspace::Service& service) {
  userspace::Random random(1);  // NOLINT(cert-msc32-c,cert-msc51-cpp): the same each time
  for (std::uint32_t i = 0; i < choices; ++i) {
    const userspace::SocketAddress client(boost::asio::ip::address_v4(0x0a000001 + i), 1024);
    seen += service.choose(client, {}, random)->address.port();
  }
}

}  // namespace

extern "C" {

[[gnu::noinline]] void path_read_config(const std::string& text) { seen += parsed(text).services.size(); }

[[gnu::noinline]] void path_encode(const config::Config& config) { encode(config); }
[[gnu::noinline]] void path_encode_maglev(const config::Config& config) { encode(config); }
[[gnu::noinline]] void path_choose_random(const userspace::Service& service) { choose(service); }
[[gnu::noinline]] void path_choose_round_robin(const userspace::Service& service) { choose(service); }
[[gnu::noinline]] void path_choose_least_conn(const userspace::Service& service) { choose(service); }
[[gnu::noinline]] void path_choose_maglev(const userspace::Service& service) { choose(service); }
}

int main(int argc, char**) {
  if (argc > 1) {
    const std::unique_ptr<clusterip_bpf, decltype(&clusterip_bpf__destroy)> skeleton(clusterip_bpf__open(),
                                                                                     clusterip_bpf__destroy);
    if (!skeleton) return 1;
    bpf_program* program = nullptr;
    bpf_object__for_each_program(program, skeleton->obj)
        fmt::print("{} {}\n", bpf_program__name(program), bpf_program__insn_cnt(program));
    return 0;
  }
  const std::string text = configuration();
  path_read_config(text);
  path_encode(parsed(text));
  path_encode_maglev(parsed(configuration("policy = \"maglev\"\n")));
  path_choose_random(service_of(""));
  path_choose_round_robin(service_of("policy = \"round_robin\"\n"));
  path_choose_least_conn(service_of("policy = \"least_conn\"\n"));
  path_choose_maglev(service_of("policy = \"maglev\"\n"));
  fmt::print("{}\n", seen);
}
