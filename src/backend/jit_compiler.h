// From CUDA source to a cubin, at most once: what was compiled ahead of time is in the library, what was
// compiled before is on disk, and only the rest goes to NVRTC.
//
// Files of the cache are kernels/<key>.cubin in $FLEXCHAT_CACHE, else $XDG_CACHE_HOME/flexchat, else
// ~/.cache/flexchat. The key covers the source, the headers it includes, options, architecture and NVRTC's
// version; the file carries sizes and checksums of source and cubin, and one that does not match is compiled
// anew. Files are written whole or not at all, so that any number of processes and threads may share the
// folder. A folder that cannot be written costs recompilation in the next process and nothing else.
#pragma once

#include <cstdint>
#include <filesystem>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "backend/nvrtc.h"

namespace flexchat {

// A translation unit in C++17. Its kernels are extern "C"; it includes nothing but `headers`; functions
// without annotation run on the device.
struct JitSource {
  std::string name;  // for messages and file names: "attention_forward"
  std::string text;
  std::span<const JitHeader> headers{};  // those that are not included, even through others, do not count
  std::vector<std::string> options{};    // further options of the compiler: "-DHEAD_DIM=64"
};

// 128 bits, in hexadecimal, of everything that decides what `source` compiles to for `arch`, but the
// compiler.
std::string jit_key(const JitSource& source, std::string_view arch);

// The text with its headers in place of their includes, for a person to read and compile.
std::string expand_includes(const JitSource& source);

// A cubin that the build put into the library.
struct EmbeddedCubin {
  std::string_view key;   // jit_key(source, arch)
  std::string_view arch;  // "sm_90a"
  std::string_view mod;   // what it is for, in messages: "softcap"
  std::string_view cubin;
};

// The architecture to compile for: "sm_80", and "sm_90a" with all of Hopper.
std::string jit_arch(int major, int minor);
// Does code for `arch` run on compute capability major.minor? Plain code runs on later minors of its major
// as well, code with an "a" on that one alone.
bool arch_runs_on(std::string_view arch, int major, int minor);

// Where kernels came from.
struct JitCounters {
  int64_t compiles = 0, disk_hits = 0, embedded_hits = 0, memory_hits = 0;
};
// Since the program started, all devices together.
JitCounters jit_counters();
// Returns when nothing is being compiled ahead (JitCompiler::compile_ahead).
void wait_for_jit();

class JitCompiler {
 public:
  // For devices of one compute capability. `embedded` must outlive the compiler.
  JitCompiler(int major, int minor, std::span<const EmbeddedCubin> embedded = {},
              std::filesystem::path cache = cache_folder());
  // For exactly this architecture ("sm_80"), as the build does.
  JitCompiler(std::string arch, std::filesystem::path cache);
  ~JitCompiler();
  JitCompiler(const JitCompiler&) = delete;
  JitCompiler& operator=(const JitCompiler&) = delete;

  // Where the environment puts the cache; empty when it names no place.
  static std::filesystem::path cache_folder();

  // The cubin of `source`, the same string every time. Thread-safe; different sources compile side by side.
  // Errors: NVRTC is missing (the line names the mods that work without it); a source that does not compile
  // (the log's first error, and where the source was written).
  const std::string& cubin(const JitSource& source);

  // For a source that is likely to be asked for soon: if its cubin is known, true. If not it is being
  // compiled from now on, beside whatever else happens, and cubin() waits for it; it is counted as compiled
  // at once. What keeps it from being compiled, cubin() says.
  bool compile_ahead(const JitSource& source);

  // What a user of cubins that keeps them itself reports, so that the counters stay whole.
  static void count_memory_hit();
  const std::string& arch() const { return arch_; }

 private:
  struct Entry {
    std::mutex mutex;
    bool ready = false;
    std::string cubin;
    std::future<std::string> ahead;  // compile_ahead
  };

  Entry& entry(const JitSource& source);
  const EmbeddedCubin* find_embedded(const JitSource& source) const;
  // Compiled ahead of time, or on disk. Errors: NVRTC is missing and would be needed.
  std::optional<std::string> find(const JitSource& source) const;
  std::string disk_key(const JitSource& source) const;  // Error: NVRTC is missing
  std::filesystem::path disk_path(const std::string& key) const;
  std::string compile(const JitSource& source) const;
  std::string without_nvrtc(const char* reason) const;

  const int major_ = 0, minor_ = 0;
  const std::string arch_;
  const std::span<const EmbeddedCubin> embedded_;
  const std::filesystem::path cache_;
  std::mutex mutex_;  // of entries_
  std::map<std::string, std::unique_ptr<Entry>> entries_;
};

}  // namespace flexchat
