// NVRTC, NVIDIA's run-time compiler, opened when it is first needed. It works on machines without a GPU. Its
// few functions are declared here by hand, so that the program builds without CUDA's headers.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace flexchat {

// A text that sources include by name.
struct JitHeader {
  std::string_view name;  // "mod_math.cuh"
  std::string_view text;
};

struct NvrtcResult {
  bool ok = false;
  std::string cubin;
  std::string log;
};

class Nvrtc {
 public:
  // The library that FLEXCHAT_NVRTC names; else one in .deps/python beside the program or above it (where
  // scripts/setup.sh puts it), on the loader's path, or in /usr/local/cuda. Opened once. Errors: none of them
  // loads; the line says what was tried and how to get it.
  static const Nvrtc& instance();

  // Opens exactly this library. Errors: it does not load, or is not NVRTC.
  explicit Nvrtc(const std::string& path);

  const std::string& version() const { return version_; }  // "13.0"
  const std::string& path() const { return path_; }

  // `name` is what messages call the source. Thread-safe. Errors: a failure that is not the source's.
  NvrtcResult compile(const std::string& text, const std::string& name, std::span<const JitHeader> headers,
                      const std::vector<std::string>& options) const;

 private:
  struct Functions;
  std::shared_ptr<const Functions> functions_;
  std::string path_, version_;
};

}  // namespace flexchat
