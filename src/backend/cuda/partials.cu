// The second stage of sums over tokens: columns of a matrix of partial sums. One block for up to 32 columns;
// reads each partial once.
#include "backend/cuda/ops.cuh"

namespace flexchat::cuda {
namespace {

constexpr int kThreads = 1024;

// `lanes` neighbouring threads take neighbouring columns, the others further rows.
__global__ void __launch_bounds__(kThreads)
    add_partials_kernel(const float* partials, int64_t rows, int64_t stride, int64_t columns, int lanes,
                        double factor, float* out) {
  __shared__ double sums[kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t column = static_cast<int64_t>(blockIdx.x) * lanes + thread % lanes;
  double sum = 0;
  if (column < columns) {
#pragma unroll 8
    for (int64_t i = thread / lanes; i < rows; i += kThreads / lanes) {
      sum += static_cast<double>(partials[i * stride + column]);
    }
  }
  sums[thread] = sum;
  for (int count = kThreads / 2; count >= lanes; count /= 2) {
    __syncthreads();
    if (thread < count) sums[thread] += sums[thread + count];
  }
  if (thread < lanes && column < columns) out[column] += static_cast<float>(factor * sums[thread]);
}

}  // namespace

void add_partials(Context& context, const Tensor& partials, int64_t first, int64_t columns, double factor,
                  float* out) {
  const int64_t rows = partials.dim(0), stride = partials.dim(1);
  const int lanes = group_lanes(columns);
  launch(context, "add_partials", {4 * as_double(rows * columns), as_double(rows * columns)},
         add_partials_kernel, dim3(block_count(columns, lanes)), dim3(kThreads), 0,
         partials.as<float>() + first, rows, stride, columns, lanes, factor, out);
}

}  // namespace flexchat::cuda
