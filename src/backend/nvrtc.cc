#include "backend/nvrtc.h"

#include <dlfcn.h>

#include <cstdlib>
#include <filesystem>
#include <system_error>

#include "base/error.h"
#include "base/strings.h"

namespace flexchat {
namespace {

namespace fs = std::filesystem;

// The part of nvrtc.h that is used; its types and values are fixed by NVRTC's ABI.
using Program = struct OpaqueProgram*;
using Status = int;
constexpr Status success = 0, compilation_failed = 6;

// Files under a folder that pip fills: the layout of CUDA 13 wheels, then that of CUDA 12.
void add_wheels(const fs::path& folder, std::vector<std::string>& candidates) {
  for (const char* file : {"nvidia/cu13/lib/libnvrtc.so.13", "nvidia/cuda_nvrtc/lib/libnvrtc.so.12"}) {
    std::error_code ignored;
    if (fs::exists(folder / file, ignored)) candidates.push_back((folder / file).string());
  }
}

std::vector<std::string> nvrtc_candidates() {
  std::error_code error;
  std::vector<std::string> candidates;
  fs::path folder = fs::read_symlink("/proc/self/exe", error).parent_path();
  for (int up = 0; up < 3 && !folder.empty(); ++up, folder = folder.parent_path()) {
    add_wheels(folder / ".deps/python", candidates);
  }
  for (const char* name : {"libnvrtc.so.13", "libnvrtc.so.12"}) candidates.emplace_back(name);
  for (const char* lib : {"lib64", "lib"}) {
    candidates.push_back(fmt::format("/usr/local/cuda/{}/libnvrtc.so", lib));
  }
  return candidates;
}

std::string find_nvrtc() {
  const char* named = std::getenv("FLEXCHAT_NVRTC");
  if (named != nullptr && *named != '\0') return named;
  for (const std::string& path : nvrtc_candidates()) {
    // Stays open: what is returned is opened again at once.
    if (::dlopen(path.c_str(), RTLD_LAZY | RTLD_LOCAL) != nullptr) return path;
  }
  fail(
      "NVRTC, the run-time compiler, is neither in .deps/python, nor on the loader's path, nor in "
      "/usr/local/cuda: run scripts/setup.sh --cuda, or `pip install nvidia-cuda-nvrtc`, or install the CUDA "
      "toolkit, and name the library in FLEXCHAT_NVRTC if it lies elsewhere");
}

// NVRTC opens its second library by name only, and so finds it in the loader's places but not beside itself,
// where wheels have it. Opened here it is found by its name. What is wrong with it, NVRTC says.
void open_builtins(const void* nvrtc_function, const std::string& version) {
  Dl_info library;
  if (::dladdr(nvrtc_function, &library) == 0 || library.dli_fname == nullptr) return;
  const fs::path folder = fs::path(library.dli_fname).parent_path();
  ::dlopen((folder / ("libnvrtc-builtins.so." + version)).c_str(), RTLD_LAZY | RTLD_LOCAL);
}

}  // namespace

struct Nvrtc::Functions {
  const char* (*nvrtcGetErrorString)(Status);
  Status (*nvrtcVersion)(int*, int*);
  Status (*nvrtcCreateProgram)(Program*, const char*, const char*, int, const char* const*,
                               const char* const*);
  Status (*nvrtcDestroyProgram)(Program*);
  Status (*nvrtcCompileProgram)(Program, int, const char* const*);
  Status (*nvrtcGetCUBINSize)(Program, size_t*);
  Status (*nvrtcGetCUBIN)(Program, char*);
  Status (*nvrtcGetProgramLogSize)(Program, size_t*);
  Status (*nvrtcGetProgramLog)(Program, char*);

  void check_status(Status status, const char* what) const {
    if (status != success) fail_run("NVRTC: {}: {}", what, nvrtcGetErrorString(status));
  }
};

const Nvrtc& Nvrtc::instance() {
  static const Nvrtc the_library(find_nvrtc());
  return the_library;
}

Nvrtc::Nvrtc(const std::string& path) : path_(path) {
  void* const handle = ::dlopen(path.c_str(), RTLD_LAZY | RTLD_LOCAL);
  check(handle != nullptr, "NVRTC does not load: {}; FLEXCHAT_NVRTC must name libnvrtc.so", ::dlerror());
  Functions f{};
  const auto load = [&](auto& function, const char* name) {
    void* const address = ::dlsym(handle, name);
    check(address != nullptr, "'{}' is not NVRTC: it has no {}", path, name);
    function = reinterpret_cast<std::decay_t<decltype(function)>>(address);
  };
  load(f.nvrtcGetErrorString, "nvrtcGetErrorString");
  load(f.nvrtcVersion, "nvrtcVersion");
  load(f.nvrtcCreateProgram, "nvrtcCreateProgram");
  load(f.nvrtcDestroyProgram, "nvrtcDestroyProgram");
  load(f.nvrtcCompileProgram, "nvrtcCompileProgram");
  load(f.nvrtcGetCUBINSize, "nvrtcGetCUBINSize");
  load(f.nvrtcGetCUBIN, "nvrtcGetCUBIN");
  load(f.nvrtcGetProgramLogSize, "nvrtcGetProgramLogSize");
  load(f.nvrtcGetProgramLog, "nvrtcGetProgramLog");
  int major = 0, minor = 0;
  f.check_status(f.nvrtcVersion(&major, &minor), "version");
  version_ = fmt::format("{}.{}", major, minor);
  open_builtins(reinterpret_cast<const void*>(f.nvrtcVersion), version_);
  functions_ = std::make_shared<const Functions>(f);
}

NvrtcResult Nvrtc::compile(const std::string& text, const std::string& name,
                           std::span<const JitHeader> headers,
                           const std::vector<std::string>& options) const {
  const Functions& f = *functions_;
  // NVRTC wants terminated strings.
  std::vector<std::string> owned;
  owned.reserve(2 * headers.size());
  std::vector<const char*> names, texts, flags;
  for (const JitHeader& header : headers) {
    names.push_back(owned.emplace_back(header.name).c_str());
    texts.push_back(owned.emplace_back(header.text).c_str());
  }
  for (const std::string& option : options) flags.push_back(option.c_str());

  Program program = nullptr;
  f.check_status(f.nvrtcCreateProgram(&program, text.c_str(), name.c_str(), static_cast<int>(names.size()),
                                      texts.data(), names.data()),
                 "create program");
  const auto destroy = [&f](Program p) { f.nvrtcDestroyProgram(&p); };
  const std::unique_ptr<std::remove_pointer_t<Program>, decltype(destroy)> owner(program, destroy);

  NvrtcResult result;
  const Status status = f.nvrtcCompileProgram(program, static_cast<int>(flags.size()), flags.data());
  size_t size = 0;
  if (f.nvrtcGetProgramLogSize(program, &size) == success && size > 1) {
    result.log.resize(size);
    f.nvrtcGetProgramLog(program, result.log.data());
    result.log.resize(size - 1);  // without the terminator
  }
  if (status != success && status != compilation_failed && result.log.empty()) {
    f.check_status(status, name.c_str());
  }
  if (status != success) return result;
  f.check_status(f.nvrtcGetCUBINSize(program, &size), "cubin size");
  result.cubin.resize(size);
  f.check_status(f.nvrtcGetCUBIN(program, result.cubin.data()), "cubin");
  result.ok = true;
  return result;
}

}  // namespace flexchat
