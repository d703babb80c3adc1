// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <boost/asio/awaitable.hpp>
#include <boost/asio/io_context.hpp>

#include "config/result.h"
#include "kubernetes/access.h"

namespace kubernetes {

/// Runs the command and reads the credentials that it prints, without waiting in this thread. One that takes more than
/// a minute is ended.
boost::asio::awaitable<config::Result<Credentials>> run_exec(boost::asio::io_context& io, const Exec& exec);

}  // namespace kubernetes
