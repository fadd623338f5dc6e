// Muon around its products, over a stack x (n, rows, cols) of matrices of one shape: one launch for all of
// them (muon_variance: two). A warp works on a row, a block of eight warps on kRowsPerBlock rows of one
// matrix; what a whole matrix decides (its norm) every block adds up for itself from the sums of its rows,
// which are few.
//   muon_momentum   reads g and the momentum, writes the momentum and x: 12 bytes an element + x
//   muon_equalize   x in place; the target norm of a row from all rows
//   muon_normalize  x in place
//   muon_variance   reads x; sums of squares along the shorter side, then factors (one block a matrix)
//   muon_update     reads x and p, writes p: 8 bytes an element + x, + 2 with a compute copy
// Within a row sums are f32 in a fixed order, across rows double. When rates say `skip`, x is all zeros and
// nothing else changes.
#include <algorithm>
#include <cmath>

#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/optim.cuh"

namespace flexchat::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kRowsPerBlock = 32;
constexpr int kFinishThreads = 512;

// A scalar as a tensor of T would hold it.
template <class T>
__device__ double rounded(double x) {
  return static_cast<double>(to_float(from_float<T>(static_cast<float>(x))));
}

// f(row) for the rows of this block that are this warp's.
template <class F>
__device__ void for_rows(int64_t rows, F&& f) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock;
  const int64_t end = rows - begin < kRowsPerBlock ? rows : begin + kRowsPerBlock;
  for (int64_t row = begin + threadIdx.x / kWarp; row < end; row += kWarps) f(row);
}
// f(column, count) for this lane's columns of a row, up to eight at a time.
template <class F>
__device__ void for_columns(int64_t cols, F&& f) {
  for (int64_t j = threadIdx.x % kWarp * 8; j < cols; j += kWarp * 8) f(j, cols - j < 8 ? cols - j : 8);
}

// Every element of a row times `factor`; returns the sum of squares of what is stored, in every lane.
template <class T>
__device__ float scale_row(T* row, int64_t cols, float factor, bool whole) {
  float sum = 0;
  for_columns(cols, [&](int64_t j, int64_t count) {
    float x[8];
    load_at(row + j, count, whole, x);
#pragma unroll
    for (float& v : x) {
      v = to_float(from_float<T>(v * factor));
      sum = fmaf(v, v, sum);
    }
    store_at(row + j, count, whole, x);
  });
  return warp_sum(sum);
}

