// Optimizer updates that walk the parameters of a plan in one launch, and the element-wise helpers of Muon's
// iterations. A block of 256 threads works on one piece of kPiece elements of one parameter.
//   zero_grads   g = 0                                             4 bytes an element
//   grad_norm    sqrt(sum g^2): a double for each piece, then one block adds them in order; 4 bytes
//   adamw        see Backend::adamw; reads g, p, m, v and writes p, m, v: 28 bytes, 30 with a compute copy
//   axpby, add_product   element-wise
// Rates come from device memory (backend/update_rates.h), so all of it can be captured.
#include <algorithm>
#include <limits>

#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/optim.cuh"

namespace flexchat::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kFinishThreads = 1024;

unsigned grid_of(const CudaUpdatePlan& plan) { return static_cast<unsigned>(plan.piece_count()); }

// f(index, count) over a piece by eights: the elements [index, index + count) are this thread's, count is 8
// but at the end.
template <class F>
__device__ void for_piece(const Piece& piece, int64_t numel, F&& f) {
  const int64_t begin = piece.piece * kPiece;
  const int64_t end = numel - begin < kPiece ? numel : begin + kPiece;
  for (int64_t i = begin + threadIdx.x * 8; i < end; i += kThreads * 8) f(i, end - i < 8 ? end - i : 8);
}

__global__ void __launch_bounds__(kThreads) zero_kernel(const PlannedSlot* slots, const Piece* pieces) {
  const Piece piece = pieces[blockIdx.x];
  const PlannedSlot slot = slots[piece.slot];
  float* grad = const_cast<float*>(slot.grad);
  const float zeros[8] = {};
  for_piece(piece, slot.numel,
            [&](int64_t i, int64_t count) { store_at(grad + i, count, slot.aligned, zeros); });
}

__global__ void __launch_bounds__(kThreads)
    sum_squares_kernel(const PlannedSlot* slots, const Piece* pieces, double* partials) {
  const Piece piece = pieces[blockIdx.x];
  const PlannedSlot slot = slots[piece.slot];
  double sum = 0;
  for_piece(piece, slot.numel, [&](int64_t i, int64_t count) {
    float g[8];
    load_at(slot.grad + i, count, slot.aligned, g);
#pragma unroll
    for (float x : g) sum += static_cast<double>(x) * static_cast<double>(x);
  });
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kFinishThreads)
    finish_norm_kernel(const double* partials, int64_t n, double* rates) {
  double sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < n; i += kFinishThreads) sum += partials[i];
  sum = block_sum<kFinishThreads>(sum);
  if (threadIdx.x == 0) finish_gradient_rates(sum, *reinterpret_cast<GradientRates*>(rates));
}

// The rates of one AdamW group as f32 arithmetic uses them.
struct AdamWFloats {
  float factor, decay, rate, mean_weight, square_weight, unbias, eps;
};
__device__ AdamWFloats adamw_floats(const double* rates, int32_t row) {
  const GradientRates& gradient = gradient_rates(rates);
  const auto& r = group_rates<AdamWRates>(rates, row);
  return {static_cast<float>(gradient.factor),
          static_cast<float>(r.decay),
          static_cast<float>(r.rate),
          static_cast<float>(r.mean_weight),
          static_cast<float>(r.square_weight),
          static_cast<float>(r.unbias),
          static_cast<float>(r.eps)};
}

__device__ void adamw_element(const AdamWFloats& r, float grad, float& p, float& m, float& v) {
  const float g = grad * r.factor;
  m = fmaf(r.mean_weight, g - m, m);
  v = fmaf(r.square_weight, g * g - v, v);
  p = p * r.decay - r.rate * (m / fmaf(sqrtf(v), r.unbias, r.eps));
}

__global__ void __launch_bounds__(kThreads)
    adamw_kernel(const PlannedSlot* slots, const Piece* pieces, const double* rates) {
  if (gradient_rates(rates).skip != 0) return;
  const Piece piece = pieces[blockIdx.x];
  const PlannedSlot slot = slots[piece.slot];
  const AdamWFloats r = adamw_floats(rates, slot.rates_row);
  for_piece(piece, slot.numel, [&](int64_t i, int64_t count) {
    float g[8], p[8], m[8], v[8];
    load_at(slot.grad + i, count, slot.aligned, g);
    load_at(slot.value + i, count, slot.aligned, p);
    load_at(slot.first + i, count, slot.aligned, m);
    load_at(slot.second + i, count, slot.aligned, v);
#pragma unroll
    for (int k = 0; k < 8; ++k) adamw_element(r, g[k], p[k], m[k], v[k]);
    store_at(slot.value + i, count, slot.aligned, p);
    store_at(slot.first + i, count, slot.aligned, m);
    store_at(slot.second + i, count, slot.aligned, v);
    store_compute(slot, i, count, slot.aligned, p);
  });
}

