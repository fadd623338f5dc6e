// The second stage of sums over tokens: columns of a matrix of partial sums. A block takes up to 32 columns
// and kDeep rows for each of its threads; where there are more rows, a third stage adds up what the blocks
// found. Reads each partial once.
#include "backend/cuda/ops.cuh"

namespace flexchat::cuda {
namespace {

constexpr int kThreads = 1024, kDeep = 8;

// One column of in (rows, columns) for `lanes` neighbouring threads each, further rows for the others; the
// block's share is `slice` rows. sum_is(column, its sum) is called once a column.
template <class In, class F>
__device__ void sum_columns(const In* in, int64_t rows, int64_t slice, int64_t columns, int lanes, F sum_is) {
  __shared__ double sums[kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t column = static_cast<int64_t>(blockIdx.x) * lanes + thread % lanes;
  const int64_t begin = blockIdx.y * slice, end = begin + slice < rows ? begin + slice : rows;
  double sum = 0;
  if (column < columns) {
#pragma unroll kDeep
    for (int64_t i = begin + thread / lanes; i < end; i += kThreads / lanes) {
      sum += static_cast<double>(in[i * columns + column]);
    }
  }
  sums[thread] = sum;
  for (int count = kThreads / 2; count >= lanes; count /= 2) {
    __syncthreads();
    if (thread < count) sums[thread] += sums[thread + count];
  }
  if (thread < lanes && column < columns) sum_is(column, sums[thread]);
}

// out (slices, columns)
__global__ void __launch_bounds__(kThreads)
    slice_partials_kernel(const float* partials, int64_t rows, int64_t slice, int64_t columns, int lanes,
                          double* out) {
  sum_columns(partials, rows, slice, columns, lanes,
              [&](int64_t column, double sum) { out[blockIdx.y * columns + column] = sum; });
}
template <class In>
__global__ void __launch_bounds__(kThreads)
    add_partials_kernel(const In* partials, int64_t rows, int lanes, PartialSums a, PartialSums b) {
  const int64_t columns = a.columns + b.columns;
  sum_columns(partials, rows, rows, columns, lanes, [&](int64_t column, double sum) {
    const PartialSums& to = column < a.columns ? a : b;
    if (to.out)
      to.out[column < a.columns ? column : column - a.columns] += static_cast<float>(to.factor * sum);
  });
}

}  // namespace

void add_partials(Context& context, const Tensor& partials, const PartialSums& a, const PartialSums& b) {
  const int64_t rows = partials.dim(0), columns = partials.dim(1);
  const int lanes = group_lanes(columns);
  const int64_t slice = int64_t{kDeep} * (kThreads / lanes), slices = (rows + slice - 1) / slice;
  const unsigned blocks = block_count(columns, lanes);
  const auto work = [&](int64_t n, int size) {
    return Work{size * as_double(n * columns), as_double(n * columns)};
  };
  if (slices <= 1) {
    launch(context, "add_partials", work(rows, 4), add_partials_kernel<float>, dim3(blocks), dim3(kThreads),
           0, partials.as<float>(), rows, lanes, a, b);
    return;
  }
  const Tensor sums(context.arena(), {slices, columns}, DType::f64);
  launch(context, "slice_partials", work(rows, 4), slice_partials_kernel,
         dim3(blocks, static_cast<unsigned>(slices)), dim3(kThreads), 0, partials.as<float>(), rows, slice,
         columns, lanes, sums.as<double>());
  launch(context, "add_partials", work(slices, 8), add_partials_kernel<double>, dim3(blocks), dim3(kThreads),
         0, sums.as<double>(), slices, lanes, a, b);
}

}  // namespace flexchat::cuda
