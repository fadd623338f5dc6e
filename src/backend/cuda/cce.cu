// Softmax over panels of columns: the kernels under the chunked and the cce loss.
//   z = cap * tanh(x / cap);  sum = sum_j exp(z_j - shift);  lse = shift + log(sum)
//   d nll / d x_j = (exp(z_j - lse) - [j = target]) * (1 - (z_j / cap)^2)
// One block a row of a panel (N, columns). A panel is read once, 4 bytes an element, and its gradient, where
// there is one, written once; panels are sized to stay in L2 between the product that writes them and these
// kernels. Some 12 FLOPs and three special functions (two exponentials and a reciprocal) an element: at 16 a
// clock and multiprocessor an H200 does 1.2e12 elements a second, which bounds these kernels, not memory.
#include <cfloat>
#include <climits>
#include <cmath>
#include <type_traits>

#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/reduce.cuh"

namespace flexchat::cuda {
namespace {

constexpr int kThreads = 256;
constexpr float kLog2E = 1.4426950408889634f;

// 2^x and 1/x to 2 ulp in one instruction each; NaN stays NaN.
__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// tanh(x / cap) with k = 2 log2(e) / cap: 1 - 2/(e^{2x/cap} + 1), off by 2e-7 at most. What matters is the
// absolute error of z, some 3e-6 at a cap of 15.
__device__ inline float capped_unit(float x, float k) {
  return fmaf(-2.0f, fast_reciprocal(1.0f + fast_exp2(x * k)), 1.0f);
}

// exp(from - to), 0 for what has not begun (-inf).
__device__ inline float rescale(float from, float to) {
  return from == -INFINITY ? 0.0f : fast_exp2((from - to) * kLog2E);
}

enum class Shift {
  plain,   // no softcap: the largest logit
  capped,  // a softcap too large for the next: the largest capped logit
  cap      // the cap itself
};

struct RowPointers {
  float *shift, *sum, *target, *best;
  int32_t* argmax;
};

// A target's column in this panel, or -1.
__device__ inline int column_of(int64_t offset, int columns) {
  return offset >= 0 && offset < columns ? static_cast<int>(offset) : -1;
}

// ---- statistics -------------------------------------------------------------------------------------------
struct PanelArguments {
  const float* logits;
  const int32_t* targets;
  int64_t first;
  int columns;
  float cap;
  RowPointers rows;
  void* unscaled;
  int64_t vocab;  // the row length of unscaled
};

// The running largest z and where it stands first.
struct Best {
  float z = -INFINITY;
  int at = INT_MAX;
  __device__ void see(float x, int i) {
    if (x > z || (at == INT_MAX && x == x)) {
      z = x;
      at = i;
    }
  }
};

__device__ void store_best(const Best& mine, const PanelArguments& a, int64_t row) {
  const float largest = block_reduce<kThreads>(mine.z, Max{});
  const int at = block_reduce<kThreads>(mine.z == largest ? mine.at : INT_MAX, Min{});
  if (threadIdx.x != 0) return;
  const bool start = a.first == 0;
  if (start) a.rows.argmax[row] = -1;
  if (at == INT_MAX || (!start && a.rows.argmax[row] >= 0 && !(largest > a.rows.best[row]))) return;
  a.rows.best[row] = largest;
  a.rows.argmax[row] = static_cast<int32_t>(a.first) + at;
}

// Adds the block's sums, each of exp(z - its thread's shift), to those of the row.
template <Shift kShift>
__device__ void store_sum(float shift, float sum, const PanelArguments& a, int64_t row) {
  const bool start = a.first == 0;
  if constexpr (kShift == Shift::cap) {
    sum = block_sum<kThreads>(sum);
    if (threadIdx.x != 0) return;
    a.rows.shift[row] = a.cap;
    a.rows.sum[row] = start ? sum : a.rows.sum[row] + sum;
  } else {
    const float largest = block_reduce<kThreads>(shift, Max{});
    sum = block_sum<kThreads>(sum * rescale(shift, largest));
    if (threadIdx.x != 0) return;
    const float before = start ? -INFINITY : a.rows.shift[row], old = start ? 0.0f : a.rows.sum[row];
    const float now = fmaxf(before, largest);
    a.rows.shift[row] = now;
    a.rows.sum[row] = old * rescale(before, now) + sum * rescale(largest, now);
  }
}

// Out: the type of `unscaled`, or void without one.
template <int kVec, Shift kShift, bool kArgmax, class Out>
__global__ void __launch_bounds__(kThreads) softmax_panel_kernel(PanelArguments a) {
  const int64_t row = blockIdx.x;
  const float* logits = a.logits + row * a.columns;
  const int64_t target = a.targets[row];
  const bool ignored = target < 0;
  const int here = column_of(target - a.first, a.columns);
  const float k = 2 * kLog2E / a.cap;
  float shift = kShift == Shift::cap ? a.cap : -INFINITY, sum = 0;
  Best best;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x) * kVec; i < a.columns; i += kThreads * kVec) {
    Vec<float, kVec> z = load_vec<float, kVec>(logits + i), unit{};
    float largest = shift;
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      if constexpr (kShift != Shift::plain) {
        unit[j] = capped_unit(z[j], k);
        z[j] = a.cap * unit[j];
      }
      if constexpr (kShift != Shift::cap) largest = fmaxf(largest, z[j]);
      if constexpr (kArgmax) best.see(z[j], i + j);
      if (i + j == here) a.rows.target[row] = z[j];
    }
    if constexpr (kShift != Shift::cap) {
      sum *= rescale(shift, largest);
      shift = largest;
    }
    const float subtract = (shift == -INFINITY ? 0.0f : shift) * kLog2E;
    [[maybe_unused]] Vec<std::conditional_t<std::is_void_v<Out>, float, Out>, kVec> out;
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      const float e = fast_exp2(fmaf(z[j], kLog2E, -subtract));
      sum += e;
      if constexpr (!std::is_void_v<Out>) {
        out[j] = from_float<Out>(ignored ? 0.0f : e * fmaf(-unit[j], unit[j], 1.0f));
      }
    }
    if constexpr (!std::is_void_v<Out>) {
      store_vec(static_cast<Out*>(a.unscaled) + row * a.vocab + a.first + i, out);
    }
  }
  if (threadIdx.x == 0 && a.first == 0 && here < 0) a.rows.target[row] = 0;
  store_sum<kShift>(shift, sum, a, row);
  if constexpr (kArgmax) store_best(best, a, row);
}