template <class X, class Y>
__global__ void __launch_bounds__(kThreads)
    axpby_kernel(float alpha, const X* x, float beta, Y* out, int64_t n, bool aligned) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 8;
  if (i >= n) return;
  const int64_t count = n - i < 8 ? n - i : 8;
  float a[8], b[8] = {};
  load_at(x + i, count, aligned, a);
  if (beta != 0) load_at(out + i, count, aligned, b);
#pragma unroll
  for (int k = 0; k < 8; ++k) b[k] = fmaf(alpha, a[k], beta * b[k]);
  store_at(out + i, count, aligned, b);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    add_product_kernel(float factor, const T* x, T* out, int64_t n, bool aligned) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 8;
  if (i >= n) return;
  const int64_t count = n - i < 8 ? n - i : 8;
  float a[8], b[8];
  load_at(x + i, count, aligned, a);
  load_at(out + i, count, aligned, b);
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    if constexpr (sizeof(T) == 4) {
      b[k] = fmaf(factor, a[k], b[k]);
    } else {
      b[k] += to_float(from_float<T>(factor * a[k]));
    }
  }
  store_at(out + i, count, aligned, b);
}

}  // namespace

void CudaBackend::zero_grads(const UpdatePlan& plan) {
  const CudaUpdatePlan& p = cuda_plan(plan);
  launch(context_, "zero_grads", {4 * p.numel(), 0}, zero_kernel, grid_of(p), kThreads, 0, p.slot_table(),
         p.pieces());
}

void CudaBackend::grad_norm(const UpdatePlan& plan, const Tensor& rates) {
  const CudaUpdatePlan& p = cuda_plan(plan);
  launch(context_, "grad_norm", {4 * p.numel(), 2 * p.numel()}, sum_squares_kernel, grid_of(p), kThreads, 0,
         p.slot_table(), p.pieces(), p.partials());
  launch(context_, "grad_norm_finish", {8.0 * static_cast<double>(p.piece_count()), 0}, finish_norm_kernel, 1,
         kFinishThreads, 0, p.partials(), p.piece_count(), rates.as<double>());
}

void CudaBackend::adamw(const UpdatePlan& plan, const Tensor& rates) {
  const CudaUpdatePlan& p = cuda_plan(plan);
  double copied = 0;
  for (const UpdateSlot& slot : plan.slots())
    copied += slot.compute.defined() ? static_cast<double>(slot.compute.bytes()) : 0;
  launch(context_, "adamw", {28 * p.numel() + copied, 13 * p.numel()}, adamw_kernel, grid_of(p), kThreads, 0,
         p.slot_table(), p.pieces(), rates.as<double>());
}

void CudaBackend::axpby(double alpha, const Tensor& x, double beta, const Tensor& out) {
  const int64_t n = out.numel();
  const bool aligned = aligned16({x.data(), out.data()});
  const double bytes = static_cast<double>(x.bytes() + (beta == 0 ? 1 : 2) * out.bytes());
  for_dtype(x.dtype(), [&](auto tag_x) {
    using X = typename decltype(tag_x)::type;
    for_dtype(out.dtype(), [&](auto tag_out) {
      using Y = typename decltype(tag_out)::type;
      launch(context_, "axpby", {bytes, 3.0 * static_cast<double>(n)}, axpby_kernel<X, Y>,
             block_count(n, kThreads * 8), kThreads, 0, alpha, x.as<X>(), beta, out.as<Y>(), n, aligned);
    });
  });
}

void CudaBackend::add_product(double factor, const Tensor& x, const Tensor& out) {
  const int64_t n = out.numel();
  const bool aligned = aligned16({x.data(), out.data()});
  for_dtype(x.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(context_, "add_product", {3.0 * static_cast<double>(out.bytes()), 2.0 * static_cast<double>(n)},
           add_product_kernel<T>, block_count(n, kThreads * 8), kThreads, 0, factor, x.as<T>(), out.as<T>(),
           n, aligned);
  });
}

}  // namespace flexchat::cuda
