// SPDX-License-Identifier: BSD-2-Clause
#include "tests/support/program.h"

#include <fmt/format.h>
#include <fmt/ostream.h>

#include <cstdio>
#include <exception>

#include "tests/support/environment.h"

namespace support {

namespace po = boost::program_options;

int run_program(const std::string& name, po::options_description options, int argc, char** argv,
                const std::function<int(const po::variables_map&)>& body) {
  options.add_options()("help", "show this text");
  po::variables_map given;
  try {
    po::store(po::parse_command_line(argc, argv, options), given);
    po::notify(given);
  } catch (const po::error& error) {
    fmt::print(stderr, "{}: {}\n", name, error.what());
    return 2;
  }
  if (given.contains("help")) {
    fmt::print("{}", fmt::streamed(options));
    return 0;
  }

  enter_private_environment();
  if (!missing_privilege().empty()) {
    fmt::print(stderr, "{}: skipped: {}\n", name, missing_privilege());
    return must_run() ? 1 : 77;
  }
  try {
    return body(given);
  } catch (const std::exception& error) {
    fmt::print(stderr, "{}: {}\n", name, error.what());
    return 1;
  }
}

}  // namespace support
