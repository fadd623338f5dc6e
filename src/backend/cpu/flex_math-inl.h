// Vector arithmetic of expressions (flex/expr.h) in f32 and int32: right for every operand, NaN, infinities
// and zero divisors included, and within a few units in the last place. Included once per SIMD target.
#if defined(FLEXCHAT_FLEX_MATH_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef FLEXCHAT_FLEX_MATH_INL_H
#undef FLEXCHAT_FLEX_MATH_INL_H
#else
#define FLEXCHAT_FLEX_MATH_INL_H
#endif

#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

#include <cmath>
#include <limits>

#include "backend/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace flexchat::HWY_NAMESPACE {

using I32 = hn::RebindToSigned<F32>;
using VI = hn::Vec<I32>;

namespace flex_math {

HWY_INLINE VF keep_nan(VF x, VF y) { return hn::IfThenElse(hn::IsNaN(x), x, y); }

// As fmin and fmax: a NaN operand is dropped.
HWY_INLINE VF min(VF a, VF b) {
  const VF least = hn::IfThenElse(hn::Lt(a, b), a, b);  // b where either is NaN
  return hn::IfThenElse(hn::IsNaN(b), a, least);
}
HWY_INLINE VF max(VF a, VF b) {
  const VF most = hn::IfThenElse(hn::Lt(b, a), a, b);
  return hn::IfThenElse(hn::IsNaN(b), a, most);
}

HWY_INLINE VF exp(VF x) {
  return keep_nan(x, hn::Exp(F32(), hn::Min(x, set(104.0f))));  // beyond 88.8 it is infinite
}

HWY_INLINE VF log(VF x) {
  const VF infinity = set(std::numeric_limits<float>::infinity());
  const VF y = hn::IfThenElse(hn::Lt(x, infinity), hn::Log(F32(), x), x);  // NaN and infinity stay
  const VF below =
      hn::IfThenElse(hn::Eq(x, set(0)), hn::Neg(infinity), set(std::numeric_limits<float>::quiet_NaN()));
  return hn::IfThenElse(hn::Le(x, set(0)), below, y);
}

HWY_INLINE VF tanh(VF x) { return keep_nan(x, hn::Tanh(F32(), x)); }

HWY_INLINE VF sigmoid(VF x) {
  const VF e = exp(hn::Neg(hn::Abs(x)));
  return hn::Div(hn::IfThenElse(hn::Lt(x, set(0)), e, set(1)), hn::Add(set(1), e));
}

HWY_INLINE VF softplus(VF x) {
  const VF tail = hn::Log1p(F32(), exp(hn::Neg(hn::Abs(x))));
  return keep_nan(x, hn::Add(hn::Max(x, set(0)), tail));
}

// fn of each lane of two vectors.
template <class D, class V, class Fn>
HWY_INLINE V for_each_lane(D d, V a, V b, const Fn& fn) {
  hn::TFromD<D> x[hn::MaxLanes(d)], y[hn::MaxLanes(d)];
  hn::StoreU(a, d, x);
  hn::StoreU(b, d, y);
  for (size_t i = 0; i < hn::Lanes(d); ++i) x[i] = fn(x[i], y[i]);
  return hn::LoadU(d, x);
}

HWY_INLINE VF pow(VF a, VF b) {
  return for_each_lane(F32(), a, b, [](float x, float y) { return std::pow(x, y); });
}

// Rounded towards minus infinity, 0 where b is 0. Exact: quotients of 32-bit integers stay apart in double.
HWY_INLINE VI floor_div(VI a, VI b) {
  return for_each_lane(I32(), a, b, [](int32_t x, int32_t y) {
    return y == 0 ? 0 : static_cast<int32_t>(std::floor(static_cast<double>(x) / y));
  });
}
HWY_INLINE VI mod(VI a, VI b) { return hn::Sub(a, hn::Mul(b, floor_div(a, b))); }

}  // namespace flex_math
}  // namespace flexchat::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
