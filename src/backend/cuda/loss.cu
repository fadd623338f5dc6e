// Softcap, argmax, and softmax cross-entropy over rows of logits.
//
// Cross-entropy: with z = cap * tanh(x / cap), nll = logsumexp(z) - z[target] and
// grad_j = weight * (exp(z_j - lse) - [j = target]) * (1 - (z_j / cap)^2). A row is read from memory once: a
// cluster of up to eight blocks shares it, each keeping its slice in shared memory between the sum and the
// gradient. Where rows do not fit (or on devices without clusters) they are read twice, the second time from
// L2 at best. Bytes: V * (4 + size of grad) a row; about 25 FLOPs an element, five of them by the special
// function unit, which is the other limit.
//
// tanh goes through r = 1 / (e^{2|u|} + 1): tanh u = sign(u) (1 - 2r) and its slope 1 - tanh^2 = 4 r (1 - r)
// without cancellation. What is kept is r with the sign of u. The absolute error of z is about 2e-7 * cap.
#include <cooperative_groups.h>

#include "backend/cuda/ops.cuh"

namespace flexchat::cuda {
namespace {

namespace cg = cooperative_groups;

constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

// ---- softcap ----------------------------------------------------------------------------------------------
struct Softcap {
  float* z;
  float cap, inverse;
  template <int W>
  using Operands = Packed<float, W>;
  template <int W>
  __device__ Operands<W> load(int64_t i) const {
    Operands<W> x;
    x.load(z + i);
    return x;
  }
  template <int W>
  __device__ void finish(int64_t i, const Packed<float, W>& x) const {
    store_packed<W>(z + i, [&](int k) { return cap * tanhf(x[k] * inverse); });
  }
};

// ---- argmax -----------------------------------------------------------------------------------------------
constexpr int kArgmaxThreads = 1024;
constexpr int32_t kNone = 0x7FFFFFFF;

struct Best {
  float value;
  int32_t index;
  // NaN is never better, and any number is better than nothing.
  __device__ void take(float v, int32_t i) {
    if (v > value || (v == value && i < index)) *this = {v, i};
  }
};

__device__ Best warp_best(Best best) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const float v = __shfl_xor_sync(0xFFFFFFFFu, best.value, distance);
    best.take(v, __shfl_xor_sync(0xFFFFFFFFu, best.index, distance));
  }
  return best;
}

// A block a row.
template <int W>
__global__ void __launch_bounds__(kArgmaxThreads) argmax_kernel(const float* x, int64_t v, int32_t* out) {
  constexpr int kAhead = 4;
  __shared__ Best warps[kArgmaxThreads / kWarp];
  const float* row = x + blockIdx.x * v;
  Best best = {-INFINITY, kNone};
  for (int64_t start = threadIdx.x * W; start < v; start += kAhead * kArgmaxThreads * W) {
    Packed<float, W> p[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (start + a * kArgmaxThreads * W < v) p[a].load(row + start + a * kArgmaxThreads * W);
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int64_t i = start + a * kArgmaxThreads * W;
      if (i >= v) continue;
#pragma unroll
      for (int j = 0; j < W; ++j) best.take(p[a][j], static_cast<int32_t>(i) + j);
    }
  }
  best = warp_best(best);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = best;
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  best = warp_best(warps[threadIdx.x]);
  if (threadIdx.x == 0) out[blockIdx.x] = best.index == kNone ? -1 : best.index;
}

// ---- cross entropy ----------------------------------------------------------------------------------------
constexpr int kThreads = 512;
constexpr int kAhead = 4;          // packs a thread has in flight
constexpr int64_t kSlice = 16384;  // elements of a row that a block keeps: 64 KiB, three blocks an SM
constexpr int kMaxCluster = 8;
constexpr double kMaxCap = 50;  // up to here exp(z) and its sum stay in range without taking out the maximum

__device__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

struct CrossEntropyShape {
  int64_t v;
  int slice, cluster;  // elements of a block, blocks of a row
  float cap, weight;   // cap <= 0: none
};

