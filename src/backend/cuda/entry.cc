// The two entry points of the library (backend/cuda_loader.h): which devices can be used, and a backend of
// one. Looking at devices creates no context and allocates nothing on them.
#include <cuda_runtime.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "backend/cuda/cuda_backend.h"
#include "backend/cuda_loader.h"
#include "backend/jit_compiler.h"
#include "base/error.h"
#include "base/file.h"
#include "base/strings.h"

namespace flexchat::cuda {
namespace {

// The architectures that the library was compiled for, as the build names them: "80 90a 100".
std::vector<std::string> built_archs() {
  std::vector<std::string> archs;
  for (const char c : std::string_view(" " FLEXCHAT_CUDA_ARCHS)) {
    if (c == ' ') {
      archs.emplace_back("sm_");
    } else {
      archs.back() += c;
    }
  }
  return archs;
}

// The driver's own version ("580.159.03"); "" where the kernel module does not tell.
std::string driver_release() {
  std::string text;
  try {
    text = read_file("/proc/driver/nvidia/version");
  } catch (const std::exception&) {
    return "";
  }
  // "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.03  Tue ...": the first word of digits and dots.
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find_first_of(" \n", begin), text.size());
    const std::string word = text.substr(begin, end - begin);
    if (word.find('.') != std::string::npos && word.find_first_not_of("0123456789.") == std::string::npos) {
      return word;
    }
    begin = end + 1;
  }
  return "";
}

std::string cuda_version(int version) { return fmt::format("{}.{}", version / 1000, version % 1000 / 10); }

// The number of devices; 0 with *why when there is none or no driver that can run this library.
int count_devices(std::string* why) {
  const std::string needed =
      fmt::format("needed: one for CUDA {} (release 580 or newer)", cuda_version(CUDART_VERSION));
  int driver = 0;
  cudaDriverGetVersion(&driver);
  if (driver == 0) {
    *why = fmt::format("no NVIDIA driver (libcuda.so.1 does not load); {}", needed);
    return 0;
  }
  // Within a major version the runtime works with older drivers.
  if (driver / 1000 < CUDART_VERSION / 1000) {
    const std::string release = driver_release();
    *why = fmt::format("the NVIDIA driver{} is for CUDA {}; {}", release.empty() ? "" : " " + release,
                       cuda_version(driver), needed);
    return 0;
  }
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess && count > 0) return count;
  cudaGetLastError();  // clears it
  *why = status == cudaSuccess || status == cudaErrorNoDevice
             ? std::string("the NVIDIA driver finds no device (is CUDA_VISIBLE_DEVICES set to hide it?)")
             : fmt::format("the NVIDIA driver fails: CUDA error {} ({})", cudaGetErrorName(status),
                           cudaGetErrorString(status));
  return 0;
}

struct Device {
  std::string line;  // as in cuda_devices()
  std::string why;   // why it cannot be used; "" if it can
};

Device look_at(int ordinal) {
  cudaDeviceProp p{};
  const cudaError_t status = cudaGetDeviceProperties(&p, ordinal);
  if (status != cudaSuccess) {
    cudaGetLastError();
    return {fmt::format("device {}", ordinal),
            fmt::format("device {} does not answer: CUDA error {} ({})", ordinal, cudaGetErrorName(status),
                        cudaGetErrorString(status))};
  }
  const std::string release = driver_release();
  Device device;
  device.line = fmt::format("{}, sm_{}{}, {} SMs, {}, driver {}, CUDA {}", p.name, p.major, p.minor,
                            p.multiProcessorCount, format_bytes(static_cast<double>(p.totalGlobalMem)),
                            release.empty() ? "unknown" : release, cuda_version(CUDART_VERSION));
  const std::vector<std::string> archs = built_archs();
  if (std::none_of(archs.begin(), archs.end(),
                   [&](const std::string& arch) { return arch_runs_on(arch, p.major, p.minor); })) {
    device.why = fmt::format(
        "device {} ({}) is sm_{}{}, for which the CUDA library was not built; built for: {} (sm_80 and later "
        "can "
        "be added with -DFLEXCHAT_CUDA_ARCHS)",
        ordinal, p.name, p.major, p.minor, join(archs));
  }
  return device;
}

int probe(std::string* text) {
  const int count = count_devices(text);
  std::vector<std::string> lines, reasons;
  for (int ordinal = 0; ordinal < count; ++ordinal) {
    const Device device = look_at(ordinal);
    lines.push_back(device.line +
                    (device.why.empty() ? "" : " (cannot be used: the library was not built for it)"));
    if (!device.why.empty()) reasons.push_back(device.why);
  }
  const int usable = count - static_cast<int>(reasons.size());
  if (count > 0) *text = usable > 0 ? join(lines, "\n") : join(reasons, "; ");
  return usable;
}

Backend* make(int ordinal) {
  std::string why;
  const int count = count_devices(&why);
  check(count > 0, "no CUDA device can be used: {}", why);
  check(0 <= ordinal && ordinal < count, "there is no device cuda:{}; allowed: cuda:0 to cuda:{}", ordinal,
        count - 1);
  const Device device = look_at(ordinal);
  check(device.why.empty(), "{}", device.why);
  return std::make_unique<CudaBackend>(ordinal).release();
}

}  // namespace
}  // namespace flexchat::cuda

extern "C" int flexchat_cuda_probe(char* text, size_t size) {
  std::string line;
  int usable = 0;
  try {
    usable = flexchat::cuda::probe(&line);
  } catch (const std::exception& e) {
    line = e.what();
  }
  if (size > 0) text[line.copy(text, size - 1)] = '\0';
  return usable;
}

extern "C" flexchat::Backend* flexchat_cuda_make(int ordinal) { return flexchat::cuda::make(ordinal); }

// The loader calls them by these types.
static_assert(std::is_same_v<decltype(flexchat_cuda_probe), flexchat::CudaProbe>);
static_assert(std::is_same_v<decltype(flexchat_cuda_make), flexchat::CudaMake>);
