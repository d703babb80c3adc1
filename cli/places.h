// SPDX-License-Identifier: BSD-2-Clause
//
// Where a verb looks for what serves: at a running daemon, or at what is pinned.
#pragma once

#include <boost/program_options/options_description.hpp>
#include <optional>
#include <string>

#include "cli/verbs.h"
#include "config/config.h"
#include "fallback_proxy/control_client.h"

namespace cli {

struct Places {
  std::string control;  // the control socket of a daemon, which is asked first; empty: no daemon is asked
  std::string pin;      // what is looked at where no daemon listens; empty: nothing
  bool are_default = false;
};

/// --config, --control, --pin.
void describe_places(boost::program_options::options_description_easy_init add);

/// Those of the file, the socket or the pins that were given, of which there may be one only; else the default ones.
std::expected<Places, Failure> places_of(const Given& given);

/// Nothing: no daemon listens, but pins may be looked at.
std::expected<std::optional<userspace::ControlClient>, Failure> connect_to_daemon(const Places& places);

/// Open what is pinned, as no daemon listens.
std::expected<Handle, Failure> open_pins(const Plugin& plugin, const Given& given, const Places& places);

/// The [engine] table of the file. A mistake anywhere in the file is a failure.
std::expected<config::Engine, Failure> engine_of(const std::string& file);

}  // namespace cli
