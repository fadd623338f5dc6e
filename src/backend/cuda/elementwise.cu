// relu^2 and learned mixes. Every operand moves once; 2 to 6 FLOPs an element.
#include "backend/cuda/ops.cuh"

namespace flexchat::cuda {
namespace {

// ---- relu^2 -----------------------------------------------------------------------------------------------
__device__ float relu(float u) { return u < 0.0f ? 0.0f : u; }  // NaN stays NaN

template <class T>
struct ReluSquared {
  const T* u;
  T* y;
  template <int W>
  using Operands = Packed<T, W>;
  template <int W>
  __device__ Operands<W> load(int64_t i) const {
    Operands<W> x;
    x.load(u + i);
    return x;
  }
  template <int W>
  __device__ void finish(int64_t i, const Packed<T, W>& x) const {
    store_packed<W>(y + i, [&](int k) { return relu(x[k]) * relu(x[k]); });
  }
};

template <class T, int W>
struct Pair {
  Packed<T, W> x, y;
};

template <class T>
struct ReluSquaredBackward {
  T *u, *dy;
  template <int W>
  using Operands = Pair<T, W>;
  template <int W>
  __device__ Operands<W> load(int64_t i) const {
    Operands<W> v;
    v.x.load(u + i);
    v.y.load(dy + i);
    return v;
  }
  template <int W>
  __device__ void finish(int64_t i, const Pair<T, W>& v) const {
    store_packed<W>(dy + i, [&](int k) { return 2.0f * relu(v.x[k]) * v.y[k]; });
    store_packed<W>(u + i, [&](int k) { return relu(v.x[k]) * relu(v.x[k]); });
  }
};

// ---- learned mixes ----------------------------------------------------------------------------------------
// A Coefficient as the kernel reads it.
struct Factor {
  const float* value;  // null: 1
  float factor;
  explicit Factor(const Coefficient& c)
      : value(c.value ? c.value->as<float>() + c.index : nullptr), factor(static_cast<float>(c.factor)) {}
  __device__ float get() const { return value ? factor * *value : factor; }
};

template <class T>
struct Mix {
  Factor a, b;
  const T *x, *y;
  T* out;
  template <int W>
  using Operands = Pair<T, W>;
  template <int W>
  __device__ Operands<W> load(int64_t i) const {
    Operands<W> v;
    v.x.load(x + i);
    v.y.load(y + i);
    return v;
  }
  template <int W>
  __device__ void finish(int64_t i, const Pair<T, W>& v) const {
    const float ca = a.get(), cb = b.get();
    store_packed<W>(out + i, [&](int k) { return ca * v.x[k] + cb * v.y[k]; });
  }
};

template <class T>
struct MixBackward {
  Factor a, b;
  const T *dout, *x, *y;  // x and y null: their sum is not wanted
  T *dx, *dy;
  bool accumulate_dx, accumulate_dy;
};

// `same`: dx and dy are one tensor, which gets both.
template <class T, int W>
__device__ void mix_gradients(const MixBackward<T>& op, bool same, int64_t i, const Packed<T, W>& d,
                              const Packed<T, W>& old_x, const Packed<T, W>& old_y) {
  const float ca = op.a.get(), cb = op.b.get();
  const auto gradient_x = [&](int k) { return ca * d[k] + (op.accumulate_dx ? old_x[k] : 0.0f); };
  if (same) {
    store_packed<W>(op.dy + i, [&](int k) { return cb * d[k] + (op.accumulate_dy ? gradient_x(k) : 0.0f); });
    return;
  }
  store_packed<W>(op.dx + i, gradient_x);
  store_packed<W>(op.dy + i, [&](int k) { return cb * d[k] + (op.accumulate_dy ? old_y[k] : 0.0f); });
}

constexpr int kMixPacks = 2;

// partials (blocks, 2): the sums of dout*x and dout*y over the block's elements.
template <class T, int W>
__global__ void __launch_bounds__(kBlock, 3)
    mix_backward_kernel(MixBackward<T> op, int64_t n, float* partials) {
  const bool same = op.dx == op.dy;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kBlock * kMixPacks) + threadIdx.x;
  Packed<T, W> d[kMixPacks], x[kMixPacks], y[kMixPacks], old_x[kMixPacks], old_y[kMixPacks];
#pragma unroll
  for (int k = 0; k < kMixPacks; ++k) {
    const int64_t i = (first + k * kBlock) * W;
    if (i + W > n) continue;
    d[k].load(op.dout + i);
    if (op.x) x[k].load(op.x + i);
    if (op.y) y[k].load(op.y + i);
    if (op.accumulate_dx) old_x[k].load(op.dx + i);
    if (op.accumulate_dy && !same) old_y[k].load(op.dy + i);
  }
  float sum_x = 0, sum_y = 0;
#pragma unroll
  for (int k = 0; k < kMixPacks; ++k) {
    const int64_t i = (first + k * kBlock) * W;
    if (i + W > n) continue;
#pragma unroll
    for (int j = 0; j < W; ++j) {
      if (op.x) sum_x += d[k][j] * x[k][j];
      if (op.y) sum_y += d[k][j] * y[k][j];
    }
    mix_gradients<T, W>(op, same, i, d[k], old_x[k], old_y[k]);
  }
  if (!op.x && !op.y) return;
  sum_x = block_sum<kBlock>(sum_x);
  sum_y = block_sum<kBlock>(sum_y);
  if (threadIdx.x == 0) {
    partials[2 * static_cast<int64_t>(blockIdx.x)] = sum_x;
    partials[2 * static_cast<int64_t>(blockIdx.x) + 1] = sum_y;
  }
}

}  // namespace

