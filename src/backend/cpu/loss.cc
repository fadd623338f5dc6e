// Softcap and softmax cross-entropy over rows of logits, whole or in panels of columns. A row is read twice
// (sum, then gradient) and written once; about 40 FLOPs an element, most of them in tanh and exp.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/loss.cc"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include <algorithm>
#include <atomic>
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

// Highway's Exp makes 0 of NaN, which would hide it in a sum.
HWY_INLINE VF exp_or_nan(VF x) { return hn::IfThenElse(hn::IsNaN(x), x, hn::Exp(F32(), x)); }

// The sum of fn(begin, count) over stretches of a row: as f32 a sum of 1e5 positive numbers would be off by
// 4e-5.
template <class Fn>
HWY_INLINE float sum_in_stretches(int64_t n, const Fn& fn) {
  constexpr int64_t kStretch = 4096;
  double sum = 0;
  for (int64_t begin = 0; begin < n; begin += kStretch) {
    sum += static_cast<double>(fn(begin, std::min(kStretch, n - begin)));
  }
  return static_cast<float>(sum);
}

// e = exp(z - shift); returns its sum.
float exp_row(const float* z, float shift, float* e, int64_t n) {
  const VF s = set(shift);
  return sum_in_stretches(n, [&](int64_t begin, int64_t count) HWY_ATTR {
    return sum_row(count, [&](int64_t i, auto lanes) HWY_ATTR {
      VF v = exp_or_nan(hn::Sub(load(z + begin + i, lanes), s));
      if constexpr (std::is_same_v<decltype(lanes), Part>) {
        v = hn::IfThenElseZero(hn::FirstN(F32(), lanes.n), v);
      }
      store(v, e + begin + i, lanes);
      return v;
    });
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

// ---- panels of columns ------------------------------------------------------------------------------------
// sum of exp(z - shift)
float exp_sum(const float* z, float shift, int64_t n) {
  const VF s = set(shift);
  return sum_in_stretches(n, [&](int64_t begin, int64_t count) HWY_ATTR {
    return sum_row(count, [&](int64_t i, auto lanes) HWY_ATTR {
      const VF v = exp_or_nan(hn::Sub(load(z + begin + i, lanes), s));
      if constexpr (std::is_same_v<decltype(lanes), Part>) {
        return hn::IfThenElseZero(hn::FirstN(F32(), lanes.n), v);
      }
      return v;
    });
  });
}

// The numbers of one row of SoftmaxRows.
struct RowState {
  float *shift, *sum, *target, *best;
  int32_t* argmax;
};

// z are the capped logits of columns [first, first + n).
void update_row(const float* z, int64_t n, int64_t first, int32_t target, float cap, const RowState& row) {
  const bool shift_is_cap = cap > 0 && cap <= static_cast<float>(kShiftCap);
  const float largest = shift_is_cap && !row.argmax ? cap : row_max(z, n);
  if (first == 0) {
    *row.shift = shift_is_cap ? cap : largest;
    *row.sum = *row.target = 0;
    if (row.argmax) *row.argmax = -1;
  }
  const float before = *row.shift;
  if (!shift_is_cap) *row.shift = std::max(before, largest);
  const float shift = *row.shift;
  // Nothing to rescale at first; and -inf - (-inf) is no number.
  const float old = *row.sum == 0 ? 0 : *row.sum * std::exp(before - shift);
  *row.sum = old + exp_sum(z, std::isinf(shift) ? 0 : shift, n);
  if (target >= first && target < first + n) *row.target = z[target - first];
  if (!row.argmax || (*row.argmax >= 0 && !(largest > *row.best))) return;
  const float* at = std::find(z, z + n, largest);
  if (at == z + n) return;  // NaN alone
  *row.best = largest;
  *row.argmax = static_cast<int32_t>(first + (at - z));
}

// out = exp(z - cap) * dz/dlogit
template <class T>
void unscaled_row(const float* z, float cap, T* out, int64_t n) {
  const VF c = set(cap), inverse = set(1 / cap);
  for_each_vector(n, [&](int64_t i, auto lanes) HWY_ATTR {
    const VF v = load(z + i, lanes), unit = hn::Mul(v, inverse);
    store(hn::Mul(exp_or_nan(hn::Sub(v, c)), hn::NegMulAdd(unit, unit, set(1))), out + i, lanes);
  });
}

void SoftmaxPanel(const Tensor& logits, const Tensor& targets, int64_t first, double cap,
                  const SoftmaxRows& rows, const Tensor* unscaled) {
  const int64_t columns = logits.dim(1);
  const bool with_argmax = rows.argmax.defined();
  with_float_type(unscaled ? unscaled->dtype() : DType::f32, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(logits.dim(0), 1, [&](int64_t begin, int64_t end) {
      std::vector<float> z(static_cast<size_t>(columns));  // stays in L1
      for (int64_t n = begin; n < end; ++n) {
        std::copy_n(logits.as<float>() + n * columns, columns, z.data());
        if (cap > 0) softcap_row(z.data(), static_cast<float>(cap), columns);
        const int32_t target = targets.as<int32_t>()[n];
        update_row(z.data(), columns, first, target, static_cast<float>(cap),
                   {rows.shift.as<float>() + n, rows.sum.as<float>() + n, rows.target.as<float>() + n,
                    with_argmax ? rows.best.as<float>() + n : nullptr,
                    with_argmax ? rows.argmax.as<int32_t>() + n : nullptr});
        if (!unscaled) continue;
        T* out = unscaled->as<T>() + n * unscaled->dim(1) + first;
        if (target < 0) {
          std::fill_n(out, columns, T{});
        } else {
          unscaled_row(z.data(), static_cast<float>(cap), out, columns);
        }
      }
    });
  });
}

// fn(index, lanes, d LSE / d logit) over a row of logits.
template <class Fn>
HWY_INLINE void for_each_gradient(const float* logits, int64_t n, float cap, float lse, const Fn& fn) {
  const VF c = set(cap), inverse = set(cap > 0 ? 1 / cap : 0.0f), l = set(lse);
  for_each_vector(n, [&](int64_t i, auto lanes) HWY_ATTR {
    VF z = load(logits + i, lanes), slope = set(1);
    if (cap > 0) {
      const VF unit = fast_tanh(hn::Mul(z, inverse));
      z = hn::Mul(c, unit);
      slope = hn::NegMulAdd(unit, unit, slope);
    }
    fn(i, lanes, hn::Mul(exp_or_nan(hn::Sub(z, l)), slope));
  });
}

// d nll / d logit at the target.
float target_gradient(float logit, float cap, float lse) {
  const float unit = cap > 0 ? std::tanh(logit / cap) : 0.0f, z = cap > 0 ? cap * unit : logit;
  return std::expm1(z - lse) * (1 - unit * unit);
}

// Does any |d nll / d logit| of the row reach `filter`? NaN does.
bool reaches(const float* logits, int64_t n, int64_t target, float cap, float lse, float filter) {
  const float before = target >= 0 && target < n ? target_gradient(logits[target], cap, lse) : 0.0f;
  if (!(std::abs(before) < filter)) return true;
  bool any = false;
  for_each_gradient(logits, n, cap, lse, [&](int64_t i, auto lanes, VF g) HWY_ATTR {
    auto below = hn::Lt(g, set(filter));
    if constexpr (std::is_same_v<decltype(lanes), Part>) {
      below = hn::Or(below, hn::Not(hn::FirstN(F32(), lanes.n)));
    }
    if (hn::AllTrue(F32(), below)) return;
    // The target's own exponential is no probability of something else.
    for (int64_t j = i; j < std::min(n, i + static_cast<int64_t>(hn::Lanes(F32()))) && !any; ++j) {
      float lane[hn::MaxLanes(F32())];
      hn::StoreU(g, F32(), lane);
      any = j != target && !(lane[j - i] < filter);
    }
  });
  return any;
}

bool SoftmaxGradient(const Tensor& logits, const Tensor& targets, int64_t first, double cap, double weight,
                     const Tensor& lse, double filter, const Tensor& grad) {
  const int64_t columns = logits.dim(1);
  const auto c = static_cast<float>(cap), w = static_cast<float>(weight);
  const auto row = [&](int64_t n) { return logits.as<float>() + n * columns; };
  if (filter > 0) {
    std::atomic<bool> reached = false;
    parallel_for(logits.dim(0), 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end && !reached; ++n) {
        const int32_t target = targets.as<int32_t>()[n];
        if (target >= 0 &&
            reaches(row(n), columns, target - first, c, lse.as<float>()[n], static_cast<float>(filter))) {
          reached = true;
        }
      }
    });
    if (!reached) return false;
  }
  with_float_type(grad.dtype(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(logits.dim(0), 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const int32_t target = targets.as<int32_t>()[n];
        T* out = grad.as<T>() + n * columns;
        if (target < 0) {
          std::fill_n(out, columns, T{});
          continue;
        }
        const float l = lse.as<float>()[n];
        const bool here = target >= first && target < first + columns;
        const float at_target = here ? w * target_gradient(row(n)[target - first], c, l) : 0.0f;
        for_each_gradient(row(n), columns, c, l, [&](int64_t i, auto lanes, VF g) HWY_ATTR {
          store(hn::Mul(set(w), g), out + i, lanes);
        });
        if (here) store_element(out, grad.dtype(), target - first, static_cast<double>(at_target));
      }
    });
  });
  return true;
}