// What a logit becomes, what is kept of it, and what the kept number says. kCap: softcap up to kMaxCap, no
// maximum needed; otherwise the logit itself, whose gradient is still scaled by 1 - (z * inverse_cap)^2.
template <bool kCap>
class LogitMap {
 public:
  __device__ explicit LogitMap(float cap)
      : into_(2.0f * kLog2e / cap), out_of_(cap * kLog2e), inverse_cap_(cap > 0.0f ? 1.0f / cap : 0.0f) {}
  __device__ float keep(float x) const {
    if constexpr (!kCap) return x;
    return copysignf(reciprocal_fast(exp2_fast(fabsf(x * into_)) + 1.0f), x);
  }
  // log2(e) * (z - m), m = 0 with kCap
  __device__ float exponent(float kept, float m) const {
    if constexpr (!kCap) return (kept - m) * kLog2e;
    return copysignf(out_of_ - 2.0f * out_of_ * fabsf(kept), kept);
  }
  __device__ float slope(float kept) const {
    if constexpr (!kCap) return 1.0f - (kept * inverse_cap_) * (kept * inverse_cap_);
    return 4.0f * fabsf(kept) * (1.0f - fabsf(kept));
  }

 private:
  float into_, out_of_, inverse_cap_;
};

// sum * e^m over some logits; m = 0 with kCap.
struct ExpSum {
  float m, sum;
};

template <bool kCap>
__device__ ExpSum combine(ExpSum a, ExpSum b) {
  if constexpr (kCap) return {0.0f, a.sum + b.sum};
  const float m = fmaxf(a.m, b.m);
  const auto part = [m](ExpSum x) { return x.sum == 0.0f ? 0.0f : x.sum * exp2_fast((x.m - m) * kLog2e); };
  return {m, part(a) + part(b)};
}

// Over the block, then over the cluster's blocks in rank order; every thread gets the result. The shared
// memory that other blocks read must stay until end_of_cluster().
template <bool kCap>
__device__ ExpSum combine_blocks(ExpSum x, int cluster) {
  __shared__ ExpSum warps[kThreads / kWarp];
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const ExpSum other = {__shfl_xor_sync(0xFFFFFFFFu, x.m, distance),
                          __shfl_xor_sync(0xFFFFFFFFu, x.sum, distance)};
    x = combine<kCap>(x, other);
  }
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = warps[0];
  for (int i = 1; i < kThreads / kWarp; ++i) x = combine<kCap>(x, warps[i]);
#if __CUDA_ARCH__ >= 900
  if (cluster > 1) {
    __shared__ ExpSum mine;
    const cg::cluster_group group = cg::this_cluster();
    if (threadIdx.x == 0) mine = x;
    group.sync();
    x = *group.map_shared_rank(&mine, 0);
    for (int i = 1; i < cluster; ++i) x = combine<kCap>(x, *group.map_shared_rank(&mine, i));
  }
#endif
  return x;
}
__device__ void end_of_cluster(int cluster) {
#if __CUDA_ARCH__ >= 900
  if (cluster > 1) cg::this_cluster().sync();
#endif
}

// f(pack, i) for the packs of row[0, count), loaded kAhead at a time.
template <int W, class F>
__device__ void for_each_logit(const float* row, int count, F f) {
  for (int start = static_cast<int>(threadIdx.x) * W; start < count; start += kAhead * kThreads * W) {
    Packed<float, W> x[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (start + a * kThreads * W < count) x[a].load(row + start + a * kThreads * W);
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (start + a * kThreads * W < count) f(x[a], start + a * kThreads * W);
    }
  }
}

