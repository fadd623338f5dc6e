// Optimizer updates, one fused pass over the operands each. Sums run in fixed chunks or rows, so they do not
// depend on the number of threads.
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
#include "backend/update_rates.h"
#include "base/parallel.h"

HWY_BEFORE_NAMESPACE();
namespace flexchat::HWY_NAMESPACE {

constexpr int64_t kGrain = 1 << 14;
constexpr int64_t kRowGrain = 16;

const GradientRates& gradient_rates(const Tensor& rates) { return *rates.as<GradientRates>(); }
// Rates (AdamWRates or MuonRates) of a slot's group.
template <class Rates>
const Rates& group_rates(const Tensor& rates, const UpdateSlot& slot) {
  return rates.as<Rates>()[slot.rates_row];
}
float narrow(double x) { return static_cast<float>(x); }

// A scalar as a tensor of `dtype` would hold it.
double rounded(DType dtype, double x) {
  if (dtype == DType::bf16) return static_cast<double>(to_float(to_bf16(narrow(x))));
  if (dtype == DType::f16) return static_cast<double>(to_float(to_f16(narrow(x))));
  return static_cast<double>(narrow(x));
}

double sum_of(const float* x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]);
  return sum;
}

// fn(C* compute) with a slot's compute copy: of its type, or a null float* without one.
template <class Fn>
void with_compute(const UpdateSlot& slot, const Fn& fn) {
  if (!slot.compute.defined()) return fn(static_cast<float*>(nullptr));
  with_float_type(slot.compute.dtype(),
                  [&](auto* type) { fn(slot.compute.as<std::remove_pointer_t<decltype(type)>>()); });
}

// fn(index, lanes) over all n elements, in parallel.
template <class Fn>
void for_all(int64_t n, const Fn& fn) {
  parallel_for(n, kGrain, [&](int64_t begin, int64_t end) {
    for_each_vector(end - begin, [&](int64_t i, auto lanes) HWY_ATTR { fn(begin + i, lanes); });
  });
}

void AdamW(const AdamWRates& r, float gradient_factor, const UpdateSlot& slot) {
  const VF decay = set(narrow(r.decay)), rate = set(narrow(r.rate)), eps = set(narrow(r.eps));
  const VF w1 = set(narrow(r.mean_weight)), w2 = set(narrow(r.square_weight)), unbias = set(narrow(r.unbias));
  const VF factor = set(gradient_factor);
  const float* pg = slot.grad.as<float>();
  float *pp = slot.value.as<float>(), *pm = slot.first.as<float>(), *pv = slot.second.as<float>();
  with_compute(slot, [&](auto* compute) {
    for_all(slot.value.numel(), [&](int64_t i, auto lanes) HWY_ATTR {
      const VF g = hn::Mul(load(pg + i, lanes), factor);
      const VF m0 = load(pm + i, lanes), v0 = load(pv + i, lanes);
      const VF m1 = hn::MulAdd(w1, hn::Sub(g, m0), m0);
      const VF v1 = hn::MulAdd(w2, hn::Sub(hn::Mul(g, g), v0), v0);
      const VF denominator = hn::MulAdd(hn::Sqrt(v1), unbias, eps);
      const VF p = hn::NegMulAdd(rate, hn::Div(m1, denominator), hn::Mul(load(pp + i, lanes), decay));
      store(p, pp + i, lanes);
      store(m1, pm + i, lanes);
      store(v1, pv + i, lanes);
      if (compute != nullptr) store(p, compute + i, lanes);
    });
  });
}

