// What a result depends on besides its options: command, source revision, build, machine, libraries.
// Capturing never fails: what cannot be found out is "unknown" or null.
#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "base/options.h"

namespace flexchat {

// {"command", "program", "directory", "date", "version", "commit", "dirty", "build", "compiler", "cpu":
// {"name", "cores",
//  "features"}, "memory": {"total_bytes", "available_bytes", "limit_bytes"}, "os", "kernel", "libraries":
//  {name: version}, "devices": [{"device", "name", ...}]}
// `accelerators` are appended to "devices", which starts with the CPU.
Json capture_environment(const std::vector<Json>& accelerators);
Json capture_environment();

// The words this process was started with, quoted so that a POSIX shell reads back the same words.
std::string command_line();
std::string shell_quote(const std::string& word);

std::string program_version();  // "0.1.0"
std::string build_flags();      // compiler, build type, optimisation flags, sanitizer
std::string compiler_name();    // "GCC 12.2.0"
std::string utc_time();         // "2025-01-31T12:00:00Z"

struct CpuInfo {
  std::string name;
  int64_t cores = 1;                  // that this process may run on
  std::vector<std::string> features;  // SIMD extensions the kernels can profit from, as the kernel names them
};
CpuInfo cpu_info();

struct MemoryInfo {
  int64_t total = 0, available = 0;  // bytes; 0 = unknown
  std::optional<int64_t> limit;      // bytes, of the control group this process is in
};
MemoryInfo memory_info();

struct GitState {
  std::string commit = "unknown";  // full hash
  std::optional<bool> dirty;       // tracked or untracked changes; nothing = unknown
};
// Asks `git` about the repository whose root is `root`. Runs no shell.
GitState git_state(const std::filesystem::path& root);

// The source tree that holds the running program, or "" when it was installed elsewhere.
std::filesystem::path source_root();

struct OneDnn {
  std::string version;  // "2.6.3"
  std::string isa;      // "avx512_core_amx": the highest instruction set it will use here
};
OneDnn onednn_info();

// Instruction set that Highway's dispatch picks here ("AVX3_SPR").
std::string highway_target();

}  // namespace flexchat