// The sum of exponentials of this thread's share; with kKeep the mapped logits go to `kept`.
template <int W, bool kCap, bool kKeep>
__device__ ExpSum sum_slice(const LogitMap<kCap>& map, const float* row, int count, float* kept) {
  ExpSum total = {kCap ? 0.0f : -INFINITY, 0.0f};
  for_each_logit<W>(row, count, [&](const Packed<float, W>& x, int i) {
    float k[W], m = total.m;
#pragma unroll
    for (int j = 0; j < W; ++j) k[j] = map.keep(x[j]);
    if constexpr (kKeep) store_packed<W>(kept + i, [&](int j) { return k[j]; });
    if constexpr (!kCap) {
#pragma unroll
      for (int j = 0; j < W; ++j) m = fmaxf(m, k[j]);
      total.sum *= exp2_fast((total.m - (m == -INFINITY ? 0.0f : m)) * kLog2e);
      total.m = m;
      if (m == -INFINITY) m = 0;  // -inf - -inf would be NaN; a NaN among the logits still is one
    }
#pragma unroll
    for (int j = 0; j < W; ++j) total.sum += exp2_fast(map.exponent(k[j], m));
  });
  return total;
}

// Blocks [cluster * n, cluster * (n + 1)) work on row n. Threads read again only what they wrote or kept
// themselves, so grad may be the logits.
template <class T, int W, bool kCap, bool kKeep>
__global__ void __launch_bounds__(kThreads, kKeep ? 3 : 2)
    cross_entropy_kernel(CrossEntropyShape s, const float* logits, const int32_t* targets, float* nll,
                         T* grad) {
  extern __shared__ float4 shared[];
  float* kept = reinterpret_cast<float*>(shared);
  const int64_t n = blockIdx.x / s.cluster;
  const int rank = static_cast<int>(blockIdx.x) % s.cluster, begin = rank * s.slice;
  const int count = max(0, static_cast<int>(min(static_cast<int64_t>(s.slice), s.v - begin)));
  const int32_t target = targets[n];
  const float* row = logits + n * s.v + begin;
  T* out = grad ? grad + n * s.v + begin : nullptr;
  if (target < 0) {
    if (rank == 0 && threadIdx.x == 0) nll[n] = 0;
    if (grad) {
      for (int i = static_cast<int>(threadIdx.x) * W; i < count; i += kThreads * W) {
        store_packed<W>(out + i, [](int) { return 0.0f; });
      }
    }
    return;
  }

  const LogitMap<kCap> map(s.cap);
  const float kept_target = map.keep(logits[n * s.v + target]);
  const ExpSum total = combine_blocks<kCap>(sum_slice<W, kCap, kKeep>(map, row, count, kept), s.cluster);
  const float target_exponent = map.exponent(kept_target, total.m);  // log2(e) * (z[target] - m)
  if (rank == 0 && threadIdx.x == 0) nll[n] = logf(total.sum) - target_exponent * kLn2;
  if (grad) {
    const float factor = s.weight / total.sum;
    const auto write = [&](int i, auto kept_at) {
      store_packed<W>(out + i, [&](int j) {
        const float k = kept_at(j);
        return factor * exp2_fast(map.exponent(k, total.m)) * map.slope(k);
      });
      const int at = target - begin - i;
      if (at < 0 || at >= W) return;  // else the same thread writes the target's element again
      const float p = exp2_fast(target_exponent) / total.sum;
      out[i + at] = from_float<T>(s.weight * (p - 1.0f) * map.slope(kept_target));
    };
    if constexpr (kKeep) {
      for (int i = static_cast<int>(threadIdx.x) * W; i < count; i += kThreads * W) {
        Packed<float, W> x;
        x.load(kept + i);
        write(i, [&](int j) { return x[j]; });
      }
    } else {
      for_each_logit<W>(row, count, [&](const Packed<float, W>& x, int i) {
        write(i, [&](int j) { return map.keep(x[j]); });
      });
    }
  }
  end_of_cluster(s.cluster);
}

// How rows are cut: the fewest blocks whose slices fit shared memory, or no keeping at all.
bool cut_rows(const DeviceInfo& device, bool with_grad, CrossEntropyShape* s) {
  s->cluster = 1;
  s->slice = static_cast<int>(s->v);
  if (!with_grad) return false;
  const auto fits = static_cast<int64_t>((device.shared_per_block - 1024) / sizeof(float));
  if (device.major < 9) return s->v <= std::min(fits, kSlice);
  int cluster = 1;
  while (cluster < kMaxCluster && cluster * kSlice < s->v) cluster *= 2;
  const int64_t slice = (s->v + cluster - 1) / cluster + 31;
  if (slice > fits) return false;
  s->cluster = cluster;
  s->slice = static_cast<int>(slice / 32 * 32);  // slices start at 128-byte borders where rows do
  return true;
}

