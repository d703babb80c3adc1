// SPDX-License-Identifier: BSD-2-Clause
//
// The main() of tests and benchmarks that are programs of their own.
#pragma once

#include <boost/program_options.hpp>
#include <functional>
#include <string>

namespace support {

/// Reads the command line, enters the private environment, and calls `body` with what was given. Returns the exit
/// status: that of `body`; 0 after --help; 2 for a mistake in the command; where this machine cannot run it 77, which
/// ctest takes for skipped, or 1 if it must; 1 when `body` throws. Messages begin with `name`.
int run_program(const std::string& name, boost::program_options::options_description options, int argc, char** argv,
                const std::function<int(const boost::program_options::variables_map&)>& body);

}  // namespace support
