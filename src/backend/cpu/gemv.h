// The product of decoding: few rows against a whole weight matrix.
#pragma once

#include "base/tensor.h"

namespace flexchat {

constexpr int64_t kGemvMaxRows = 4;

// out (M, N) [+]= a (M, K) * b (N, K)^T, M <= kGemvMaxRows; f32, bf16 or f16 operands, f32 accumulation.
void gemv(const Tensor& a, const Tensor& b, bool accumulate, const Tensor& out);

}  // namespace flexchat