void CudaBackend::relu_squared(const Tensor& u, const Tensor& y) {
  for_dtype(u.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch_flat<kVector<T>>(context_, "relu_squared", {2 * as_double(u.bytes()), 2 * as_double(u.numel())},
                            aligned16({u.data(), y.data()}), ReluSquared<T>{u.as<T>(), y.as<T>()}, u.numel());
  });
}

void CudaBackend::relu_squared_backward(const Tensor& u, const Tensor& dy) {
  for_dtype(u.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch_flat<kVector<T>>(
        context_, "relu_squared_backward", {4 * as_double(u.bytes()), 4 * as_double(u.numel())},
        aligned16({u.data(), dy.data()}), ReluSquaredBackward<T>{u.as<T>(), dy.as<T>()}, u.numel());
  });
}

void CudaBackend::mix(const Coefficient& a, const Tensor& x, const Coefficient& b, const Tensor& y,
                      const Tensor& out) {
  for_dtype(out.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch_flat<kVector<T>>(context_, "mix", {3 * as_double(out.bytes()), 3 * as_double(out.numel())},
                            aligned16({x.data(), y.data(), out.data()}),
                            Mix<T>{Factor(a), Factor(b), x.as<T>(), y.as<T>(), out.as<T>()}, out.numel());
  });
}

void CudaBackend::mix_backward(const Tensor& dout, const Coefficient& a, const Tensor& x,
                               const Coefficient& b, const Tensor& y, bool accumulate_dx, const Tensor& dx,
                               bool accumulate_dy, const Tensor& dy, const Tensor* da, const Tensor* db) {
  for_dtype(dout.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const MixBackward<T> op = {Factor(a),
                               Factor(b),
                               dout.as<T>(),
                               da ? x.as<T>() : nullptr,
                               db ? y.as<T>() : nullptr,
                               dx.as<T>(),
                               dy.as<T>(),
                               accumulate_dx,
                               accumulate_dy};
    const int64_t n = dout.numel();
    const bool vectors =
        n % kVector<T> == 0 && aligned16({dout.data(), x.data(), y.data(), dx.data(), dy.data()});
    const int64_t blocks = block_count(n, int64_t{kBlock} * kMixPacks * (vectors ? kVector<T> : 1));
    const Tensor partials = empty({blocks, 2}, DType::f32);
    const int moved = 3 + (da ? 1 : 0) + (db ? 1 : 0) + (accumulate_dx ? 1 : 0) + (accumulate_dy ? 1 : 0);
    launch(context_, "mix_backward", {moved * as_double(dout.bytes()), 8 * as_double(n)},
           vectors ? mix_backward_kernel<T, kVector<T>> : mix_backward_kernel<T, 1>,
           dim3(static_cast<unsigned>(blocks)), dim3(kBlock), 0, op, n, partials.as<float>());
    if (da || db) {
      add_partials(context_, partials, {da ? da->as<float>() + a.index : nullptr, 1, a.factor},
                   {db ? db->as<float>() + b.index : nullptr, 1, b.factor});
    }
  });
}

}  // namespace flexchat::cuda