// One matrix of the stack: x and the sums of squares of its rows.
template <class T>
void MomentumOf(const MuonRates& r, float gradient_factor, const UpdateSlot& slot, T* x, float* squares) {
  const VF w = set(narrow(1 - r.momentum)), mu = set(narrow(r.momentum)), factor = set(gradient_factor);
  const int64_t m = slot.value.dim(0), n = slot.value.dim(1);
  const float* grad = slot.grad.as<float>();
  float* momentum = slot.first.as<float>();
  parallel_for(m, kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* pg = grad + i * n;
      float* pb = momentum + i * n;
      T* px = x + i * n;
      for_each_vector(n, [&](int64_t j, auto lanes) HWY_ATTR {
        const VF g = hn::Mul(load(pg + j, lanes), factor), b0 = load(pb + j, lanes);
        const VF b = hn::MulAdd(w, hn::Sub(g, b0), b0);
        store(b, pb + j, lanes);
        store(hn::MulAdd(mu, hn::Sub(b, g), g), px + j, lanes);
      });
      squares[i] = dot(px, px, n);
    }
  });
}

void MuonMomentum(const UpdatePlan& plan, const Tensor& rates, const Tensor& x, const Tensor& squares) {
  const int64_t m = x.dim(1), n = x.dim(2);
  const float factor = narrow(gradient_rates(rates).factor);
  with_float_type(x.dtype(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t k = 0; k < x.dim(0); ++k) {
      const UpdateSlot& slot = plan.slots()[static_cast<size_t>(k)];
      MomentumOf(group_rates<MuonRates>(rates, slot), factor, slot, x.as<T>() + k * m * n,
                 squares.as<float>() + k * m);
    }
  });
}

template <class T>
void ScaleRow(float factor, T* row, int64_t n) {
  const VF f = set(factor);
  for_each_vector(
      n, [&](int64_t j, auto lanes) HWY_ATTR { store(hn::Mul(load(row + j, lanes), f), row + j, lanes); });
}

void MuonEqualize(const Tensor& x, const Tensor& squares, const Tensor& squares_out) {
  const int64_t m = x.dim(1), n = x.dim(2);
  with_float_type(x.dtype(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t k = 0; k < x.dim(0); ++k) {
      const float* before = squares.as<float>() + k * m;
      const double target = std::sqrt(sum_of(before, m) / static_cast<double>(m));
      parallel_for(m, kRowGrain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          T* row = x.as<T>() + (k * m + i) * n;
          const double norm = std::max(std::sqrt(static_cast<double>(before[i])), 1e-6);
          ScaleRow(narrow(rounded(x.dtype(), target / norm)), row, n);
          squares_out.as<float>()[k * m + i] = dot(row, row, n);
        }
      });
    }
  });
}

void MuonNormalize(const Tensor& x, const Tensor& squares, double factor, double eps) {
  const int64_t m = x.dim(1), n = x.dim(2);
  const DType dtype = x.dtype();
  with_float_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t k = 0; k < x.dim(0); ++k) {
      const double norm = rounded(dtype, std::sqrt(sum_of(squares.as<float>() + k * m, m)));
      const float inverse = narrow(1 / rounded(dtype, rounded(dtype, factor * norm) + eps));
      parallel_for(m, kRowGrain, [&](int64_t begin, int64_t end) {
        ScaleRow(inverse, x.as<T>() + (k * m + begin) * n, (end - begin) * n);
      });
    }
  });
}

// Sums of squares of x (m, n) along its shorter side: out[i] of row i when m >= n, else out[j] of column j.
template <class T>
void SumsOfSquares(const T* x, int64_t m, int64_t n, float* out) {
  if (m >= n) {
    parallel_for(m, kRowGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) out[i] = dot(x + i * n, x + i * n, n);
    });
    return;
  }
  parallel_for(n, 64, [&](int64_t begin, int64_t end) {
    std::fill(out + begin, out + end, 0.0f);
    for (int64_t i = 0; i < m; ++i) {
      for_each_vector(end - begin, [&](int64_t j, auto lanes) HWY_ATTR {
        const VF v = load(x + i * n + begin + j, lanes);
        store(hn::MulAdd(v, v, load(out + begin + j, lanes)), out + begin + j, lanes);
      });
    }
  });
}