void RowScale(const Tensor& x, const Tensor& factor, const Tensor& out) {
  const int64_t c = x.dim(1);
  with_float_type(x.dtype(), [&](auto* x_type) {
    using X = std::remove_pointer_t<decltype(x_type)>;
    with_float_type(out.dtype(), [&](auto* out_type) {
      using T = std::remove_pointer_t<decltype(out_type)>;
      parallel_for(x.dim(0), 16, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) {
          const VF f = set(factor.as<float>()[n]);
          for_each_vector(c, [&](int64_t i, auto lanes) HWY_ATTR {
            store(hn::Mul(f, load(x.as<X>() + n * c + i, lanes)), out.as<T>() + n * c + i, lanes);
          });
        }
      });
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
HWY_EXPORT(SoftmaxPanel);
HWY_EXPORT(SoftmaxGradient);
HWY_EXPORT(RowScale);

void CpuBackend::softcap(const Tensor& z, double cap) { HWY_DYNAMIC_DISPATCH(Softcap)(z, cap); }
void CpuBackend::argmax(const Tensor& x, const Tensor& out) { HWY_DYNAMIC_DISPATCH(Argmax)(x, out); }
void CpuBackend::cross_entropy(const Tensor& logits, const Tensor& targets, double cap, double weight,
                               const Tensor& nll, const Tensor* grad) {
  HWY_DYNAMIC_DISPATCH(CrossEntropy)(logits, targets, cap, weight, nll, grad);
}
void CpuBackend::softmax_panel(const Tensor& logits, const Tensor& targets, int64_t first, double cap,
                               const SoftmaxRows& rows, const Tensor* unscaled) {
  HWY_DYNAMIC_DISPATCH(SoftmaxPanel)(logits, targets, first, cap, rows, unscaled);
}
void CpuBackend::softmax_nll(const SoftmaxRows& rows, const Tensor& targets, const Tensor& lse,
                             const Tensor& nll) {
  for (int64_t n = 0; n < lse.numel(); ++n) {
    const float l = rows.shift.as<float>()[n] + std::log(rows.sum.as<float>()[n]);
    lse.as<float>()[n] = l;
    nll.as<float>()[n] = targets.as<int32_t>()[n] < 0 ? 0 : l - rows.target.as<float>()[n];
  }
}
void CpuBackend::softmax_factor(const SoftmaxRows& rows, const Tensor& lse, const Tensor& targets, double cap,
                                double weight, const Tensor& unscaled, const Tensor& factor) {
  for (int64_t n = 0; n < lse.numel(); ++n) {
    const int32_t target = targets.as<int32_t>()[n];
    factor.as<float>()[n] = 0;
    if (target < 0) continue;
    const double l = lse.get(n), z = rows.target.get(n), unit = z / cap;
    factor.set(n, weight * std::exp(cap - l));
    unscaled.set(n * unscaled.dim(1) + target, (std::exp(z - cap) - std::exp(l - cap)) * (1 - unit * unit));
  }
}
bool CpuBackend::softmax_gradient(const Tensor& logits, const Tensor& targets, int64_t first, double cap,
                                  double weight, const Tensor& lse, double filter, const Tensor& grad) {
  return HWY_DYNAMIC_DISPATCH(SoftmaxGradient)(logits, targets, first, cap, weight, lse, filter, grad);
}
void CpuBackend::row_scale(const Tensor& x, const Tensor& factor, const Tensor& out) {
  HWY_DYNAMIC_DISPATCH(RowScale)(x, factor, out);
}

}  // namespace flexchat
#endif  // HWY_ONCE
