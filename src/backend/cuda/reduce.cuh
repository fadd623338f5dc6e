// Device helpers for kernels that stream and reduce: 16-byte accesses, and sums over warps and blocks whose
// order depends on nothing but the number of threads, so that the same input gives the same bits.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "backend/cuda/convert.cuh"

namespace flexchat::cuda {

constexpr int kWarp = 32;

// ---- vectors ----------------------------------------------------------------------------------------------
// N elements that move in one access; N * sizeof(T) is 4, 8 or 16 and the address a multiple of it.
template <class T, int N>
struct alignas(N * sizeof(T)) Vec {
  T v[N];
  __device__ T& operator[](int i) { return v[i]; }
  __device__ const T& operator[](int i) const { return v[i]; }
};

template <class T, int N>
__device__ Vec<T, N> load_vec(const T* p) {
  return *reinterpret_cast<const Vec<T, N>*>(p);
}
template <class T, int N>
__device__ void store_vec(T* p, const Vec<T, N>& x) {
  *reinterpret_cast<Vec<T, N>*>(p) = x;
}

// Eight elements of float, bf16, f16 or double as float, by 16-byte accesses. p must be 16-byte aligned.
template <class T>
__device__ void load8(const T* p, float (&x)[8]) {
  constexpr int kLane = 16 / sizeof(T) < 8 ? 16 / sizeof(T) : 8;
  Vec<T, kLane> lanes[8 / kLane];
#pragma unroll
  for (int i = 0; i < 8 / kLane; ++i) lanes[i] = load_vec<T, kLane>(p + i * kLane);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = to_float(lanes[i / kLane][i % kLane]);
}
template <class T>
__device__ void store8(T* p, const float (&x)[8]) {
  constexpr int kLane = 16 / sizeof(T) < 8 ? 16 / sizeof(T) : 8;
#pragma unroll
  for (int i = 0; i < 8 / kLane; ++i) {
    Vec<T, kLane> lane;
#pragma unroll
    for (int j = 0; j < kLane; ++j) lane[j] = from_float<T>(x[i * kLane + j]);
    store_vec(p + i * kLane, lane);
  }
}

// The first `count` (up to 8) elements at any address; the rest of x is `otherwise`.
template <class T>
__device__ void load_some(const T* p, int64_t count, float (&x)[8], float otherwise = 0) {
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = i < count ? to_float(p[i]) : otherwise;
}
template <class T>
__device__ void store_some(T* p, int64_t count, const float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < count) p[i] = from_float<T>(x[i]);
  }
}

// May all of these addresses be accessed 16 bytes at a time?
inline bool aligned16(std::initializer_list<const void*> pointers) {
  for (const void* p : pointers) {
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return false;
  }
  return true;
}

// Blocks for n things at `per_block` each, never above `most`: the kernel strides over the rest.
inline unsigned block_count(int64_t n, int64_t per_block, int64_t most = int64_t{1} << 30) {
  const int64_t blocks = (n + per_block - 1) / per_block;
  return static_cast<unsigned>(blocks < most ? blocks : most);
}

// ---- reductions -------------------------------------------------------------------------------------------
struct Sum {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {  // NaN if either is
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a > b || a != a ? a : b;
  }
};
struct Min {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};

// Over groups of kLanes neighbouring lanes (a power of two); every lane gets the result. All 32 lanes of the
// warp must call it.
template <int kLanes = kWarp, class T, class Op>
__device__ T warp_reduce(T x, Op op) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    x = op(x, __shfl_xor_sync(0xFFFFFFFFu, x, distance));
  }
  return x;
}
template <int kLanes = kWarp, class T>
__device__ T warp_sum(T x) {
  return warp_reduce<kLanes>(x, Sum{});
}
template <int kLanes = kWarp, class T>
__device__ T warp_max(T x) {
  return warp_reduce<kLanes>(x, Max{});
}

// Over the kThreads threads of a one-dimensional block (a multiple of 32, at most 1024); every thread gets
// the result. All threads must call it; calls may follow each other at once.
template <int kThreads, class T, class Op>
__device__ T block_reduce(T x, Op op) {
  static_assert(kThreads % kWarp == 0 && kThreads <= kWarp * kWarp);
  constexpr int kWarps = kThreads / kWarp;
  x = warp_reduce(x, op);
  if constexpr (kWarps > 1) {
    __shared__ T partial[kWarps];
    if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = x;
    __syncthreads();
    x = partial[0];
#pragma unroll
    for (int i = 1; i < kWarps; ++i) x = op(x, partial[i]);
    __syncthreads();  // before the next call writes `partial`
  }
  return x;
}
template <int kThreads, class T>
__device__ T block_sum(T x) {
  return block_reduce<kThreads>(x, Sum{});
}
template <int kThreads, class T>
__device__ T block_max(T x) {
  return block_reduce<kThreads>(x, Max{});
}

}  // namespace flexchat::cuda
