// Smear (modern): gate_t = lambda * sigmoid(weight . e_t[:channels]); out_t = e_t + gate_t * e_{t-1}. A row's
// neighbour comes from cache forward, since a block works on neighbouring rows, and from registers backward:
// forward moves e and out once, backward dout, e and de. About 2 FLOPs an element forward, 4 backward.
#include "backend/cuda/ops.cuh"

namespace flexchat::cuda {
namespace {

template <class T, class S>
__global__ void __launch_bounds__(kBlock, min_blocks<T, S, 3>())
    smear_kernel(const T* e, const T* previous, const float* weight, const float* lambda, int64_t n,
                 int64_t t_len, int c, int channels, T* out, float* sigmoid_out) {
  const int64_t row = this_row<S>();
  if (row >= n) return;
  const bool first = row % t_len == 0;
  const T* now = e + row * c;
  const T* before = !first                   ? now - c
                    : previous && t_len == 1 ? previous + row * c
                                             : now;  // gate 0: any readable row
  HeldRow<T, S> now_row(now, c), before_row(before, c);
  float logit = 0;
  for (int j = static_cast<int>(threadIdx.x) % S::kThreads; j < channels; j += S::kThreads) {
    logit += weight[j] * to_float(now[j]);
  }
  const float s = sigmoid(row_sum<S>(logit));
  if (leads_row<S>()) sigmoid_out[row] = s;
  const bool smeared = before != now;
  const float gate = smeared ? *lambda * s : 0.0f;
  for_each_pack<S>(c, [&](int k, int i) {
    const auto &x = now_row.at(k, i), &y = before_row.at(k, i);
    store_packed<S::kWidth>(out + row * c + i, [&](int j) { return smeared ? x[j] + gate * y[j] : x[j]; });
  });
}

// Row n receives its own dout, dout of the row behind it through that row's gate, and the gradient of its
// gate's logit. The threads of a row work on kRows rows, last first, so that the row behind is still held.
// partials (ceil(N / kRows), channels + 1): sums over those rows for dweight and dlambda.
constexpr int kRows = 8;

template <class T, class S>
__global__ void __launch_bounds__(kBlock, min_blocks<T, S, 4>())
    smear_backward_kernel(const T* dout, const T* e, const float* weight, const float* lambda,
                          const float* sigmoid_in, int64_t n, int64_t t_len, int c, int channels, T* de,
                          float* partials) {
  __shared__ float dlogits_of[S::kRowsPerBlock][kRows];
  float* const dlogits = dlogits_of[threadIdx.x / S::kThreads];
  const int64_t chunk = this_row<S>(), first = chunk * kRows;
  if (first >= n) return;  // all threads of a row together
  const float l = *lambda;
  const auto follows = [&](int64_t row) {
    return row < n && row % t_len > 0;
  };  // its neighbour smears into it
  float dlambda = 0;
  HeldRow<T, S> next_row(dout + (first + kRows) * c, follows(first + kRows) ? c : 0);
#pragma unroll 1
  for (int r = static_cast<int>(n - first < kRows ? n - first : kRows) - 1; r >= 0; --r) {
    const int64_t row = first + r;
    const bool has_previous = follows(row), has_next = follows(row + 1);
    HeldRow<T, S> d_row(dout + row * c, c), before_row(e + (row - 1) * c, has_previous ? c : 0);
    const float s = sigmoid_in[row], next_gate = has_next ? l * sigmoid_in[row + 1] : 0.0f;
    float dgate = 0;
    for_each_pack<S>(has_previous ? c : 0, [&](int k, int i) {
      const auto &x = d_row.at(k, i), &y = before_row.at(k, i);
#pragma unroll
      for (int j = 0; j < S::kWidth; ++j) dgate += x[j] * y[j];
    });
    dgate = row_sum<S>(dgate);
    const float dlogit = dgate * l * s * (1.0f - s);
    if (leads_row<S>()) dlogits[r] = dlogit;
    dlambda += dgate * s;
    for_each_pack<S>(c, [&](int k, int i) {
      const auto& x = d_row.at(k, i);
      float sum[S::kWidth];
#pragma unroll
      for (int j = 0; j < S::kWidth; ++j) sum[j] = x[j];
      if (has_next) {
        const auto& y = next_row.at(k, i);
#pragma unroll
        for (int j = 0; j < S::kWidth; ++j) sum[j] += next_gate * y[j];
      }
      if (has_previous && i < channels) {
#pragma unroll
        for (int j = 0; j < S::kWidth; ++j) sum[j] += i + j < channels ? dlogit * weight[i + j] : 0.0f;
      }
      store_packed<S::kWidth>(de + row * c + i, [&](int j) { return sum[j]; });
    });
    next_row = d_row;
  }
  S::kThreads == kWarp ? __syncwarp() : __syncthreads();
  float* const to = partials + chunk * (channels + 1);
  for (int j = static_cast<int>(threadIdx.x) % S::kThreads; j < channels; j += S::kThreads) {
    float sum = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (follows(first + r)) sum += dlogits[r] * to_float(e[(first + r) * c + j]);
    }
    to[j] = sum;
  }
  if (leads_row<S>()) to[channels] = dlambda;
}

}  // namespace

void CudaBackend::smear(const Tensor& e, const Tensor* previous, const Tensor& weight, const Tensor& lambda,
                        const Tensor& out, const Tensor& sigmoid) {
  const int64_t t_len = e.dim(1), c = e.dim(2), n = e.dim(0) * t_len;
  const Work work = {2 * as_double(e.bytes()), 2 * as_double(e.numel())};
  for_dtype(e.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* before = previous ? previous->as<T>() : nullptr;
    for_row_shape<kVector<T>>(c, aligned16({e.data(), before, out.data()}), [&](auto shape) {
      using S = decltype(shape);
      launch_rows<S>(context_, "smear", work, n, smear_kernel<T, S>, e.as<T>(), before, weight.as<float>(),
                     lambda.as<float>(), n, t_len, c, weight.dim(1), out.as<T>(), sigmoid.as<float>());
    });
  });
}

void CudaBackend::smear_backward(const Tensor& dout, const Tensor& e, const Tensor& weight,
                                 const Tensor& lambda, const Tensor& sigmoid, const Tensor& de,
                                 const Tensor& dweight, const Tensor& dlambda) {
  const int64_t t_len = e.dim(1), c = e.dim(2), n = e.dim(0) * t_len, channels = weight.dim(1);
  const Work work = {3 * as_double(e.bytes()), 4 * as_double(e.numel())};
  for_dtype(e.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    for_row_shape<kVector<T>>(c, aligned16({dout.data(), e.data(), de.data()}), [&](auto shape) {
      using S = decltype(shape);
      const int64_t chunks = block_count(n, kRows);
      const Tensor partials = empty({chunks, channels + 1}, DType::f32);
      launch_rows<S>(context_, "smear_backward", work, chunks, smear_backward_kernel<T, S>, dout.as<T>(),
                     e.as<T>(), weight.as<float>(), lambda.as<float>(), sigmoid.as<float>(), n, t_len, c,
                     channels, de.as<T>(), partials.as<float>());
      add_partials(context_, partials, {dweight.as<float>(), channels}, {dlambda.as<float>(), 1});
    });
  });
}

}  // namespace flexchat::cuda