// The sum of n numbers in double, in every thread of the block.
template <int kBlock>
__device__ double block_total(const float* x, int64_t n) {
  double sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < n; i += kBlock) sum += static_cast<double>(x[i]);
  return block_sum<kBlock>(sum);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    momentum_kernel(const PlannedSlot* slots, const double* rates, T* x, float* squares, int64_t rows,
                    int64_t cols, bool by_eights) {
  const PlannedSlot slot = slots[blockIdx.y];
  const GradientRates& gradient = gradient_rates(rates);
  const MuonRates& r = group_rates<MuonRates>(rates, slot.rates_row);
  const float factor = static_cast<float>(gradient.factor), mu = static_cast<float>(r.momentum);
  const float weight = static_cast<float>(1 - r.momentum);
  const bool skip = gradient.skip != 0, whole = by_eights && slot.aligned;
  for_rows(rows, [&](int64_t row) {
    float sum = 0;
    for_columns(cols, [&](int64_t j, int64_t count) {
      float g[8], b[8], out[8];
      load_at(slot.grad + row * cols + j, count, whole, g);
      load_at(slot.first + row * cols + j, count, whole, b);
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        g[k] *= factor;
        b[k] = fmaf(weight, g[k] - b[k], b[k]);
        out[k] = skip ? 0.0f : to_float(from_float<T>(fmaf(mu, b[k] - g[k], g[k])));
        sum = fmaf(out[k], out[k], sum);
      }
      if (!skip) store_at(slot.first + row * cols + j, count, whole, b);
      store_at(x + (blockIdx.y * rows + row) * cols + j, count, whole, out);
    });
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) squares[blockIdx.y * rows + row] = sum;
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    equalize_kernel(T* x, const float* squares, float* squares_out, int64_t rows, int64_t cols, bool whole) {
  const float* before = squares + blockIdx.y * rows;
  const double target = sqrt(block_total<kThreads>(before, rows) / static_cast<double>(rows));
  for_rows(rows, [&](int64_t row) {
    const double norm = fmax(sqrt(static_cast<double>(before[row])), 1e-6);
    const auto factor = static_cast<float>(rounded<T>(target / norm));
    const float sum = scale_row(x + (blockIdx.y * rows + row) * cols, cols, factor, whole);
    if (threadIdx.x % kWarp == 0) squares_out[blockIdx.y * rows + row] = sum;
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    normalize_kernel(T* x, const float* squares, double factor, double eps, int64_t rows, int64_t cols,
                     bool whole) {
  const double norm = rounded<T>(sqrt(block_total<kThreads>(squares + blockIdx.y * rows, rows)));
  const auto inverse = static_cast<float>(1 / rounded<T>(rounded<T>(factor * norm) + eps));
  for_rows(rows, [&](int64_t row) { scale_row(x + (blockIdx.y * rows + row) * cols, cols, inverse, whole); });
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    row_squares_kernel(const T* x, float* sums, int64_t rows, int64_t cols, bool whole) {
  for_rows(rows, [&](int64_t row) {
    float sum = 0;
    for_columns(cols, [&](int64_t j, int64_t count) {
      float v[8];
      load_at(x + (blockIdx.y * rows + row) * cols + j, count, whole, v);
#pragma unroll
      for (float a : v) sum = fmaf(a, a, sum);
    });
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) sums[blockIdx.y * rows + row] = sum;
  });
}

// A block sums kWarp * 8 columns: each warp every eighth row, then the warps one after another.
constexpr int kColumnsPerBlock = kWarp * 8;
template <class T>
__global__ void __launch_bounds__(kThreads)
    column_squares_kernel(const T* x, float* sums, int64_t rows, int64_t cols, bool whole) {
  __shared__ float partial[kWarps][kColumnsPerBlock];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kColumnsPerBlock, j = first + lane * 8;
  float sum[8] = {};
  if (j < cols) {
#pragma unroll 4
    for (int64_t row = warp; row < rows; row += kWarps) {
      float v[8];
      load_at(x + (blockIdx.y * rows + row) * cols + j, cols - j, whole, v);
#pragma unroll
      for (int k = 0; k < 8; ++k) sum[k] = fmaf(v[k], v[k], sum[k]);
    }
  }
#pragma unroll
  for (int k = 0; k < 8; ++k) partial[warp][lane * 8 + k] = sum[k];
  __syncthreads();
  const int64_t column = first + threadIdx.x;
  if (column >= cols) return;
  float total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += partial[w][threadIdx.x];
  sums[blockIdx.y * cols + column] = total;
}
static_assert(kColumnsPerBlock == kThreads);

// One block for each matrix: `sums` (n, length), the sums of squares along the shorter side q, become
// factors.
__global__ void __launch_bounds__(kFinishThreads)
    variance_kernel(const PlannedSlot* slots, const double* rates, float* sums, double q, int64_t length) {
  const PlannedSlot slot = slots[blockIdx.x];
  const double weight = 1 - group_rates<MuonRates>(rates, slot.rates_row).beta2;
  const bool skip = gradient_rates(rates).skip != 0;
  float* own = sums + blockIdx.x * length;
  const double total = block_total<kFinishThreads>(own, length);
  const double plus = sqrt(q) / fmax(sqrt(total), 1e-6);
  const auto updated = [&](int64_t i) {
    const double before = static_cast<double>(slot.second[i]);
    return before + weight * (static_cast<double>(own[i]) * plus * plus / q - before);
  };
  double after = 0;
  for (int64_t i = threadIdx.x; i < length; i += kFinishThreads)
    after += static_cast<double>(own[i]) * plus * plus / fmax(updated(i), 1e-10);
  after = block_sum<kFinishThreads>(after);
  const double keep = plus * plus * sqrt(total) / fmax(sqrt(after), 1e-10);
  for (int64_t i = threadIdx.x; i < length; i += kFinishThreads) {
    const double now = updated(i);
    if (!skip) slot.second[i] = static_cast<float>(now);
    own[i] = static_cast<float>(keep / sqrt(fmax(now, 1e-10)));
  }
}

// factors (n, rows) or (n, cols), whichever is longer (rows if equal), or null.
template <class T>
__global__ void __launch_bounds__(kThreads)
    update_kernel(const PlannedSlot* slots, const double* rates, const T* x, const float* factors,
                  double shape_factor, int64_t rows, int64_t cols, bool by_eights) {
  if (gradient_rates(rates).skip != 0) return;
  const PlannedSlot slot = slots[blockIdx.y];
  const MuonRates& r = group_rates<MuonRates>(rates, slot.rates_row);
  const double lr = r.lr * shape_factor;
  const float rate = static_cast<float>(lr), decay = static_cast<float>(lr * r.weight_decay);
  const bool whole = by_eights && slot.aligned, of_rows = rows >= cols;
  const float* own = factors == nullptr ? nullptr : factors + blockIdx.y * (of_rows ? rows : cols);
  for_rows(rows, [&](int64_t row) {
    const float of_row = own != nullptr && of_rows ? own[row] : 1.0f;
    for_columns(cols, [&](int64_t j, int64_t count) {
      const int64_t at = row * cols + j;
      float u[8], p[8], f[8];
      load_at(x + blockIdx.y * rows * cols + at, count, whole, u);
      load_at(slot.value + at, count, whole, p);
      if (own != nullptr && !of_rows) load_at(own + j, count, whole, f);
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const float step = u[k] * (own != nullptr && !of_rows ? f[k] : of_row);
        const float shrink = step * p[k] >= 0 ? decay * p[k] : 0.0f;
        p[k] = fmaf(-rate, step, p[k]) - shrink;
      }
      store_at(slot.value + at, count, whole, p);
      store_compute(slot, at, count, whole, p);
    });
  });
}

// The stack's blocks: rows by kRowsPerBlock, then matrices.
dim3 row_grid(const Tensor& x) {
  return dim3(block_count(x.dim(1), kRowsPerBlock), static_cast<unsigned>(x.dim(0)));
}
// Do rows of x start where 16-byte accesses may, and end there too?
bool by_eights(const Tensor& x) { return x.dim(2) % 8 == 0 && aligned16({x.data()}); }
double elements(const Tensor& x) { return static_cast<double>(x.numel()); }
double bytes_of(const Tensor& x) { return static_cast<double>(x.bytes()); }

}  // namespace

void CudaBackend::muon_momentum(const UpdatePlan& plan, const Tensor& rates, const Tensor& x,
                                const Tensor& squares) {
  for_dtype(x.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(context_, "muon_momentum", {12 * elements(x) + bytes_of(x), 8 * elements(x)}, momentum_kernel<T>,
           row_grid(x), kThreads, 0, cuda_plan(plan).slot_table(), rates.as<double>(), x.as<T>(),
           squares.as<float>(), x.dim(1), x.dim(2), by_eights(x));
  });
}

void CudaBackend::muon_equalize(const Tensor& x, const Tensor& squares, const Tensor& squares_out) {
  for_dtype(x.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(context_, "muon_equalize", {2 * bytes_of(x), 3 * elements(x)}, equalize_kernel<T>, row_grid(x),
           kThreads, 0, x.as<T>(), squares.as<float>(), squares_out.as<float>(), x.dim(1), x.dim(2),
           by_eights(x));
  });
}

