// SPDX-License-Identifier: BSD-2-Clause
//
// What kubernetes/ makes of an API server, as lines of JSON: {"services": {name: [...]}} for what changes, {"listed":
// namespace}, {"resolved": [address]}, {"log": line}, and {"status": ...} for each line on standard input. Its end ends
// the program. Arguments: key=value.
#include <fmt/format.h>
#include <unistd.h>

#include <boost/asio/io_context.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <boost/asio/read_until.hpp>
#include <boost/json.hpp>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <string>

#include "config/names.h"
#include "config/values.h"
#include "kubernetes/source.h"

namespace {

void print(const boost::json::object& line) {
  fmt::print("{}\n", boost::json::serialize(line));
  std::fflush(stdout);
}

boost::json::array shown(const std::vector<config::Service>& services) {
  boost::json::array result;
  for (const config::Service& service : services) {
    boost::json::array backends;
    for (const config::Backend& backend : service.backends)
      backends.emplace_back(config::to_text(backend.address, backend.port) +
                            (backend.state == config::BackendState::drain ? " drain" : ""));
    result.push_back({{"name", service.name},
                      {"vip", config::to_text(service.vip, service.port)},
                      {"protocol", config::name_of(config::protocol_names, service.protocol)},
                      {"backends", std::move(backends)}});
  }
  return result;
}

}  // namespace

int main(int count, char** words) {
  config::Kubernetes choices;
  kubernetes::Pace pace{.first_pause = std::chrono::milliseconds(20),
                        .max_pause = std::chrono::milliseconds(200),
                        .proof = std::chrono::milliseconds(500)};
  const std::map<std::string, std::function<void(const std::string&)>> keys = {
      {"kubeconfig", [&](const std::string& value) { choices.kubeconfig = value; }},
      {"context", [&](const std::string& value) { choices.context = value; }},
      {"server", [&](const std::string& value) { choices.server = value; }},
      {"ca_file", [&](const std::string& value) { choices.ca_file = value; }},
      {"token_file", [&](const std::string& value) { choices.token_file = value; }},
      {"namespace", [&](const std::string& value) { choices.namespaces.push_back(value); }},
      {"selector", [&](const std::string& value) { choices.selector = value; }},
      {"node", [&](const std::string& value) { choices.node = value; }},
      {"page", [&](const std::string& value) { pace.page = std::stoul(value); }},
      {"exec_time", [&](const std::string& value) { pace.exec_time = std::chrono::seconds(std::stol(value)); }},
      {"max_objects", [&](const std::string& value) { pace.max_objects = std::stoul(value); }},
      {"proof", [&](const std::string& value) { pace.proof = std::chrono::milliseconds(std::stol(value)); }},
      {"first_pause",
       [&](const std::string& value) { pace.first_pause = std::chrono::milliseconds(std::stol(value)); }},
      {"max_pause", [&](const std::string& value) { pace.max_pause = std::chrono::milliseconds(std::stol(value)); }},
      {"connect_time",
       [&](const std::string& value) { pace.connect_time = std::chrono::milliseconds(std::stol(value)); }},
      {"max_silence",
       [&](const std::string& value) { pace.max_silence = std::chrono::milliseconds(std::stol(value)); }},
      {"patience", [&](const std::string& value) { pace.patience = std::chrono::seconds(std::stol(value)); }},
      {"watch_time", [&](const std::string& value) { pace.watch_time = std::chrono::seconds(std::stol(value)); }},
  };
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    const std::size_t equals = word.find('=');
    keys.at(word.substr(0, equals))(word.substr(equals + 1));
  }

  boost::asio::io_context io;
  auto source = kubernetes::Source::create(
      io, choices, pace,
      {.listed = [](const std::string& space) { print({{"listed", space}}); },
       .changed =
           [](const std::vector<kubernetes::Change>& changes) {
             boost::json::object services;
             for (const kubernetes::Change& change : changes) services[change.name] = shown(change.services);
             print({{"services", std::move(services)}});
           },
       .resolved =
           [](const std::vector<boost::asio::ip::tcp::endpoint>& addresses) {
             boost::json::array texts;
             for (const auto& one : addresses) texts.emplace_back(config::to_text(one.address(), one.port()));
             print({{"resolved", std::move(texts)}});
           },
       .tell = [](bool is_error, const std::string& line) { print({{"log", line}, {"is_error", is_error}}); }});
  if (!source) {
    print({{"failure", source.error().message}});
    return EXIT_FAILURE;
  }

  boost::asio::posix::stream_descriptor input(io, ::dup(STDIN_FILENO));
  std::string line;
  std::function<void()> wait = [&] {
    boost::asio::async_read_until(input, boost::asio::dynamic_buffer(line), '\n',
                                  [&](const boost::system::error_code& error, std::size_t length) {
                                    if (error) return io.stop();
                                    line.erase(0, length);
                                    const auto status = (*source)->status();
                                    print({{"status",
                                            {{"is_complete", status.is_complete},
                                             {"is_current", status.is_current},
                                             {"problem", status.problem},
                                             {"services", status.services},
                                             {"slices", status.slices},
                                             {"lists", status.counts.lists},
                                             {"events", status.counts.events},
                                             {"failures", status.counts.failures}}}});
                                    wait();
                                  });
  };
  wait();
  io.run();
  return EXIT_SUCCESS;
}