// sums (length) become the factors. The scalars of one matrix: too little for threads.
void VarianceFactors(double beta2, bool skip, double q, int64_t length, float* second, float* sums) {
  const double total = sum_of(sums, length);
  const double plus = std::sqrt(q) / std::max(std::sqrt(total), 1e-6);
  const auto updated = [&](int64_t i) {
    const double before = static_cast<double>(second[i]);
    return before + (1 - beta2) * (static_cast<double>(sums[i]) * plus * plus / q - before);
  };
  double after = 0;
  for (int64_t i = 0; i < length; ++i)
    after += static_cast<double>(sums[i]) * plus * plus / std::max(updated(i), 1e-10);
  const double keep = plus * plus * std::sqrt(total) / std::max(std::sqrt(after), 1e-10);
  for (int64_t i = 0; i < length; ++i) {
    const double now = updated(i);
    if (!skip) second[i] = narrow(now);
    sums[i] = narrow(keep / std::sqrt(std::max(now, 1e-10)));
  }
}

void MuonVariance(const UpdatePlan& plan, const Tensor& rates, const Tensor& x, const Tensor& factors) {
  const int64_t m = x.dim(1), n = x.dim(2), length = std::max(m, n);
  with_float_type(x.dtype(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t k = 0; k < x.dim(0); ++k) {
      const UpdateSlot& slot = plan.slots()[static_cast<size_t>(k)];
      float* sums = factors.as<float>() + k * length;
      SumsOfSquares(x.as<T>() + k * m * n, m, n, sums);
      VarianceFactors(group_rates<MuonRates>(rates, slot).beta2, gradient_rates(rates).skip != 0,
                      static_cast<double>(std::min(m, n)), length, slot.second.as<float>(), sums);
    }
  });
}

// factors: one a row for m >= n, else one a column; null: 1.
template <class T>
void CautiousUpdate(double lr, double weight_decay, const T* x, const float* factors,
                    const UpdateSlot& slot) {
  const int64_t m = slot.value.dim(0), n = slot.value.dim(1);
  const VF rate = set(narrow(lr)), decay = set(narrow(lr * weight_decay));
  with_compute(slot, [&](auto* compute) {
    parallel_for(m, kRowGrain, [&](int64_t begin, int64_t end) HWY_ATTR {
      for (int64_t i = begin; i < end; ++i) {
        const T* px = x + i * n;
        float* pp = slot.value.as<float>() + i * n;
        const VF of_row = set(factors != nullptr && m >= n ? factors[i] : 1.0f);
        for_each_vector(n, [&](int64_t j, auto lanes) HWY_ATTR {
          const VF factor = factors != nullptr && m < n ? load(factors + j, lanes) : of_row;
          const VF u = hn::Mul(load(px + j, lanes), factor), p = load(pp + j, lanes);
          const VF shrink = hn::IfThenElseZero(hn::Ge(hn::Mul(u, p), set(0)), hn::Mul(decay, p));
          const VF updated = hn::Sub(hn::NegMulAdd(rate, u, p), shrink);
          store(updated, pp + j, lanes);
          if (compute != nullptr) store(updated, compute + i * n + j, lanes);
        });
      }
    });
  });
}

void MuonUpdate(const UpdatePlan& plan, const Tensor& rates, const Tensor& x, const Tensor* factors) {
  const int64_t m = x.dim(1), n = x.dim(2);
  const double shape = std::sqrt(std::max(1.0, static_cast<double>(m) / static_cast<double>(n)));
  with_float_type(x.dtype(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t k = 0; k < x.dim(0); ++k) {
      const UpdateSlot& slot = plan.slots()[static_cast<size_t>(k)];
      const MuonRates& r = group_rates<MuonRates>(rates, slot);
      const float* own = factors == nullptr ? nullptr : factors->as<float>() + k * std::max(m, n);
      CautiousUpdate(r.lr * shape, r.weight_decay, x.as<T>() + k * m * n, own, slot);
    }
  });
}

