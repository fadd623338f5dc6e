// Softcap and softmax cross-entropy over rows of logits. A row is read twice (sum, then gradient) and written
// once; about 40 FLOPs an element, most of them in tanh and exp.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/loss.cc"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/dispatch.h"
#include "backend/cpu/simd-inl.h"
#include "base/parallel.h"

HWY_BEFORE_NAMESPACE();
namespace flexchat::HWY_NAMESPACE {

// tanh through one exponential: sign(x) * (1 - 2/(e^{2|x|} + 1)); a short odd series near 0, where the
// subtraction would lose bits. Maximum error about 2 ulp.
HWY_INLINE VF fast_tanh(VF x) {
  const VF a = hn::Abs(x), x2 = hn::Mul(x, x);
  const VF e = hn::Exp(F32(), hn::Min(hn::Add(a, a), set(40)));
  const VF large = hn::CopySign(hn::Sub(set(1), hn::Div(set(2), hn::Add(e, set(1)))), x);
  VF p = set(-1382.0f / 155925);
  p = hn::MulAdd(p, x2, set(62.0f / 2835));
  p = hn::MulAdd(p, x2, set(-17.0f / 315));
  p = hn::MulAdd(p, x2, set(2.0f / 15));
  p = hn::MulAdd(p, x2, set(-1.0f / 3));
  const VF small = hn::MulAdd(hn::Mul(p, x2), x, x);
  return hn::IfThenElse(hn::Ge(a, set(0.35f)), large, small);  // this way round, a NaN stays one
}

void softcap_row(float* z, float cap, int64_t n) {
  const VF c = set(cap), inverse = set(1 / cap);
  for_each_vector(n, [&](int64_t i, auto lanes) HWY_ATTR {
    store(hn::Mul(c, fast_tanh(hn::Mul(load(z + i, lanes), inverse))), z + i, lanes);
  });
}

float row_max(const float* z, int64_t n) {
  VF m = set(-std::numeric_limits<float>::infinity());
  const VF low = m;
  for_each_vector(n, [&](int64_t i, auto lanes) HWY_ATTR {
    VF v = load(z + i, lanes);
    if constexpr (std::is_same_v<decltype(lanes), Part>) {
      v = hn::IfThenElse(hn::FirstN(F32(), lanes.n), v, low);
    }
    m = hn::Max(m, v);
  });
  return max_lanes(m);
}

// e = exp(z - shift); returns its sum.
float exp_row(const float* z, float shift, float* e, int64_t n) {
  const VF s = set(shift);
  return sum_row(n, [&](int64_t i, auto lanes) HWY_ATTR {
    VF v = hn::Exp(F32(), hn::Sub(load(z + i, lanes), s));
    if constexpr (std::is_same_v<decltype(lanes), Part>)
      v = hn::IfThenElseZero(hn::FirstN(F32(), lanes.n), v);
    store(v, e + i, lanes);
    return v;
  });
}

template <class T>
void cross_entropy_row(float* z, int64_t v, int32_t target, float cap, float weight, float* e, float* nll,
                       T* grad) {
  if (target < 0) {
    *nll = 0;
    if (grad) std::fill_n(grad, v, T{});
    return;
  }
  if (cap > 0) softcap_row(z, cap, v);
  // A softcap up to 30 bounds exp(z) far below overflow, so the pass for the maximum is not needed.
  const float shift = cap > 0 && cap <= 30 ? 0.0f : row_max(z, v);
  const float sum = exp_row(z, shift, e, v), lse = shift + std::log(sum);
  *nll = lse - z[target];
  if (!grad) return;
  const float target_logit = z[target];
  const VF w = set(weight / sum), inverse = set(cap > 0 ? 1 / cap : 0.0f);
  for_each_vector(v, [&](int64_t i, auto lanes) HWY_ATTR {
    const VF unit = hn::Mul(load(z + i, lanes), inverse);
    const VF slope = hn::NegMulAdd(unit, unit, set(1));  // d softcap / d logit = 1 - (z/cap)^2
    store(hn::Mul(hn::Mul(w, load(e + i, lanes)), slope), grad + i, lanes);
  });
  const float unit = cap > 0 ? target_logit / cap : 0.0f;
  const float at_target = weight * (std::exp(target_logit - lse) - 1) * (1 - unit * unit);
  store_element(grad,
                std::is_same_v<T, float>    ? DType::f32
                : std::is_same_v<T, bf16_t> ? DType::bf16
                                            : DType::f16,
                target, static_cast<double>(at_target));
}

void Softcap(const Tensor& z, double cap) {
  if (cap <= 0) return;
  const int64_t n = z.dim(-1);
  parallel_for(z.numel() / n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) softcap_row(z.as<float>() + i * n, static_cast<float>(cap), n);
  });
}

// The largest value first, then where it stands: two fast passes over a row in cache.
void Argmax(const Tensor& x, const Tensor& out) {
  const int64_t v = x.dim(1);
  parallel_for(x.dim(0), 4, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const float* row = x.as<float>() + n * v;
      const float* at = std::find(row, row + v, row_max(row, v));
      out.as<int32_t>()[n] = at == row + v ? -1 : static_cast<int32_t>(at - row);
    }
  });
}

void CrossEntropy(const Tensor& logits, const Tensor& targets, double cap, double weight, const Tensor& nll,
                  const Tensor* grad) {
  const int64_t v = logits.dim(1);
  with_float_type(grad ? grad->dtype() : DType::f32, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(logits.dim(0), 1, [&](int64_t begin, int64_t end) {
      std::vector<float> e(static_cast<size_t>(v));  // stays in L1 or L2 beside the row
      for (int64_t n = begin; n < end; ++n) {
        cross_entropy_row(logits.as<float>() + n * v, v, targets.as<int32_t>()[n], static_cast<float>(cap),
                          static_cast<float>(weight), e.data(), nll.as<float>() + n,
                          grad ? grad->as<T>() + n * v : nullptr);
      }
    });
  });
}

}  // namespace flexchat::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace flexchat {

HWY_EXPORT(Softcap);
HWY_EXPORT(Argmax);
HWY_EXPORT(CrossEntropy);

void CpuBackend::softcap(const Tensor& z, double cap) { HWY_DYNAMIC_DISPATCH(Softcap)(z, cap); }
void CpuBackend::argmax(const Tensor& x, const Tensor& out) { HWY_DYNAMIC_DISPATCH(Argmax)(x, out); }
void CpuBackend::cross_entropy(const Tensor& logits, const Tensor& targets, double cap, double weight,
                               const Tensor& nll, const Tensor* grad) {
  HWY_DYNAMIC_DISPATCH(CrossEntropy)(logits, targets, cap, weight, nll, grad);
}

}  // namespace flexchat
#endif  // HWY_ONCE