template <int kVec, Shift kShift, class Out>
void launch_panel(Context& context, const PanelArguments& a, int64_t n, const Work& work) {
  const auto grid = dim3(static_cast<unsigned>(n));
  const auto kernel = a.rows.argmax ? softmax_panel_kernel<kVec, kShift, true, Out>
                                    : softmax_panel_kernel<kVec, kShift, false, Out>;
  launch(context, "softmax_panel", work, kernel, grid, dim3(kThreads), 0, a);
}

template <int kVec>
void launch_panel(Context& context, const PanelArguments& a, DType dtype, int64_t n, const Work& work) {
  if (!(a.cap > 0)) return launch_panel<kVec, Shift::plain, void>(context, a, n, work);
  if (a.cap > static_cast<float>(kShiftCap)) {
    return launch_panel<kVec, Shift::capped, void>(context, a, n, work);
  }
  if (!a.unscaled) return launch_panel<kVec, Shift::cap, void>(context, a, n, work);
  if (dtype == DType::bf16) return launch_panel<kVec, Shift::cap, bf16>(context, a, n, work);
  check(dtype == DType::f32, "softmax_panel: unscaled gradients in {} (allowed: bf16, f32)",
        dtype_name(dtype));
  launch_panel<kVec, Shift::cap, float>(context, a, n, work);
}

__global__ void __launch_bounds__(kThreads)
    softmax_nll_kernel(const float* shift, const float* sum, const float* target_logit,
                       const int32_t* targets, float* lse, float* nll, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  const float l = shift[i] + logf(sum[i]);
  lse[i] = l;
  nll[i] = targets[i] < 0 ? 0.0f : l - target_logit[i];
}

