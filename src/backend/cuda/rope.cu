// Rotary position embedding (Su et al. 2021) by -position in the half-split layout, RMSNorm over the head dim
// D and a scale, in place on the query and key heads of qkv rows. A warp works on one token: groups of lanes
// take heads, a lane the elements j and j + D/2 of each, so that the token's cos and sin stay in registers.
// Moves each head twice (backward also reads y) and the tables once a token; about 10 FLOPs an element.
#include "backend/cuda/ops.cuh"

namespace flexchat::cuda {
namespace {

constexpr int kMaxHalf = 256;
// Blocks of an SM: these bound the registers, forward and backward.
constexpr int kForwardBlocks = 3, kBackwardBlocks = 2;

struct RopeShape {
  int64_t tokens, t_len, q_offset, row;
  int heads, half, lanes;  // lanes of a group
  float scale;
};

// Where a thread stands. Packs of W elements, K of them in either half of a head.
template <int W>
struct RopePlace {
  int64_t token;
  int lane, group, groups;
  const RopeShape& s;

  __device__ explicit RopePlace(const RopeShape& shape)
      : token(static_cast<int64_t>(blockIdx.x) * (kBlock / kWarp) + threadIdx.x / kWarp),
        lane(static_cast<int>(threadIdx.x) % kWarp % shape.lanes),
        group(static_cast<int>(threadIdx.x) % kWarp / shape.lanes),
        groups(kWarp / shape.lanes),
        s(shape) {}
  __device__ int column(int k) const { return (k * s.lanes + lane) * W; }
  __device__ int64_t head(int h) const { return token * s.row + static_cast<int64_t>(h) * 2 * s.half; }
};

template <int W, int K>
struct Angles {
  Packed<float, W> cos[K], sin[K];
  __device__ Angles(const RopePlace<W>& at, const float* cos_table, const float* sin_table) {
    const int64_t row = (at.s.q_offset + at.token % at.s.t_len) * at.s.half;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (at.column(k) >= at.s.half) continue;
      cos[k].load(cos_table + row + at.column(k));
      sin[k].load(sin_table + row + at.column(k));
    }
  }
};

// The two halves of a head.
template <class T, int W, int K>
struct Halves {
  Packed<T, W> a[K], b[K];
  __device__ void load(const RopePlace<W>& at, const T* x, int h) {
    const T* p = x + at.head(h);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (at.column(k) >= at.s.half) continue;
      a[k].load(p + at.column(k));
      b[k].load(p + at.s.half + at.column(k));
    }
  }
};

// kAhead heads of a group are in flight.
template <class T, int W, int K, int kAhead>
__global__ void __launch_bounds__(kBlock, kForwardBlocks)
    rope_norm_kernel(RopeShape s, T* x, const float* cos_table, const float* sin_table, float* rstd) {
  const RopePlace<W> at(s);
  if (at.token >= s.tokens) return;  // a whole warp
  const Angles<W, K> angles(at, cos_table, sin_table);
  for (int start = 0; start < s.heads; start += at.groups * kAhead) {
    Halves<T, W, K> in[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int h = start + u * at.groups + at.group;
      if (h < s.heads) in[u].load(at, x, h);
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int h = start + u * at.groups + at.group;
      float a[K][W], b[K][W], sum = 0;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (h >= s.heads || at.column(k) >= s.half) continue;
#pragma unroll
        for (int j = 0; j < W; ++j) {
          const float c = angles.cos[k][j], i = angles.sin[k][j], x1 = in[u].a[k][j], x2 = in[u].b[k][j];
          a[k][j] = x1 * c + x2 * i;
          b[k][j] = x2 * c - x1 * i;
          sum += a[k][j] * a[k][j] + b[k][j] * b[k][j];
        }
      }
      sum = group_sum(sum, s.lanes);
      if (h >= s.heads) continue;
      const float r = 1.0f / sqrtf(sum / static_cast<float>(2 * s.half) + kNormEps), factor = r * s.scale;
      if (at.lane == 0) rstd[at.token * s.heads + h] = r;
      T* to = x + at.head(h);
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (at.column(k) >= s.half) continue;
        store_packed<W>(to + at.column(k), [&](int j) { return a[k][j] * factor; });
        store_packed<W>(to + s.half + at.column(k), [&](int j) { return b[k][j] * factor; });
      }
    }
  }
}

