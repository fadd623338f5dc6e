// Element types of kernels: their conversions to and from float, and the choice of a template by dtype.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "base/dtype.h"
#include "base/error.h"

namespace flexchat::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(double x) { return static_cast<float>(x); }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
__device__ inline float to_float(f16 x) { return __half2float(x); }

// Round to nearest even; f16 overflows to infinity; NaN stays NaN.
template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline double from_float<double>(float x) {
  return static_cast<double>(x);
}
template <>
__device__ inline bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline f16 from_float<f16>(float x) {
  return __float2half_rn(x);
}

template <class T>
struct Tag {
  using type = T;
};

// f(Tag<T>{}) with the kernels' type of a compute dtype. In the lambda: using T = typename
// decltype(tag)::type. Errors: a dtype that kernels do not compute in.
template <class F>
void for_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(Tag<float>{});
    case DType::bf16:
      return f(Tag<bf16>{});
    case DType::f16:
      return f(Tag<f16>{});
    default:
      fail("the cuda backend has no kernel for {} (it computes in f32, bf16, f16)", dtype_name(dtype));
  }
}

// The same for every dtype that memory may hold and copies convert.
template <class F>
void for_stored_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f64:
      return f(Tag<double>{});
    case DType::f32:
      return f(Tag<float>{});
    case DType::bf16:
      return f(Tag<bf16>{});
    case DType::f16:
      return f(Tag<f16>{});
    case DType::i64:
      return f(Tag<int64_t>{});
    case DType::i32:
      return f(Tag<int32_t>{});
    case DType::u8:
      return f(Tag<uint8_t>{});
    default:
      fail("the cuda backend does not convert {} (allowed: f64, f32, bf16, f16, i64, i32, u8)",
           dtype_name(dtype));
  }
}

}  // namespace flexchat::cuda
