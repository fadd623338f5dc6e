// The translation units of attention kernels, as kernels/mod_contract.cuh lays them out. The same function
// serves the ahead-of-time build and Jit, so that both ask for the same text.
#pragma once

#include <string_view>

#include "backend/jit_compiler.h"
#include "base/dtype.h"
#include "flex/emit.h"

namespace flexchat::cuda {

// What is compiled in besides the mod; everything else is data of the launch.
struct AttentionKernel {
  std::string_view pass;  // of kernels/attention_<pass>.cuh: "forward"
  DType dtype;            // f32, bf16 or f16
  int64_t head_dim;
  bool paged = false, dropout = false;
};

JitSource attention_source(const AttentionKernel& kernel, const flex::EmittedMod& mod);

// Every embedded kernel source (kernel_source.h), as headers.
std::span<const JitHeader> kernel_headers();

}  // namespace flexchat::cuda
