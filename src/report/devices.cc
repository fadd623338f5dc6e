#include "report/devices.h"

#include <fmt/core.h>

#include <dnnl.hpp>
#include <nlohmann/json.hpp>
#include <sstream>

#include "backend/cuda_loader.h"
#include "backend/cudnn_library.h"
#include "backend/nvrtc.h"
#include "report/environment.h"

namespace flexchat {
namespace {

// The implementation oneDNN picks for a product of two `type` matrices into f32 ("brg:avx512_core_bf16"); ""
// if it has none on this processor.
std::string matmul_implementation(dnnl::memory::data_type type) {
  try {
    const dnnl::engine cpu(dnnl::engine::kind::cpu, 0);
    const auto matrix = [](dnnl::memory::data_type t) {
      return dnnl::memory::desc({256, 256}, t, dnnl::memory::format_tag::ab);
    };
    const auto a = matrix(type), b = matrix(type), c = matrix(dnnl::memory::data_type::f32);
#if DNNL_VERSION_MAJOR >= 3
    const dnnl::matmul::primitive_desc product(cpu, a, b, c);
#else
    const dnnl::matmul::primitive_desc product(dnnl::matmul::desc(a, b, c), cpu);
#endif
    return product.impl_info_str();
  } catch (const dnnl::error&) {
    return "";
  }
}

KernelRow product_row(const char* dtype, dnnl::memory::data_type type, const char* needs) {
  const std::string implementation = matmul_implementation(type);
  const std::string library = "oneDNN " + onednn_info().version;
  const bool runs = !implementation.empty();
  return {
      "cpu", "matrix products",
      dtype, needs,
      runs,  runs ? library + ", " + implementation : library + " has no implementation for this processor"};
}

}  // namespace

std::vector<KernelRow> kernel_table() {
  std::vector<KernelRow> rows;
  rows.push_back(product_row("f32", dnnl::memory::data_type::f32, "any processor"));
  rows.push_back(
      product_row("bf16", dnnl::memory::data_type::bf16, "avx512_core; fast with avx512_bf16 or amx_bf16"));
  rows.push_back(
      {"cpu", "matrix products", "f16", "any processor", rows[0].runs, "converted to f32, then as f32"});
  rows.push_back({"cpu", "element-wise, reductions", "f32, bf16, f16", "any processor", true,
                  "Highway " + highway_target()});
  rows.push_back({"reference", "every op", "f64", "any processor", true, "plain C++ in double precision"});
  const bool cuda = cuda_available();
  rows.push_back({"cuda", "every op", "f32, bf16, f16", "an NVIDIA GPU, sm_80 or later", cuda,
                  cuda ? "cuBLASLt, own kernels" : "no usable device"});
  return rows;
}

bool runs_here(const AttentionSupport& support) {
  if (support.device != "cuda") return true;
  return cuda_available() && (support.kernel != "cudnn" || cudnn_library().handle != nullptr);
}

std::string cudnn_line() {
  const CudnnLibrary& library = cudnn_library();
  return library.handle != nullptr ? fmt::format("{}, {}", library.version, library.path) : library.why;
}

RuntimeCompiler runtime_compiler() {
  try {
    const Nvrtc& nvrtc = Nvrtc::instance();
    return {true, fmt::format("any mask and score mod: NVRTC {}, {}", nvrtc.version(), nvrtc.path())};
  } catch (const std::exception& e) {
    return {false, fmt::format("only masks and score mods compiled ahead of time (plain, causal, document, "
                               "ALiBi): {}",
                               e.what())};
  }
}

std::vector<Json> cuda_accelerators() {
  std::vector<Json> devices;
  std::istringstream lines(cuda_devices());
  for (std::string line; std::getline(lines, line);) {
    devices.push_back(Json{{"device", "cuda:" + std::to_string(devices.size())},
                           {"name", line.substr(0, line.find(", sm_"))},
                           {"description", line}});
  }
  return devices;
}

}  // namespace flexchat