template <class Out>
__global__ void __launch_bounds__(kThreads)
    softmax_factor_kernel(const float* lse, const float* target_logit, const int32_t* targets, float cap,
                          float weight, Out* unscaled, int64_t vocab, float* factor, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  const int32_t target = targets[i];
  if (target < 0) {
    factor[i] = 0;
    return;
  }
  const float l = lse[i], z = target_logit[i], unit = z / cap;
  factor[i] = weight * expf(cap - l);
  // exp(z - cap) - exp(lse - cap), without cancellation where the target has nearly all the probability.
  const float difference = expf(l - cap) * expm1f(z - l);
  if (target < vocab) unscaled[i * vocab + target] = from_float<Out>(difference * (1 - unit * unit));
}

// ---- gradients --------------------------------------------------------------------------------------------
template <int kVec, bool kCap, class T>
__global__ void __launch_bounds__(kThreads)
    softmax_gradient_kernel(const float* logits, const int32_t* targets, int64_t first, int columns,
                            float cap, float weight, const float* lse, T* grad) {
  const int64_t row = blockIdx.x;
  const float* x = logits + row * columns;  // may be grad itself: an element is read before it is written
  T* out = grad + row * columns;
  const int64_t target = targets[row];
  const int here = column_of(target - first, columns);
  const float k = 2 * kLog2E / cap, l = lse[row], subtract = l * kLog2E;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x) * kVec; i < columns; i += kThreads * kVec) {
    const Vec<float, kVec> logit = load_vec<float, kVec>(x + i);
    Vec<T, kVec> g;
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      float z = logit[j], slope = 1;
      if constexpr (kCap) {
        const float unit = capped_unit(z, k);
        z = cap * unit;
        slope = fmaf(-unit, unit, 1.0f);
      }
      float p = fast_exp2(fmaf(z, kLog2E, -subtract));
      if (i + j == here) p = expm1f(z - l);
      g[j] = from_float<T>(target < 0 ? 0.0f : weight * p * slope);
    }
    store_vec(out + i, g);
  }
}

// ---- rows times a factor ----------------------------------------------------------------------------------
template <class X, class T>
__global__ void __launch_bounds__(kThreads)
    row_scale_kernel(const X* x, const float* factor, T* out, int64_t c, bool vectors) {
  const int64_t row = blockIdx.x;
  const float f = factor[row];
  const X* from = x + row * c;
  T* to = out + row * c;
  for (int64_t i = threadIdx.x * 8; i < c; i += kThreads * 8) {
    float v[8];
    const int64_t left = c - i;
    if (vectors) {
      load8(from + i, v);
    } else {
      load_some(from + i, left, v);
    }
#pragma unroll
    for (float& element : v) element *= f;
    if (vectors) {
      store8(to + i, v);
    } else {
      store_some(to + i, left, v);
    }
  }
}

double as_double(int64_t n) { return static_cast<double>(n); }
constexpr double kFlops = 15;  // an element of a panel, special functions included

}  // namespace

void CudaBackend::softmax_panel(const Tensor& logits, const Tensor& targets, int64_t first, double cap,
                                const SoftmaxRows& rows, const Tensor* unscaled) {
  const int64_t n = logits.dim(0), columns = logits.dim(1);
  const bool with_argmax = rows.argmax.defined();
  PanelArguments a{
      logits.as<float>(),
      targets.as<int32_t>(),
      first,
      static_cast<int>(columns),
      static_cast<float>(cap),
      {rows.shift.as<float>(), rows.sum.as<float>(), rows.target.as<float>(),
       with_argmax ? rows.best.as<float>() : nullptr, with_argmax ? rows.argmax.as<int32_t>() : nullptr},
      unscaled ? unscaled->data() : nullptr,
      unscaled ? unscaled->dim(1) : 0};
  const DType dtype = unscaled ? unscaled->dtype() : DType::f32;
  check(!unscaled || (cap > 0 && cap <= kShiftCap), "softmax_panel: no unscaled gradient for a cap of {}",
        cap);
  const bool vectors = columns % 4 == 0 && first % 4 == 0 && a.vocab % 4 == 0 &&
                       aligned16({logits.data(), unscaled ? unscaled->data() : nullptr});
  const double elements = as_double(logits.numel());
  const Work work{elements * as_double(4 + (unscaled ? dtype_size(dtype) : 0)), elements * kFlops};
  if (vectors) {
    launch_panel<4>(context_, a, dtype, n, work);
  } else {
    launch_panel<1>(context_, a, dtype, n, work);
  }
}

