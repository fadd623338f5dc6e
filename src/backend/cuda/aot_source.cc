#include "backend/cuda/aot_source.h"

#include <vector>

#include "backend/cuda/kernel_source.h"
#include "base/error.h"

namespace flexchat::cuda {

std::span<const JitHeader> kernel_headers() {
  static const auto* const headers = [] {
    auto* const all = new std::vector<JitHeader>;
    for (const KernelSource& source : kernel_sources()) all->push_back({source.name, source.text});
    return all;
  }();
  return *headers;
}

JitSource attention_source(const AttentionKernel& kernel, const flex::EmittedMod& mod) {
  const DType dtype = kernel.dtype;
  check(dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::f16,
        "attention kernels take f32, bf16 or f16, not {}", dtype_name(dtype));
  JitSource source;
  source.name = fmt::format("attention_{}", kernel.pass);
  source.text = fmt::format(
      "#define ATTENTION_DTYPE {}\n#define ATTENTION_HEAD_DIM {}\n#define ATTENTION_PAGED {}\n"
      "#define ATTENTION_DROPOUT {}\n#include \"attention_params.cuh\"\n#include \"mod_math.cuh\"\n\n"
      "{}\n#include \"attention_{}.cuh\"\n",
      dtype == DType::f32    ? 0
      : dtype == DType::bf16 ? 1
                             : 2,
      kernel.head_dim, kernel.paged ? 1 : 0, kernel.dropout ? 1 : 0, mod.text, kernel.pass);
  source.headers = kernel_headers();
  return source;
}

}  // namespace flexchat::cuda
