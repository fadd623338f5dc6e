// Optimizer updates, one fused pass over the operands each. Sums run in fixed chunks, so they do not depend
// on the number of threads.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/optim.cc"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include <cmath>
#include <type_traits>
#include <vector>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/dispatch.h"
#include "backend/cpu/simd-inl.h"
#include "base/parallel.h"

HWY_BEFORE_NAMESPACE();
namespace flexchat::HWY_NAMESPACE {

constexpr int64_t kGrain = 1 << 14;

// fn(index, lanes) over all n elements, in parallel.
template <class Fn>
void for_all(int64_t n, const Fn& fn) {
  parallel_for(n, kGrain, [&](int64_t begin, int64_t end) {
    for_each_vector(end - begin, [&](int64_t i, auto lanes) HWY_ATTR { fn(begin + i, lanes); });
  });
}

void AdamW(const AdamWStep& s, const Tensor& grad, const Tensor& param, const Tensor& m, const Tensor& v) {
  const double bias1 = 1 - std::pow(s.beta1, static_cast<double>(s.step));
  const double bias2 = 1 - std::pow(s.beta2, static_cast<double>(s.step));
  const VF decay = set(static_cast<float>(1 - s.lr * s.weight_decay)),
           rate = set(static_cast<float>(s.lr / bias1));
  const VF w1 = set(static_cast<float>(1 - s.beta1)), w2 = set(static_cast<float>(1 - s.beta2));
  const VF inverse2 = set(static_cast<float>(1 / std::sqrt(bias2))), eps = set(static_cast<float>(s.eps));
  const float* pg = grad.as<float>();
  float *pp = param.as<float>(), *pm = m.as<float>(), *pv = v.as<float>();
  for_all(param.numel(), [&](int64_t i, auto lanes) HWY_ATTR {
    const VF g = load(pg + i, lanes), m0 = load(pm + i, lanes), v0 = load(pv + i, lanes);
    const VF m1 = hn::MulAdd(w1, hn::Sub(g, m0), m0);
    const VF v1 = hn::MulAdd(w2, hn::Sub(hn::Mul(g, g), v0), v0);
    const VF denominator = hn::MulAdd(hn::Sqrt(v1), inverse2, eps);
    const VF p = hn::Mul(load(pp + i, lanes), decay);
    store(hn::NegMulAdd(rate, hn::Div(m1, denominator), p), pp + i, lanes);
    store(m1, pm + i, lanes);
    store(v1, pv + i, lanes);
  });
}

void Nesterov(double momentum, const Tensor& grad, const Tensor& buffer, const Tensor& out) {
  const VF w = set(static_cast<float>(1 - momentum)), mu = set(static_cast<float>(momentum));
  const float* pg = grad.as<float>();
  float* pb = buffer.as<float>();
  with_float_type(out.dtype(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* po = out.as<T>();
    for_all(grad.numel(), [&](int64_t i, auto lanes) HWY_ATTR {
      const VF g = load(pg + i, lanes), b0 = load(pb + i, lanes);
      const VF b = hn::MulAdd(w, hn::Sub(g, b0), b0);
      store(b, pb + i, lanes);
      store(hn::MulAdd(mu, hn::Sub(b, g), g), po + i, lanes);
    });
  });
}

void AxisSumSquares(const Tensor& x, int axis, const Tensor& out) {
  const int64_t m = x.dim(0), n = x.dim(1);
  float* po = out.as<float>();
  with_float_type(x.dtype(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* px = x.as<T>();
    if (axis == 1) {
      parallel_for(m, 16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) po[i] = dot(px + i * n, px + i * n, n);
      });
    } else {
      parallel_for(n, 64, [&](int64_t begin, int64_t end) {
        std::fill(po + begin, po + end, 0.0f);
        for (int64_t i = 0; i < m; ++i) {
          for_each_vector(end - begin, [&](int64_t j, auto lanes) HWY_ATTR {
            const VF v = load(px + i * n + begin + j, lanes);
            store(hn::MulAdd(v, v, load(po + begin + j, lanes)), po + begin + j, lanes);
          });
        }
      });
    }
  });
}

void AxisScale(const Tensor& x, int axis, const Tensor& factor) {
  const int64_t m = x.dim(0), n = x.dim(1);
  const float* pf = factor.as<float>();
  with_float_type(x.dtype(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* px = x.as<T>();
    parallel_for(m, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        T* row = px + i * n;
        for_each_vector(n, [&](int64_t j, auto lanes) HWY_ATTR {
          const VF f = axis == 1 ? set(pf[i]) : load(pf + j, lanes);
          store(hn::Mul(load(row + j, lanes), f), row + j, lanes);
        });
      }
    });
  });
}