void CudaBackend::muon_normalize(const Tensor& x, const Tensor& squares, double factor, double eps) {
  for_dtype(x.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(context_, "muon_normalize", {2 * bytes_of(x), elements(x)}, normalize_kernel<T>, row_grid(x),
           kThreads, 0, x.as<T>(), squares.as<float>(), factor, eps, x.dim(1), x.dim(2), by_eights(x));
  });
}

void CudaBackend::muon_variance(const UpdatePlan& plan, const Tensor& rates, const Tensor& x,
                                const Tensor& factors) {
  const int64_t rows = x.dim(1), cols = x.dim(2);
  for_dtype(x.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const dim3 grid = rows >= cols
                          ? row_grid(x)
                          : dim3(block_count(cols, kColumnsPerBlock), static_cast<unsigned>(x.dim(0)));
    launch(context_, "muon_squares", {bytes_of(x), 2 * elements(x)},
           rows >= cols ? row_squares_kernel<T> : column_squares_kernel<T>, grid, kThreads, 0, x.as<T>(),
           factors.as<float>(), rows, cols, by_eights(x));
  });
  launch(context_, "muon_variance", {4 * bytes_of(factors), 20 * elements(factors)}, variance_kernel,
         static_cast<unsigned>(x.dim(0)), kFinishThreads, 0, cuda_plan(plan).slot_table(), rates.as<double>(),
         factors.as<float>(), static_cast<double>(std::min(rows, cols)), std::max(rows, cols));
}

void CudaBackend::muon_update(const UpdatePlan& plan, const Tensor& rates, const Tensor& x,
                              const Tensor* factors) {
  const int64_t rows = x.dim(1), cols = x.dim(2);
  const double shape = std::sqrt(std::max(1.0, static_cast<double>(rows) / static_cast<double>(cols)));
  double copied = 0;
  for (const UpdateSlot& slot : plan.slots()) copied += slot.compute.defined() ? bytes_of(slot.compute) : 0;
  for_dtype(x.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(context_, "muon_update", {8 * elements(x) + bytes_of(x) + copied, 6 * elements(x)},
           update_kernel<T>, row_grid(x), kThreads, 0, cuda_plan(plan).slot_table(), rates.as<double>(),
           x.as<T>(), factors == nullptr ? nullptr : factors->as<float>(), shape, rows, cols, by_eights(x));
  });
}

}  // namespace flexchat::cuda
