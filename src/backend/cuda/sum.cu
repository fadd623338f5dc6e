// The sum of a tensor in double, in an order that depends on its size alone. One block: for a tensor that has
// one element a token; reads each once.
#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/reduce.cuh"

namespace flexchat::cuda {
namespace {

constexpr int kThreads = 1024;

template <class T>
__global__ void __launch_bounds__(kThreads) add_sum_kernel(const T* x, int64_t n, double* out) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) sum += static_cast<double>(to_float(x[i]));
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) *out += sum;
}

}  // namespace

void CudaBackend::add_sum(const Tensor& x, const Tensor& out) {
  for_dtype(x.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(context_, "add_sum", {static_cast<double>(x.bytes()), static_cast<double>(x.numel())},
           add_sum_kernel<T>, dim3(1), dim3(kThreads), 0, x.as<T>(), x.numel(), out.as<double>());
  });
}

}  // namespace flexchat::cuda
