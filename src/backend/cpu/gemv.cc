// out (M, N) = a (M, K) * b (N, K)^T [+ out] for the few rows of decoding (M <= kGemvMaxRows): bound by
// reading b once, so rows of b are streamed and every row of a meets them in L1.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/gemv.cc"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include <type_traits>

#include "backend/cpu/dispatch.h"
#include "backend/cpu/gemv.h"
#include "backend/cpu/simd-inl.h"
#include "base/parallel.h"

HWY_BEFORE_NAMESPACE();
namespace flexchat::HWY_NAMESPACE {

template <class A, class B, class C>
void gemv_columns(const A* a, const B* b, C* out, int64_t m, int64_t n, int64_t k, bool accumulate,
                  int64_t begin, int64_t end) {
  float values[4];
  const auto put = [&](int64_t row, int64_t column, float value) {
    C& target = out[row * n + column];
    if constexpr (std::is_same_v<C, float>) {
      target = value + (accumulate ? target : 0.0f);
    } else if constexpr (std::is_same_v<C, bf16_t>) {
      target = to_bf16(value + (accumulate ? to_float(target) : 0.0f));
    } else {
      target = to_f16(value + (accumulate ? to_float(target) : 0.0f));
    }
  };
  int64_t j = begin;
  for (; j + 4 <= end; j += 4) {
    for (int64_t i = 0; i < m; ++i) {
      four_dots(a + i * k, b + j * k, k, k, values);
      for (int r = 0; r < 4; ++r) put(i, j + r, values[r]);
    }
  }
  for (; j < end; ++j) {
    for (int64_t i = 0; i < m; ++i) put(i, j, dot(a + i * k, b + j * k, k));
  }
}

void Gemv(const Tensor& a, const Tensor& b, bool accumulate, const Tensor& out) {
  const int64_t m = a.dim(0), k = a.dim(1), n = b.dim(0);
  const int64_t grain =
      std::max<int64_t>(16, (1 << 15) / k / 4 * 4);  // below ~32k products a thread costs more
  with_float_type(a.dtype(), [&](auto* type_a) {
    using A = std::remove_pointer_t<decltype(type_a)>;
    with_float_type(b.dtype(), [&](auto* type_b) {
      using B = std::remove_pointer_t<decltype(type_b)>;
      with_float_type(out.dtype(), [&](auto* type_c) {
        using C = std::remove_pointer_t<decltype(type_c)>;
        parallel_for(n, grain, [&](int64_t begin, int64_t end) {
          gemv_columns(a.as<A>(), b.as<B>(), out.as<C>(), m, n, k, accumulate, begin, end);
        });
      });
    });
  });
}

}  // namespace flexchat::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace flexchat {

HWY_EXPORT(Gemv);
void gemv(const Tensor& a, const Tensor& b, bool accumulate, const Tensor& out) {
  HWY_DYNAMIC_DISPATCH(Gemv)(a, b, accumulate, out);
}

}  // namespace flexchat
#endif  // HWY_ONCE
