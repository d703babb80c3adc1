// SPDX-License-Identifier: BSD-2-Clause
#include "tests/support/observe.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <thread>

namespace support {

std::size_t open_files() {
  std::filesystem::directory_iterator files("/proc/self/fd");
  return static_cast<std::size_t>(std::distance(begin(files), end(files)));
}

std::size_t resident_bytes() {
  std::ifstream statm("/proc/self/statm");
  std::size_t size = 0;
  std::size_t resident = 0;
  statm >> size >> resident;
  return resident * static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
}

bool is_mapped(std::string_view name) { return read_text("/proc/self/maps").find(name) != std::string::npos; }

bool has_children() {
  siginfo_t info{};
  return ::waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) == 0 || errno != ECHILD;
}

std::string read_text(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

bool eventually(const std::function<bool()>& condition, std::chrono::seconds bound) {
  const auto deadline = std::chrono::steady_clock::now() + bound;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

StderrCapture::StderrCapture()
    : saved_(checked(::fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, 3), "dup of stderr")),
      file_(checked(::memfd_create("stderr", MFD_CLOEXEC), "memfd_create")) {
  checked(::dup2(file_.get(), STDERR_FILENO), "dup2");
}

StderrCapture::~StderrCapture() {
  std::fflush(stderr);
  ::dup2(saved_.get(), STDERR_FILENO);
}

std::string StderrCapture::text() const {
  std::fflush(stderr);
  std::string result;
  char buffer[4096];
  for (;;) {
    const ssize_t size = ::pread(file_.get(), buffer, sizeof buffer, static_cast<off_t>(result.size()));
    if (size <= 0) return result;
    result.append(buffer, static_cast<std::size_t>(size));
  }
}

TemporaryDirectory::TemporaryDirectory() : path_(std::filesystem::temp_directory_path() / "clusterip-test-XXXXXX") {
  if (::mkdtemp(path_.data()) == nullptr) throw std::system_error(errno, std::generic_category(), path_);
}

TemporaryDirectory::~TemporaryDirectory() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

std::string TemporaryDirectory::write(const std::string& name, std::string_view text) const {
  const std::string path = path_ + "/" + name;
  std::ofstream(path, std::ios::binary) << text;
  return path;
}

}  // namespace support
