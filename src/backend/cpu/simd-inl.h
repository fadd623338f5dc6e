// Loads and stores of f32, bf16 and f16 rows as f32 vectors, and the loop that walks a row. Included once per
// SIMD target by the kernel files (Highway's foreach_target), hence no ordinary include guard.
#if defined(FLEXCHAT_SIMD_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef FLEXCHAT_SIMD_INL_H
#undef FLEXCHAT_SIMD_INL_H
#else
#define FLEXCHAT_SIMD_INL_H
#endif

#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

#include <algorithm>

#include "base/dtype.h"
#include "base/error.h"

HWY_BEFORE_NAMESPACE();
namespace flexchat::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using F32 = hn::ScalableTag<float>;
using VF = hn::Vec<F32>;

// How many lanes a load or store touches: all of them, or the first `n` at the end of a row.
struct Whole {};
struct Part {
  size_t n;
};

HWY_INLINE VF load(const float* p, Whole) { return hn::LoadU(F32(), p); }
HWY_INLINE void store(VF v, float* p, Whole) { hn::StoreU(v, F32(), p); }

HWY_INLINE VF load(const bf16_t* p, Whole) {
  const F32 d;
  const hn::RebindToUnsigned<F32> du;
  const hn::Rebind<uint16_t, F32> dh;
  const auto half = hn::LoadU(dh, reinterpret_cast<const uint16_t*>(p));
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(du, half)));
}
HWY_INLINE void store(VF v, bf16_t* p, Whole) {
  const hn::RebindToUnsigned<F32> du;
  const hn::RebindToSigned<F32> di;
  const hn::Rebind<uint16_t, F32> dh;
  const auto u = hn::BitCast(du, v);
  const auto even = hn::And(hn::ShiftRight<16>(u), hn::Set(du, 1));
  const auto rounded = hn::Add(u, hn::Add(even, hn::Set(du, 0x7FFF)));
  const auto nan = hn::RebindMask(du, hn::IsNaN(v));
  const auto bits = hn::ShiftRight<16>(hn::IfThenElse(nan, hn::Or(u, hn::Set(du, 0x400000)), rounded));
  hn::StoreU(hn::DemoteTo(dh, hn::BitCast(di, bits)), dh, reinterpret_cast<uint16_t*>(p));
}

#if HWY_ARCH_X86 && HWY_TARGET > HWY_AVX2
// Without F16C; Highway's own emulation truncates.
HWY_INLINE VF load(const f16_t* p, Whole) {
  float lanes[hn::MaxLanes(F32())];
  for (size_t i = 0; i < hn::Lanes(F32()); ++i) lanes[i] = to_float(p[i]);
  return hn::LoadU(F32(), lanes);
}
HWY_INLINE void store(VF v, f16_t* p, Whole) {
  float lanes[hn::MaxLanes(F32())];
  hn::StoreU(v, F32(), lanes);
  for (size_t i = 0; i < hn::Lanes(F32()); ++i) p[i] = to_f16(lanes[i]);
}
#else
HWY_INLINE VF load(const f16_t* p, Whole) {
  const hn::Rebind<hwy::float16_t, F32> dh;
  return hn::PromoteTo(F32(), hn::LoadU(dh, reinterpret_cast<const hwy::float16_t*>(p)));
}
HWY_INLINE void store(VF v, f16_t* p, Whole) {
  const hn::Rebind<hwy::float16_t, F32> dh;
  hn::StoreU(hn::DemoteTo(dh, v), dh, reinterpret_cast<hwy::float16_t*>(p));
}
#endif

// Lanes past the end read as zero and are not written.
template <class T>
HWY_INLINE VF load(const T* p, Part part) {
  T buffer[hn::MaxLanes(F32())] = {};
  for (size_t i = 0; i < part.n; ++i) buffer[i] = p[i];
  return load(buffer, Whole());
}
template <class T>
HWY_INLINE void store(VF v, T* p, Part part) {
  T buffer[hn::MaxLanes(F32())];
  store(v, buffer, Whole());
  for (size_t i = 0; i < part.n; ++i) p[i] = buffer[i];
}