// With unit = y / scale: g = rstd * (scale * dx - unit * mean(dx * y)), rotated back by +position.
template <class T, int W, int K, int kAhead>
__global__ void __launch_bounds__(kBlock, kBackwardBlocks)
    rope_norm_backward_kernel(RopeShape s, const T* y, const float* cos_table, const float* sin_table,
                              const float* rstd, T* dx) {
  const RopePlace<W> at(s);
  if (at.token >= s.tokens) return;  // a whole warp
  const Angles<W, K> angles(at, cos_table, sin_table);
  for (int start = 0; start < s.heads; start += at.groups * kAhead) {
    Halves<T, W, K> d[kAhead], v[kAhead];
    float r[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int h = start + u * at.groups + at.group;
      if (h >= s.heads) continue;
      d[u].load(at, dx, h);
      v[u].load(at, y, h);
      r[u] = rstd[at.token * s.heads + h];
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int h = start + u * at.groups + at.group;
      float sum = 0;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (h >= s.heads || at.column(k) >= s.half) continue;
#pragma unroll
        for (int j = 0; j < W; ++j) sum += d[u].a[k][j] * v[u].a[k][j] + d[u].b[k][j] * v[u].b[k][j];
      }
      sum = group_sum(sum, s.lanes);
      if (h >= s.heads) continue;
      const float of_d = r[u] * s.scale, of_y = r[u] * sum / (static_cast<float>(2 * s.half) * s.scale);
      T* to = dx + at.head(h);
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (at.column(k) >= s.half) continue;
        const auto g1 = [&](int j) { return of_d * d[u].a[k][j] - of_y * v[u].a[k][j]; };
        const auto g2 = [&](int j) { return of_d * d[u].b[k][j] - of_y * v[u].b[k][j]; };
        const auto &c = angles.cos[k], &i = angles.sin[k];
        store_packed<W>(to + at.column(k), [&](int j) { return g1(j) * c[j] - g2(j) * i[j]; });
        store_packed<W>(to + s.half + at.column(k), [&](int j) { return g1(j) * i[j] + g2(j) * c[j]; });
      }
    }
  }
}

RopeShape rope_shape(const Tensor& x, const Tensor& cos_table, int64_t n_heads, int64_t q_offset,
                     double scale) {
  const int64_t half = cos_table.dim(1);
  check(half <= kMaxHalf, "rotary embedding: a head dim of {} is too large for the cuda backend (at most {})",
        2 * half, 2 * kMaxHalf);
  return {x.dim(0) * x.dim(1),
          x.dim(1),
          q_offset,
          x.dim(2),
          static_cast<int>(n_heads),
          static_cast<int>(half),
          group_lanes(half),
          static_cast<float>(scale)};
}

// Turns `s` to packs of kVector<T> where they fit the heads; `pointers` are those of T and of the tables.
template <class T>
bool take_vector_path(RopeShape& s, bool aligned) {
  constexpr int kWidth = kVector<T>;
  if (!aligned || s.half % kWidth != 0 || s.row % kWidth != 0 || s.half / kWidth > kWarp) return false;
  s.lanes = group_lanes(s.half / kWidth);
  return true;
}

dim3 rope_blocks(const RopeShape& s) { return dim3(block_count(s.tokens, kBlock / kWarp)); }

}  // namespace

void CudaBackend::rope_norm(const Tensor& x, const Tensor& cos_table, const Tensor& sin_table,
                            int64_t n_heads, int64_t q_offset, double scale, const Tensor& rstd) {
  RopeShape s = rope_shape(x, cos_table, n_heads, q_offset, scale);
  const double elements = as_double(s.tokens * n_heads * 2 * s.half);
  for_dtype(x.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool vectors = take_vector_path<T>(s, aligned16({x.data(), cos_table.data(), sin_table.data()}));
    launch(context_, "rope_norm", {elements * 2 * sizeof(T), 10 * elements},
           vectors ? rope_norm_kernel<T, kVector<T>, 1, 2> : rope_norm_kernel<T, 1, kMaxHalf / kWarp, 1>,
           rope_blocks(s), dim3(kBlock), 0, s, x.as<T>(), cos_table.as<float>(), sin_table.as<float>(),
           rstd.as<float>());
  });
}

void CudaBackend::rope_norm_backward(const Tensor& y, const Tensor& cos_table, const Tensor& sin_table,
                                     int64_t n_heads, int64_t q_offset, double scale, const Tensor& rstd,
                                     const Tensor& dx) {
  RopeShape s = rope_shape(y, cos_table, n_heads, q_offset, scale);
  const double elements = as_double(s.tokens * n_heads * 2 * s.half);
  for_dtype(y.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool vectors =
        take_vector_path<T>(s, aligned16({y.data(), dx.data(), cos_table.data(), sin_table.data()}));
    launch(context_, "rope_norm_backward", {elements * 3 * sizeof(T), 12 * elements},
           vectors ? rope_norm_backward_kernel<T, kVector<T>, 1, 2>
                   : rope_norm_backward_kernel<T, 1, kMaxHalf / kWarp, 1>,
           rope_blocks(s), dim3(kBlock), 0, s, y.as<T>(), cos_table.as<float>(), sin_table.as<float>(),
           rstd.as<float>(), dx.as<T>());
  });
}

}  // namespace flexchat::cuda
