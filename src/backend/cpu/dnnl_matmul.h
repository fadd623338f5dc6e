// oneDNN matrix products behind a small interface that hides its 2.x / 3.x differences.
#pragma once

#include "backend/backend.h"

namespace flexchat {

// One row-major operand: element (i, j) at data[i * stride + j].
struct Matrix {
  const void* data;
  DType dtype;
  int64_t stride;
};

// out (m, n) = alpha * op(a) op(b) + beta * out in f32 (oneDNN sgemm). Safe inside a parallel region, where
// it runs on the calling thread.
void sgemm(Trans trans_a, Trans trans_b, int64_t m, int64_t n, int64_t k, float alpha, const float* a,
           int64_t stride_a, const float* b, int64_t stride_b, float beta, float* out, int64_t stride_out);

// bf16 x bf16 -> f32 or bf16 with f32 accumulation; returns false when this CPU has no such kernel.
bool bf16_matmul(Trans trans_a, Trans trans_b, int64_t m, int64_t n, int64_t k, const void* a, const void* b,
                 bool accumulate, void* out, DType out_dtype);

// Whether bf16 products run natively here.
bool bf16_matmul_supported();

}  // namespace flexchat