// fn(index, Whole or Part) over a row of n elements.
template <class Fn>
HWY_INLINE void for_each_vector(int64_t n, const Fn& fn) {
  const auto lanes = static_cast<int64_t>(hn::Lanes(F32()));
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) fn(i, Whole());
  if (i < n) fn(i, Part{static_cast<size_t>(n - i)});
}

HWY_INLINE VF set(float x) { return hn::Set(F32(), x); }
HWY_INLINE float sum_lanes(VF v) { return hn::GetLane(hn::SumOfLanes(F32(), v)); }
HWY_INLINE float max_lanes(VF v) { return hn::GetLane(hn::MaxOfLanes(F32(), v)); }

// sum over a row of fn(index, Whole or Part), a vector whose lanes past the end must be 0.
template <class Fn>
HWY_INLINE float sum_row(int64_t n, const Fn& fn) {
  const auto lanes = static_cast<int64_t>(hn::Lanes(F32()));
  VF s0 = set(0), s1 = set(0), s2 = set(0), s3 = set(0);
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {  // four chains hide the latency of the addition
    s0 = hn::Add(s0, fn(i, Whole()));
    s1 = hn::Add(s1, fn(i + lanes, Whole()));
    s2 = hn::Add(s2, fn(i + 2 * lanes, Whole()));
    s3 = hn::Add(s3, fn(i + 3 * lanes, Whole()));
  }
  for (; i + lanes <= n; i += lanes) s0 = hn::Add(s0, fn(i, Whole()));
  if (i < n) s1 = hn::Add(s1, fn(i, Part{static_cast<size_t>(n - i)}));
  return sum_lanes(hn::Add(hn::Add(s0, s1), hn::Add(s2, s3)));
}

template <class A, class B>
HWY_INLINE float dot(const A* a, const B* b, int64_t n) {
  return sum_row(
      n, [&](int64_t i, auto lanes) HWY_ATTR { return hn::Mul(load(a + i, lanes), load(b + i, lanes)); });
}

// Dot products of one row with four rows `stride` apart: four independent chains, one load of a for four
// products.
template <class A, class B>
HWY_INLINE void four_dots(const A* a, const B* b, int64_t stride, int64_t n, float* out) {
  const auto lanes = static_cast<int64_t>(hn::Lanes(F32()));
  VF s[8];
  for (VF& v : s) v = set(0);
  int64_t i = 0;
  for (; i + 2 * lanes <= n; i += 2 * lanes) {
    const VF a0 = load(a + i, Whole()), a1 = load(a + i + lanes, Whole());
    for (int r = 0; r < 4; ++r) {
      const B* ahead = b + (r + 4) * stride + i;
      __builtin_prefetch(ahead);
      if constexpr (sizeof(B) == 4) __builtin_prefetch(ahead + lanes);
      s[r] = hn::MulAdd(a0, load(b + r * stride + i, Whole()), s[r]);
      s[r + 4] = hn::MulAdd(a1, load(b + r * stride + i + lanes, Whole()), s[r + 4]);
    }
  }
  for_each_vector(n - i, [&](int64_t j, auto part) HWY_ATTR {
    const VF a0 = load(a + i + j, part);
    for (int r = 0; r < 4; ++r) s[r] = hn::MulAdd(a0, load(b + r * stride + i + j, part), s[r]);
  });
  for (int r = 0; r < 4; ++r) out[r] = sum_lanes(hn::Add(s[r], s[r + 4]));
}

// y += alpha * x
template <class Y, class X>
HWY_INLINE void add_scaled(float alpha, const X* x, Y* y, int64_t n) {
  const VF va = set(alpha);
  for_each_vector(n, [&](int64_t i, auto lanes) HWY_ATTR {
    store(hn::MulAdd(va, load(x + i, lanes), load(y + i, lanes)), y + i, lanes);
  });
}

HWY_INLINE VF sigmoid(VF x) {
  const VF e = hn::Exp(F32(), hn::Neg(x));
  return hn::Div(set(1), hn::Add(set(1), e));
}

}  // namespace flexchat::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
