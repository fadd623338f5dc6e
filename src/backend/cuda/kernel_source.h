// The text of the kernels that NVRTC compiles at run time: every file of backend/cuda/kernels, embedded by
// the build (cmake/embed_kernels.cmake), so that the library needs no source tree.
#pragma once

#include <iterator>
#include <span>
#include <string_view>

namespace flexchat::cuda {

struct KernelSource {
  std::string_view name;  // the file's, without folder: "attention.cuh"
  std::string_view text;
};

// All of them, sorted by name: what NVRTC may be given as headers.
std::span<const KernelSource> kernel_sources();

// One by name. Throws Error listing the names when there is none.
std::string_view kernel_source(std::string_view name);

}  // namespace flexchat::cuda
