#include "backend/cudnn_library.h"

#include <dlfcn.h>
#include <fmt/core.h>

#include <cstdlib>
#include <exception>

#include "backend/nvrtc.h"

namespace flexchat {
namespace {

constexpr const char* kFile = "libcudnn.so.9";
constexpr const char* kVariable = "FLEXCHAT_CUDNN";

// The version of the headers this was built with, as cuDNN counts: 91900 is 9.19.0. 0: built without.
#ifdef FLEXCHAT_CUDNN
constexpr size_t kBuiltFor = FLEXCHAT_CUDNN;
#else
constexpr size_t kBuiltFor = 0;
#endif

std::string version_text(size_t v) { return fmt::format("{}.{}.{}", v / 10000, v % 10000 / 100, v % 100); }

CudnnLibrary open_library() {
  CudnnLibrary library;
  if (kBuiltFor == 0) {
    library.why =
        "this build has no cuDNN: run scripts/setup.sh --cuda, which installs its headers, then configure "
        "and "
        "build the preset cuda again";
    return library;
  }
  // cuDNN compiles with NVRTC and looks for it by name: one that is open already is found, wherever it lies.
  try {
    Nvrtc::instance();
  } catch (const std::exception&) {  // cuDNN may know of another
  }
  const char* named = std::getenv(kVariable);
  const char* file = named != nullptr && *named != '\0' ? named : kFile;
  void* const handle = ::dlopen(file, RTLD_LAZY | RTLD_LOCAL);
  if (handle == nullptr) {
    library.why = fmt::format(
        "cuDNN does not load ({}): run scripts/setup.sh --cuda, or `pip install nvidia-cudnn-cu13` and name "
        "its {} in {}",
        ::dlerror(), kFile, kVariable);
    return library;
  }
  using Version = size_t();
  auto* const version = reinterpret_cast<Version*>(::dlsym(handle, "cudnnGetVersion"));
  if (version == nullptr) {
    library.why =
        fmt::format("'{}' is not cuDNN: it has no cudnnGetVersion; {} must name {}", file, kVariable, kFile);
    return library;
  }
  library.version = version_text(version());
  Dl_info where{};
  const bool known = ::dladdr(reinterpret_cast<const void*>(version), &where) != 0;
  library.path = known && where.dli_fname != nullptr ? where.dli_fname : file;
  if (version() < kBuiltFor) {
    library.why = fmt::format(
        "'{}' is cuDNN {}, older than the {} that this build needs: run scripts/setup.sh --cuda, or name a "
        "newer {} in {}",
        library.path, library.version, version_text(kBuiltFor), kFile, kVariable);
    return library;
  }
  library.handle = handle;
  return library;
}

}  // namespace

const CudnnLibrary& cudnn_library() {
  static const CudnnLibrary the_library = open_library();
  return the_library;
}

}  // namespace flexchat