void CudaBackend::softmax_nll(const SoftmaxRows& rows, const Tensor& targets, const Tensor& lse,
                              const Tensor& nll) {
  const int64_t n = lse.numel();
  launch(context_, "softmax_nll", {24 * as_double(n), 20 * as_double(n)}, softmax_nll_kernel,
         dim3(block_count(n, kThreads)), dim3(kThreads), 0, rows.shift.as<float>(), rows.sum.as<float>(),
         rows.target.as<float>(), targets.as<int32_t>(), lse.as<float>(), nll.as<float>(), n);
}

void CudaBackend::softmax_factor(const SoftmaxRows& rows, const Tensor& lse, const Tensor& targets,
                                 double cap, double weight, const Tensor& unscaled, const Tensor& factor) {
  const int64_t n = lse.numel();
  for_dtype(unscaled.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(context_, "softmax_factor",
           {as_double(n * (16 + dtype_size(unscaled.dtype()))), 60 * as_double(n)}, softmax_factor_kernel<T>,
           dim3(block_count(n, kThreads)), dim3(kThreads), 0, lse.as<float>(), rows.target.as<float>(),
           targets.as<int32_t>(), static_cast<float>(cap), static_cast<float>(weight), unscaled.as<T>(),
           unscaled.dim(1), factor.as<float>(), n);
  });
}

bool CudaBackend::softmax_gradient(const Tensor& logits, const Tensor& targets, int64_t first, double cap,
                                   double weight, const Tensor& lse, double filter, const Tensor& grad) {
  check(filter <= 0, "softmax_gradient on a device has no filter");
  const int64_t n = logits.dim(0), columns = logits.dim(1);
  const double elements = as_double(logits.numel());
  const bool vectors = columns % 4 == 0 && aligned16({logits.data(), grad.data()});
  for_dtype(grad.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto kernel =
        vectors ? (cap > 0 ? softmax_gradient_kernel<4, true, T> : softmax_gradient_kernel<4, false, T>)
                : (cap > 0 ? softmax_gradient_kernel<1, true, T> : softmax_gradient_kernel<1, false, T>);
    launch(context_, "softmax_gradient",
           {elements * as_double(4 + dtype_size(grad.dtype())), elements * kFlops}, kernel,
           dim3(static_cast<unsigned>(n)), dim3(kThreads), 0, logits.as<float>(), targets.as<int32_t>(),
           first, static_cast<int>(columns), static_cast<float>(cap), static_cast<float>(weight),
           lse.as<float>(), grad.as<T>());
  });
  return true;
}

void CudaBackend::row_scale(const Tensor& x, const Tensor& factor, const Tensor& out) {
  const int64_t c = x.dim(1);
  const bool vectors = c % 8 == 0 && aligned16({x.data(), out.data()});
  for_dtype(x.dtype(), [&](auto x_tag) {
    using X = typename decltype(x_tag)::type;
    for_dtype(out.dtype(), [&](auto out_tag) {
      using T = typename decltype(out_tag)::type;
      launch(context_, "row_scale", {as_double(x.bytes() + out.bytes()), as_double(x.numel())},
             row_scale_kernel<X, T>, dim3(static_cast<unsigned>(x.dim(0))), dim3(kThreads), 0, x.as<X>(),
             factor.as<float>(), out.as<T>(), c, vectors);
    });
  });
}

}  // namespace flexchat::cuda
