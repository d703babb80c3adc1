// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "tests/support/observe.h"
#include "tests/support/process.h"

namespace support {

/// The program fallback_proxy, running in this process's network namespace. It is ended with this object.
///
///   FallbackProxy proxy(proxy_toml({{"web", "127.0.1.1", 80, {backend(server)}}}));
///   ask("127.0.1.1", 80);
///   EXPECT_EQ(proxy.terminate().exit_code, 0);
class FallbackProxy {
 public:
  /// What one proxy hands on to the next: the configuration, and the directory of the control socket.
  class Files {
   public:
    /// `engine`: more lines of the table [engine].
    explicit Files(std::string engine = {}) : engine_(std::move(engine)) {}

    /// `text` must have no table [engine]: it begins with one that says where the control socket is.
    void write(const std::string& text) const;
    std::string config() const { return directory_.path() + "/clusterip.toml"; }
    std::string control() const { return directory_.path() + "/control.sock"; }

   private:
    std::string engine_;
    TemporaryDirectory directory_;
  };

  /// Starts it and blocks until it serves. `prepare` runs in the child before the program does, to limit or forbid
  /// something.
  explicit FallbackProxy(const std::string& text, const std::function<void()>& prepare = {});
  /// The same with the files of another, as they are.
  explicit FallbackProxy(const std::shared_ptr<const Files>& files, const std::function<void()>& prepare = {},
                         const std::vector<std::string>& more_arguments = {});

  const std::shared_ptr<const Files>& files() const { return files_; }
  pid_t pid() const { return process_.pid(); }

  /// Another configuration: blocks until it serves, or has been refused. Returns what was logged about it.
  std::string reload(const std::string& text);

  void signal(int number) const;
  /// Blocks until this has been logged, behind what an earlier call has found; returns the log up to the end of that
  /// line.
  std::string wait_for_log(const std::string& text) { return process_.wait_for_error(text); }

  /// SIGTERM, and blocks until it has ended. Exit code and the whole log, which is in `err`.
  Finished terminate();
  /// Blocks until it has ended by itself.
  Finished wait() { return process_.wait(); }
  /// SIGKILL, and blocks until it is gone.
  void kill();

  /// From now on it can open so many more files; nothing: as many as at first. It does not notice.
  void leave_descriptors(std::optional<std::size_t> more) const;

  // What the kernel knows of the process.

  std::size_t open_files() const;
  std::size_t resident_bytes() const;
  /// Of all its threads, in user and kernel mode.
  std::chrono::milliseconds cpu_time() const;

 protected:
  FallbackProxy(std::shared_ptr<const Files> files, const std::vector<std::string>& command,
                const std::function<void()>& prepare);

 private:
  std::shared_ptr<const Files> files_;
  Process process_;
};

/// The same for `clusterip run`: the fast path and the userspace engine in one process.
class RunningService : public FallbackProxy {
 public:
  explicit RunningService(const std::shared_ptr<const Files>& files,
                          const std::vector<std::string>& more_arguments = {},
                          const std::function<void()>& prepare = {});
};

}  // namespace support
