// SPDX-License-Identifier: BSD-2-Clause
//
// What a test observes about its own process.
#pragma once

#include <chrono>
#include <cstddef>
#include <functional>
#include <string>
#include <string_view>

#include "tests/support/fd.h"

namespace support {

std::size_t open_files();

/// Bytes of this process in memory.
std::size_t resident_bytes();

/// Whether a file whose name contains `name` is mapped into this process.
bool is_mapped(std::string_view name);

/// Whether this process has children, zombies included.
bool has_children();

std::string read_text(const std::string& path);

/// The kernel frees some things later and tells nobody when: ask until it is true, or give up after `bound`.
bool eventually(const std::function<bool()>& condition, std::chrono::seconds bound = std::chrono::seconds(10));

/// Collects what this process, and children that it forks, write to stderr.
class StderrCapture {
 public:
  StderrCapture();
  ~StderrCapture();
  StderrCapture(const StderrCapture&) = delete;
  StderrCapture& operator=(const StderrCapture&) = delete;

  std::string text() const;

 private:
  Fd saved_;
  Fd file_;
};

/// A directory for the test's files.
class TemporaryDirectory {
 public:
  TemporaryDirectory();
  ~TemporaryDirectory();
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;

  const std::string& path() const { return path_; }

  /// Write a file; returns its path.
  std::string write(const std::string& name, std::string_view text) const;

 private:
  std::string path_;
};

}  // namespace support
