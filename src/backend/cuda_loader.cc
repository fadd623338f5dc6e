#include "backend/cuda_loader.h"

#include <dlfcn.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <string_view>
#include <system_error>

#include "base/error.h"

namespace flexchat {
namespace {

namespace fs = std::filesystem;
constexpr const char* kFile = "libflexchat_cuda.so";
constexpr const char* kVariable = "FLEXCHAT_CUDA_LIBRARY";

// What dlopen said about `path`, and what helps.
std::string load_failure(const fs::path& path, const std::string& reason) {
  std::string line = fmt::format("the CUDA library does not load: {}", reason);
  if (reason.find("undefined symbol") != std::string::npos) {
    line += fmt::format(" ({} is not of this build: build both together)", path.string());
  } else if (reason.find("cannot open shared object file") != std::string::npos &&
             reason.find(path.filename().string()) == std::string::npos) {
    line +=
        " (scripts/setup.sh --cuda installs the CUDA libraries; or put their folder into LD_LIBRARY_PATH)";
  }
  return line;
}

fs::path library_path() {
  const char* named = std::getenv(kVariable);
  if (named != nullptr && *named != '\0') return named;
  std::error_code error;
  return fs::read_symlink("/proc/self/exe", error).parent_path() / kFile;
}

std::atomic<bool> opened = false;

const CudaLibrary& library() {
  static const CudaLibrary the_library(library_path());
  opened = true;
  return the_library;
}

}  // namespace

CudaLibrary::CudaLibrary(const fs::path& path) {
  std::error_code error;
  if (!fs::exists(path, error)) {
    why_ = fmt::format(
        "there is no CUDA library '{}': build the preset cuda, or name the library in the environment "
        "variable "
        "{}",
        path.string(), kVariable);
    return;
  }
  // With a slash in its name dlopen looks nowhere else.
  void* const handle = ::dlopen(fs::absolute(path, error).c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    why_ = load_failure(path, ::dlerror());
    return;
  }
  const auto probe = reinterpret_cast<CudaProbe*>(::dlsym(handle, "flexchat_cuda_probe"));
  make_ = reinterpret_cast<CudaMake*>(::dlsym(handle, "flexchat_cuda_make"));
  if (probe == nullptr || make_ == nullptr) {
    why_ = fmt::format(
        "'{}' is not the CUDA library of flexchat: it has no flexchat_cuda_probe and flexchat_cuda_make",
        path.string());
    return;
  }
  std::array<char, 4096> text{};
  (probe(text.data(), text.size()) > 0 ? devices_ : why_) = text.data();
}

std::unique_ptr<Backend> CudaLibrary::make(int ordinal) const {
  if (!why_.empty()) fail("no CUDA device can be used: {}", why_);
  return std::unique_ptr<Backend>(make_(ordinal));
}

bool cuda_available(std::string* why) {
  if (why != nullptr) *why = library().why();
  return library().why().empty();
}

bool cuda_opened() { return opened; }

std::unique_ptr<Backend> make_cuda_backend(int ordinal) { return library().make(ordinal); }

std::string cuda_devices() { return library().devices(); }

}  // namespace flexchat
