// From a run-time dtype to a typed pointer.
#pragma once

#include <utility>

#include "base/error.h"
#include "base/tensor.h"

namespace flexchat {

// fn(const T*) style dispatch: calls fn with a null pointer of the element type of `dtype`.
template <class Fn>
void with_float_type(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::f32:
      return fn(static_cast<float*>(nullptr));
    case DType::bf16:
      return fn(static_cast<bf16_t*>(nullptr));
    case DType::f16:
      return fn(static_cast<f16_t*>(nullptr));
    default:
      fail("the cpu backend has no kernel for {} (it computes in f32, bf16, f16)", dtype_name(dtype));
  }
}

}  // namespace flexchat
