// RMSNorm (Zhang & Sennrich 2019) without a weight, and the embedding that feeds it: y = x * rstd,
// rstd = 1/sqrt(mean(x^2) + 2^-23); dx = rstd * (dy - y * mean(dy * y)). A row of up to 2048 elements is held
// in a warp's registers between the reduction and the result, one of up to 8192 in a block's. Bytes: every
// operand once (of the table the rows that ids name); about 4 FLOPs an element forward, 6 backward.
#include "backend/cuda/ops.cuh"
#include "backend/cuda/token_sums.cuh"

namespace flexchat::cuda {
namespace {

// One row: y = x * rstd. X is T, or the table's f32.
template <class S, class X, class T>
__device__ void norm_row(const X* x, int c, T* y, float* rstd) {
  HeldRow<X, S> row(x, c);
  float sum = 0;
  for_each_pack<S>(c, [&](int k, int i) {
    const auto& v = row.at(k, i);
#pragma unroll
    for (int j = 0; j < S::kWidth; ++j) sum += v[j] * v[j];
  });
  const float r = 1.0f / sqrtf(row_sum<S>(sum) / static_cast<float>(c) + kNormEps);
  if (leads_row<S>()) *rstd = r;
  for_each_pack<S>(c, [&](int k, int i) {
    const auto& v = row.at(k, i);
    store_packed<S::kWidth>(y + i, [&](int j) { return v[j] * r; });
  });
}

template <class T, class S>
__global__ void __launch_bounds__(kBlock, min_blocks<T, S, 1>())
    rms_norm_kernel(const T* x, int64_t n, int c, T* y, float* rstd) {
  const int64_t row = this_row<S>();
  if (row < n) norm_row<S>(x + row * c, c, y + row * c, rstd + row);
}

template <class T, class S>
__global__ void __launch_bounds__(kBlock, min_blocks<float, S, 1>())
    embed_norm_kernel(const float* table, const int32_t* ids, int64_t n, int c, T* y, float* rstd) {
  const int64_t row = this_row<S>();
  if (row < n) norm_row<S>(table + ids[row] * static_cast<int64_t>(c), c, y + row * c, rstd + row);
}

template <class T, class S>
__global__ void __launch_bounds__(kBlock, min_blocks<T, S, 2>())
    rms_norm_backward_kernel(const T* dy, const T* y, const float* rstd, int64_t n, int c, T* dx) {
  const int64_t row = this_row<S>();
  if (row >= n) return;
  HeldRow<T, S> dy_row(dy + row * c, c), y_row(y + row * c, c);
  const float r = rstd[row];
  float sum = 0;
  for_each_pack<S>(c, [&](int k, int i) {
    const auto &d = dy_row.at(k, i), &v = y_row.at(k, i);
#pragma unroll
    for (int j = 0; j < S::kWidth; ++j) sum += d[j] * v[j];
  });
  const float mean = row_sum<S>(sum) / static_cast<float>(c);
  dx += row * c;
  for_each_pack<S>(c, [&](int k, int i) {
    const auto &d = dy_row.at(k, i), &v = y_row.at(k, i);
    store_packed<S::kWidth>(dx + i, [&](int j) { return r * (d[j] - v[j] * mean); });
  });
}

// The same with dx +=.
template <class T, class S>
__global__ void __launch_bounds__(kBlock, min_blocks<T, S, 3>())
    rms_norm_backward_add_kernel(const T* dy, const T* y, const float* rstd, int64_t n, int c, T* dx) {
  const int64_t row = this_row<S>();
  if (row >= n) return;
  dx += row * c;
  HeldRow<T, S> dy_row(dy + row * c, c), y_row(y + row * c, c), dx_row(dx, c);
  const float r = rstd[row];
  float sum = 0;
  for_each_pack<S>(c, [&](int k, int i) {
    const auto &d = dy_row.at(k, i), &v = y_row.at(k, i);
#pragma unroll
    for (int j = 0; j < S::kWidth; ++j) sum += d[j] * v[j];
  });
  const float mean = row_sum<S>(sum) / static_cast<float>(c);
  for_each_pack<S>(c, [&](int k, int i) {
    const auto &d = dy_row.at(k, i), &v = y_row.at(k, i), &old = dx_row.at(k, i);
    store_packed<S::kWidth>(dx + i, [&](int j) { return old[j] + r * (d[j] - v[j] * mean); });
  });
}

// The gradient of a table row t from its tokens, for token_sums: with y_n = r_n t,
//   dt = sum_n r_n (dy_n - y_n mean(dy_n y_n)) = sum_n r_n dy_n - t * sum_n r_n^3 (dy_n . t) / C.
// The dot product is thus summed over tokens first and over the row once.
struct EmbedNormSums {
  static constexpr bool kProjects = true, kDots = false;
  const float *table, *rstd;
  __device__ float weight(int32_t token, int) const { return rstd[token]; }
};

}  // namespace

void CudaBackend::rms_norm(const Tensor& x, const Tensor& y, const Tensor& rstd) {
  const int64_t n = x.dim(0), c = x.dim(1);
  const Work work = {2 * as_double(x.bytes()) + as_double(rstd.bytes()), 4 * as_double(x.numel())};
  for_dtype(x.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    for_row_shape<kVector<T>>(c, aligned16({x.data(), y.data()}), [&](auto shape) {
      using S = decltype(shape);
      launch_rows<S>(context_, "rms_norm", work, n, rms_norm_kernel<T, S>, x.as<T>(), n, c, y.as<T>(),
                     rstd.as<float>());
    });
  });
}

void CudaBackend::rms_norm_backward(const Tensor& dy, const Tensor& y, const Tensor& rstd, bool accumulate,
                                    const Tensor& dx) {
  const int64_t n = y.dim(0), c = y.dim(1);
  const Work work = {(accumulate ? 4 : 3) * as_double(y.bytes()), 6 * as_double(y.numel())};
  for_dtype(y.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    for_row_shape<kVector<T>>(c, aligned16({dy.data(), y.data(), dx.data()}), [&](auto shape) {
      using S = decltype(shape);
      launch_rows<S>(context_, "rms_norm_backward", work, n,
                     accumulate ? rms_norm_backward_add_kernel<T, S> : rms_norm_backward_kernel<T, S>,
                     dy.as<T>(), y.as<T>(), rstd.as<float>(), n, c, dx.as<T>());
    });
  });
}

void CudaBackend::embed_norm(const Tensor& table, const Tensor& ids, const Tensor& y, const Tensor& rstd) {
  const int64_t n = ids.numel(), c = table.dim(1);
  const Work work = {as_double(y.bytes()) + 4 * as_double(y.numel()), 4 * as_double(y.numel())};
  for_dtype(y.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    for_row_shape<kVector<T>>(c, aligned16({table.data(), y.data()}), [&](auto shape) {
      using S = decltype(shape);
      launch_rows<S>(context_, "embed_norm", work, n, embed_norm_kernel<T, S>, table.as<float>(),
                     ids.as<int32_t>(), n, c, y.as<T>(), rstd.as<float>());
    });
  });
}

void CudaBackend::embed_norm_backward(const Tensor& dy, const Tensor& table, const Tensor& ids,
                                      const Tensor& rstd, const Tensor& dtable) {
  const TokenOrder order = sort_tokens(context_, ids, table.dim(0));
  const int64_t c = table.dim(1);
  for_dtype(dy.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    add_token_sums<T>(context_, "embed_norm_backward", order, dy.as<T>(), c, c, c,
                      EmbedNormSums{table.as<float>(), rstd.as<float>()}, dtable.as<float>());
  });
}

}  // namespace flexchat::cuda