void Axpby(double alpha, const Tensor& x, double beta, const Tensor& out) {
  const VF a = set(static_cast<float>(alpha)), b = set(static_cast<float>(beta));
  with_float_type(x.dtype(), [&](auto* type_x) {
    using X = std::remove_pointer_t<decltype(type_x)>;
    with_float_type(out.dtype(), [&](auto* type_out) {
      using Y = std::remove_pointer_t<decltype(type_out)>;
      const X* px = x.as<X>();
      Y* po = out.as<Y>();
      for_all(out.numel(), [&](int64_t i, auto lanes) HWY_ATTR {
        const VF before = beta == 0 ? set(0) : hn::Mul(b, load(po + i, lanes));
        store(hn::MulAdd(a, load(px + i, lanes), before), po + i, lanes);
      });
    });
  });
}

void CautiousUpdate(double lr, double weight_decay, const Tensor& g, const Tensor& param) {
  const VF rate = set(static_cast<float>(lr)), decay = set(static_cast<float>(lr * weight_decay));
  const float* pg = g.as<float>();
  float* pp = param.as<float>();
  for_all(param.numel(), [&](int64_t i, auto lanes) HWY_ATTR {
    const VF u = load(pg + i, lanes), p = load(pp + i, lanes);
    const VF shrink = hn::IfThenElseZero(hn::Ge(hn::Mul(u, p), set(0)), hn::Mul(decay, p));
    store(hn::Sub(hn::NegMulAdd(rate, u, p), shrink), pp + i, lanes);
  });
}

double SumSquares(const Tensor& x) {
  constexpr int64_t kChunk = 4096;
  const int64_t n = x.numel(), chunks = (n + kChunk - 1) / kChunk;
  std::vector<float> partial(static_cast<size_t>(chunks));
  with_float_type(x.dtype(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* px = x.as<T>();
    parallel_for(chunks, 4, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t count = std::min(kChunk, n - k * kChunk);
        partial[static_cast<size_t>(k)] = dot(px + k * kChunk, px + k * kChunk, count);
      }
    });
  });
  double sum = 0;
  for (float p : partial) sum += static_cast<double>(p);
  return sum;
}

// x - x is 0 for finite values and NaN otherwise, so a chunk's sum tells whether to look closer.
int64_t FirstNonfinite(const Tensor& x) {
  constexpr int64_t kChunk = 4096;
  const int64_t n = x.numel();
  int64_t found = -1;
  with_float_type(x.dtype(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* px = x.as<T>();
    for (int64_t k = 0; k < n && found < 0; k += kChunk) {
      const int64_t count = std::min(kChunk, n - k);
      const float sum = sum_row(count, [&](int64_t i, auto lanes) HWY_ATTR {
        const VF v = load(px + k + i, lanes);
        return hn::Sub(v, v);
      });
      if (sum == 0.0f) continue;
      for (int64_t i = k; found < 0; ++i) {
        if (!std::isfinite(load_element(px, x.dtype(), i))) found = i;
      }
    }
  });
  return found;
}

}  // namespace flexchat::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace flexchat {

HWY_EXPORT(AdamW);
HWY_EXPORT(Nesterov);
HWY_EXPORT(AxisSumSquares);
HWY_EXPORT(AxisScale);
HWY_EXPORT(Axpby);
HWY_EXPORT(CautiousUpdate);
HWY_EXPORT(SumSquares);
HWY_EXPORT(FirstNonfinite);

void CpuBackend::adamw(const AdamWStep& step, const Tensor& grad, const Tensor& param, const Tensor& m,
                       const Tensor& v) {
  HWY_DYNAMIC_DISPATCH(AdamW)(step, grad, param, m, v);
}
void CpuBackend::nesterov(double momentum, const Tensor& grad, const Tensor& buffer, const Tensor& out) {
  HWY_DYNAMIC_DISPATCH(Nesterov)(momentum, grad, buffer, out);
}
void CpuBackend::axis_sum_squares(const Tensor& x, int axis, const Tensor& out) {
  HWY_DYNAMIC_DISPATCH(AxisSumSquares)(x, axis, out);
}
void CpuBackend::axis_scale(const Tensor& x, int axis, const Tensor& factor) {
  HWY_DYNAMIC_DISPATCH(AxisScale)(x, axis, factor);
}
void CpuBackend::axpby(double alpha, const Tensor& x, double beta, const Tensor& out) {
  HWY_DYNAMIC_DISPATCH(Axpby)(alpha, x, beta, out);
}
void CpuBackend::cautious_update(double lr, double weight_decay, const Tensor& g, const Tensor& param) {
  HWY_DYNAMIC_DISPATCH(CautiousUpdate)(lr, weight_decay, g, param);
}
double CpuBackend::sum_squares(const Tensor& x) { return HWY_DYNAMIC_DISPATCH(SumSquares)(x); }
int64_t CpuBackend::first_nonfinite(const Tensor& x) { return HWY_DYNAMIC_DISPATCH(FirstNonfinite)(x); }

}  // namespace flexchat
#endif  // HWY_ONCE