void AddProduct(double factor, const Tensor& x, const Tensor& out) {
  const VF f = set(narrow(factor));
  with_float_type(x.dtype(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* px = x.as<T>();
    T* po = out.as<T>();
    parallel_for(out.numel(), kGrain, [&](int64_t begin, int64_t end) {
      T product[hn::MaxLanes(F32())];
      for_each_vector(end - begin, [&](int64_t i, auto lanes) HWY_ATTR {
        const VF xi = load(px + begin + i, lanes), sum = load(po + begin + i, lanes);
        if constexpr (sizeof(T) == 4) {
          store(hn::MulAdd(f, xi, sum), po + begin + i, lanes);
        } else {
          store(hn::Mul(f, xi), product, Whole());
          store(hn::Add(load(product, Whole()), sum), po + begin + i, lanes);
        }
      });
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
HWY_EXPORT(MuonMomentum);
HWY_EXPORT(MuonEqualize);
HWY_EXPORT(MuonNormalize);
HWY_EXPORT(MuonVariance);
HWY_EXPORT(MuonUpdate);
HWY_EXPORT(AddProduct);
HWY_EXPORT(Axpby);
HWY_EXPORT(SumSquares);
HWY_EXPORT(FirstNonfinite);

void CpuBackend::zero_grads(const UpdatePlan& plan) {
  for (const UpdateSlot& slot : plan.slots()) fill(slot.grad, 0);
}

void CpuBackend::grad_norm(const UpdatePlan& plan, const Tensor& rates) {
  double sum = 0;
  for (const UpdateSlot& slot : plan.slots()) sum += HWY_DYNAMIC_DISPATCH(SumSquares)(slot.grad);
  finish_gradient_rates(sum, *rates.as<GradientRates>());
}

void CpuBackend::adamw(const UpdatePlan& plan, const Tensor& rates) {
  const GradientRates& gradients = *rates.as<GradientRates>();
  if (gradients.skip != 0) return;
  for (const UpdateSlot& slot : plan.slots()) {
    HWY_DYNAMIC_DISPATCH(AdamW)
    (rates.as<AdamWRates>()[slot.rates_row], static_cast<float>(gradients.factor), slot);
  }
}

void CpuBackend::muon_momentum(const UpdatePlan& plan, const Tensor& rates, const Tensor& x,
                               const Tensor& squares) {
  if (rates.as<GradientRates>()->skip != 0) {  // something finite to iterate on
    fill(x, 0);
    return fill(squares, 0);
  }
  HWY_DYNAMIC_DISPATCH(MuonMomentum)(plan, rates, x, squares);
}
void CpuBackend::muon_equalize(const Tensor& x, const Tensor& squares, const Tensor& squares_out) {
  HWY_DYNAMIC_DISPATCH(MuonEqualize)(x, squares, squares_out);
}
void CpuBackend::muon_normalize(const Tensor& x, const Tensor& squares, double factor, double eps) {
  HWY_DYNAMIC_DISPATCH(MuonNormalize)(x, squares, factor, eps);
}
void CpuBackend::add_product(double factor, const Tensor& x, const Tensor& out) {
  HWY_DYNAMIC_DISPATCH(AddProduct)(factor, x, out);
}
void CpuBackend::muon_variance(const UpdatePlan& plan, const Tensor& rates, const Tensor& x,
                               const Tensor& factors) {
  HWY_DYNAMIC_DISPATCH(MuonVariance)(plan, rates, x, factors);
}
void CpuBackend::muon_update(const UpdatePlan& plan, const Tensor& rates, const Tensor& x,
                             const Tensor* factors) {
  if (rates.as<GradientRates>()->skip != 0) return;
  HWY_DYNAMIC_DISPATCH(MuonUpdate)(plan, rates, x, factors);
}
void CpuBackend::axpby(double alpha, const Tensor& x, double beta, const Tensor& out) {
  HWY_DYNAMIC_DISPATCH(Axpby)(alpha, x, beta, out);
}
int64_t CpuBackend::first_nonfinite(const Tensor& x) { return HWY_DYNAMIC_DISPATCH(FirstNonfinite)(x); }

}  // namespace flexchat
#endif  // HWY_ONCE