template <class T, int W, bool kCap, bool kKeep>
void launch_cross_entropy(Context& context, const Work& work, const CrossEntropyShape& s, int64_t rows,
                          const Tensor& logits, const Tensor& targets, const Tensor& nll, T* grad) {
  const auto kernel = cross_entropy_kernel<T, W, kCap, kKeep>;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(rows * s.cluster));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kKeep ? sizeof(float) * static_cast<size_t>(s.slice) : 0;
  config.stream = context.stream();
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(s.cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = s.cluster > 1 ? 1 : 0;
  if (config.dynamicSmemBytes > 0) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(config.dynamicSmemBytes)),
               "cross_entropy");
  }
  context.begin_launch("cross_entropy", work);
  check_cuda(cudaLaunchKernelEx(&config, kernel, s, static_cast<const float*>(logits.as<float>()),
                                static_cast<const int32_t*>(targets.as<int32_t>()), nll.as<float>(), grad),
             "cross_entropy");
  context.end_launch("cross_entropy");
}

}  // namespace

void CudaBackend::softcap(const Tensor& z, double cap) {
  if (cap <= 0) return;
  const Softcap op = {z.as<float>(), static_cast<float>(cap), static_cast<float>(1 / cap)};
  launch_flat<kVector<float>>(context_, "softcap", {2 * as_double(z.bytes()), 20 * as_double(z.numel())},
                              aligned16({z.data()}), op, z.numel());
}

void CudaBackend::argmax(const Tensor& x, const Tensor& out) {
  const int64_t v = x.dim(1);
  const bool vectors = v % kVector<float> == 0 && aligned16({x.data()});
  launch(context_, "argmax", {as_double(x.bytes()), as_double(x.numel())},
         vectors ? argmax_kernel<kVector<float>> : argmax_kernel<1>, dim3(static_cast<unsigned>(x.dim(0))),
         dim3(kArgmaxThreads), 0, x.as<float>(), v, out.as<int32_t>());
}

void CudaBackend::cross_entropy(const Tensor& logits, const Tensor& targets, double cap, double weight,
                                const Tensor& nll, const Tensor* grad) {
  if (logits.numel() == 0) return;
  CrossEntropyShape s = {logits.dim(1), 0, 1, static_cast<float>(cap), static_cast<float>(weight)};
  const bool keep = cut_rows(context_.device(), grad != nullptr, &s), capped = cap > 0 && cap <= kMaxCap;
  if (cap > kMaxCap) softcap(logits, cap);  // the kernel then finds z itself
  const Work work = {as_double(logits.bytes() + (grad ? grad->bytes() : 0)), 25 * as_double(logits.numel())};
  for_dtype(grad ? grad->dtype() : DType::f32, [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* const out = grad ? grad->as<T>() : nullptr;
    constexpr int kWidth = kVector<float>;
    const bool vectors = s.v % kWidth == 0 && aligned16({logits.data(), out});
    const auto run = [&](auto kernel) {
      kernel(context_, work, s, logits.dim(0), logits, targets, nll, out);
    };
    if (vectors && capped) {
      keep ? run(launch_cross_entropy<T, kWidth, true, true>)
           : run(launch_cross_entropy<T, kWidth, true, false>);
    } else if (vectors) {
      keep ? run(launch_cross_entropy<T, kWidth, false, true>)
           : run(launch_cross_entropy<T, kWidth, false, false>);
    } else if (capped) {
      keep ? run(launch_cross_entropy<T, 1, true, true>) : run(launch_cross_entropy<T, 1, true, false>);
    } else {
      keep ? run(launch_cross_entropy<T, 1, false, true>) : run(launch_cross_entropy<T, 1, false, false>);
    }
  });
}

}  // namespace flexchat::cuda
