// Small kernels around attention.
//
// Gradients of captured tensors leave the attention backward as sums in fixed point, whose value does not
// depend on the order of the additions: two 64-bit integers for each element, in units of 2^-20 and 2^-56.
// One that was given a NaN, or has left the range, stands beyond 2^60 and gives NaN.
#include "backend/cuda/attention.h"

namespace flexchat::cuda {
namespace {

__global__ void convert_fixed_point_kernel(const int64_t* sums, float* out, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= n) return;
  if (sums[2 * i] > int64_t{1} << 60 || sums[2 * i] < -(int64_t{1} << 60)) {
    out[i] = __int_as_float(0x7fffffff);
    return;
  }
  out[i] = static_cast<float>(static_cast<double>(sums[2 * i]) * 0x1p-20 +
                              static_cast<double>(sums[2 * i + 1]) * 0x1p-56);
}

// Element i of out (B, T, width); its heads lie `head` elements apart in a pool row.
struct Pages {
  int64_t page_stride, token_stride, head_stride, page_size, table_stride;
  int64_t tokens, heads, head_dim;
};
template <class T>
__global__ void gather_pages_kernel(const T* pool, const int* table, const int* kv_lens, Pages pages, T* out,
                                    int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= n) return;
  const int64_t d = i % pages.head_dim, h = i / pages.head_dim % pages.heads;
  const int64_t t = i / pages.head_dim / pages.heads % pages.tokens,
                b = i / pages.head_dim / pages.heads / pages.tokens;
  if (kv_lens && t >= kv_lens[b]) return;
  const int64_t page = table[b * pages.table_stride + t / pages.page_size];
  out[i] =
      pool[page * pages.page_stride + t % pages.page_size * pages.token_stride + h * pages.head_stride + d];
}

}  // namespace

void convert_fixed_point(Context& context, const Tensor& sums, const Tensor& out) {
  const int64_t n = out.numel();
  launch(context, "convert_fixed_point", {static_cast<double>(20 * n), static_cast<double>(3 * n)},
         convert_fixed_point_kernel, dim3(static_cast<unsigned>((n + 255) / 256)), dim3(256), 0,
         sums.as<int64_t>(), out.as<float>(), n);
}

void gather_pages(Context& context, const HeadsView& pool, const Tensor& table, int64_t page_size,
                  int64_t head_dim, const int* kv_lens, const Tensor& out) {
  const int64_t n = out.numel(), heads = out.dim(2) / head_dim;
  const Pages pages = {pool.batch_stride,
                       pool.token_stride,
                       pool.head_stride == 0 ? head_dim : pool.head_stride,
                       page_size,
                       table.dim(1),
                       out.dim(1),
                       heads,
                       head_dim};
  const auto run = [&](auto element) {
    using T = decltype(element);
    launch(context, "gather_pages", {2.0 * static_cast<double>(out.bytes()), 0}, gather_pages_kernel<T>,
           dim3(static_cast<unsigned>((n + 255) / 256)), dim3(256), 0, static_cast<const T*>(pool.data),
           table.as<int>(), kv_lens, pages, out.as<T>(), n);
  };
  if (dtype_size(pool.dtype) == 4)
    run(uint32_t{});
  else
    run(uint16_t{});
}

}  // namespace flexchat::cuda
