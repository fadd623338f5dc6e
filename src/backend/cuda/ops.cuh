// What the element-wise and row kernels share: packs of elements as they lie in memory, rows held in
// registers, and flat loops. A kernel takes the vector path (16-byte accesses) where every address and row
// length allows it and the scalar path otherwise.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/reduce.cuh"

namespace flexchat::cuda {

constexpr int kBlock = 256;  // threads of a block unless a kernel says otherwise

// Elements of T in 16 bytes.
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// Two 16-bit elements in a register, the first one low.
template <class T>
__device__ float unpack(uint32_t word, int i);
template <>
__device__ inline float unpack<bf16>(uint32_t word, int i) {
  return __uint_as_float(i == 0 ? word << 16 : word & 0xFFFF0000u);
}
template <>
__device__ inline float unpack<f16>(uint32_t word, int i) {
  return __half2float(__ushort_as_half(static_cast<uint16_t>(i == 0 ? word : word >> 16)));
}
template <class T>
__device__ uint32_t pack(float low, float high);
template <>
__device__ inline uint32_t pack<bf16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ inline uint32_t pack<f16>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// W neighbouring elements as they lie in memory: held as T's of 16 bits, each would take a whole register.
// W = 1 at any address; otherwise p must be 16-byte aligned (8-byte aligned where W elements are 8 bytes).
template <class T, int W>
struct Packed {
  static constexpr bool kPairs = sizeof(T) == 2 && W > 1;
  using Word = std::conditional_t<kPairs, uint32_t, T>;
  static constexpr int kWords = kPairs ? W / 2 : W;
  static constexpr int kLane = kWords < 16 / static_cast<int>(sizeof(Word)) ? kWords : 16 / sizeof(Word);
  Vec<Word, kLane> lanes[kWords / kLane];

  __device__ void load(const T* p) {
#pragma unroll
    for (int i = 0; i < kWords / kLane; ++i) {
      lanes[i] = load_vec<Word, kLane>(reinterpret_cast<const Word*>(p) + i * kLane);
    }
  }
  __device__ void store(T* p) const {
#pragma unroll
    for (int i = 0; i < kWords / kLane; ++i) {
      store_vec(reinterpret_cast<Word*>(p) + i * kLane, lanes[i]);
    }
  }
  __device__ float operator[](int i) const {
    if constexpr (kPairs) {
      return unpack<T>(lanes[i / 2 / kLane][i / 2 % kLane], i % 2);
    } else {
      return to_float(lanes[i / kLane][i % kLane]);
    }
  }
  // Element i = f(i).
  template <class F>
  __device__ void assign(F f) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if constexpr (kPairs) {
        lanes[i / kLane][i % kLane] = pack<T>(f(2 * i), f(2 * i + 1));
      } else {
        lanes[i / kLane][i % kLane] = from_float<T>(f(i));
      }
    }
  }
};

// p[0..W) = f(0..W)
template <int W, class T, class F>
__device__ void store_packed(T* p, F f) {
  Packed<T, W> out;
  out.assign(f);
  out.store(p);
}

// ---- rows -------------------------------------------------------------------------------------------------
// A row is worked on by kThreads threads (a warp or a whole block of kBlock) that hold kPacks packs of kWidth
// elements each; kPacks = 0: rows of any length, read again for every use.
template <int kWidth_, int kPacks_, int kThreads_>
struct RowShape {
  static constexpr int kWidth = kWidth_, kPacks = kPacks_, kThreads = kThreads_;
  static constexpr int kRowsPerBlock = kBlock / kThreads;
};

// f(RowShape) for rows of c elements whose packs are `width` = kVector<T> elements wide.
template <int width, class F>
void for_row_shape(int64_t c, bool vectors, F&& f) {
  constexpr int kUnit = 8 / width;  // packs in eight elements
  const int64_t units = (c + 8 * kWarp - 1) / (8 * kWarp);
  if (!vectors || c % width != 0 || c > 8 * 4 * kBlock) return f(RowShape<1, 0, kWarp>{});
  if (units <= 1) return f(RowShape<width, kUnit, kWarp>{});
  if (units <= 3) return f(RowShape<width, 3 * kUnit, kWarp>{});
  if (units <= 5) return f(RowShape<width, 5 * kUnit, kWarp>{});
  if (units <= 8) return f(RowShape<width, 8 * kUnit, kWarp>{});
  return f(RowShape<width, 4 * kUnit, kBlock>{});
}

// Blocks that an SM should hold of a kernel with `kRows` HeldRows of T: as many as their registers allow.
// Told to the compiler, which otherwise keeps 16-bit elements as floats.
template <class T, class S, int kRows>
constexpr int min_blocks() {
  constexpr int kRegisters = 24 + kRows * S::kPacks * S::kWidth * static_cast<int>(sizeof(T)) / 4;
  constexpr int kBlocks = 65536 / (kBlock * kRegisters);
  return kBlocks < 1 ? 1 : kBlocks > 6 ? 6 : kBlocks;
}

template <class S>
__device__ int64_t this_row() {
  return static_cast<int64_t>(blockIdx.x) * S::kRowsPerBlock + threadIdx.x / S::kThreads;
}
template <class S>
__device__ bool leads_row() {
  return threadIdx.x % S::kThreads == 0;
}
// All threads of the row must call it.
template <class S>
__device__ float row_sum(float x) {
  if constexpr (S::kThreads == kWarp) {
    return warp_sum(x);
  } else {
    return block_sum<S::kThreads>(x);
  }
}

// Over groups of `lanes` neighbouring lanes, a power of two. All 32 lanes of the warp must call it.
__device__ inline float group_sum(float x, int lanes) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    if (distance < lanes) x += __shfl_xor_sync(0xFFFFFFFFu, x, distance);
  }
  return x;
}
// The lanes of a group for `packs` packs.
inline int group_lanes(int64_t packs) {
  int lanes = 1;
  while (lanes < kWarp && lanes < packs) lanes *= 2;
  return lanes;
}

// f(k, i): this thread's k-th pack starts at element i of the row.
template <class S, class F>
__device__ void for_each_pack(int c, F f) {
  const int first = static_cast<int>(threadIdx.x % S::kThreads) * S::kWidth;
  if constexpr (S::kPacks > 0) {
#pragma unroll
    for (int k = 0; k < S::kPacks; ++k) {
      const int i = first + k * S::kThreads * S::kWidth;
      if (i < c) f(k, i);
    }
  } else {
    for (int i = first; i < c; i += S::kThreads * S::kWidth) f(0, i);
  }
}

// This thread's share of a row: all loads are issued when it is made.
template <class T, class S>
class HeldRow {
 public:
  __device__ HeldRow(const T* row, int c) : row_(row) {
    if constexpr (S::kPacks > 0) for_each_pack<S>(c, [&](int k, int i) { packs_[k].load(row_ + i); });
  }
  // Pack k at element i, as for_each_pack counts them.
  __device__ const Packed<T, S::kWidth>& at(int k, int i) {
    if constexpr (S::kPacks == 0) packs_[0].load(row_ + i);
    return packs_[k];
  }

 private:
  const T* row_;
  Packed<T, S::kWidth> packs_[S::kPacks > 0 ? S::kPacks : 1];
};

template <class S, class... Parameters, class... Arguments>
void launch_rows(Context& context, const char* name, const Work& work, int64_t rows,
                 void (*kernel)(Parameters...), Arguments&&... arguments) {
  launch(context, name, work, kernel, dim3(block_count(rows, S::kRowsPerBlock)), dim3(kBlock), 0,
         std::forward<Arguments>(arguments)...);
}

// ---- flat loops -------------------------------------------------------------------------------------------
constexpr int kFlatPacks = 4;  // packs a thread has in flight

// Applies op to elements [i, i + W) in two steps, so that the loads of several packs are in flight at once:
// Op::Operands<W> x = op.load<W>(i), then op.finish(i, x). Elements behind the last whole pack go one by one.
template <int W, class Op>
__global__ void __launch_bounds__(kBlock) flat_kernel(Op op, int64_t n) {
  const int64_t packs = n / W, first = static_cast<int64_t>(blockIdx.x) * (kBlock * kFlatPacks) + threadIdx.x;
  typename Op::template Operands<W> x[kFlatPacks];
#pragma unroll
  for (int k = 0; k < kFlatPacks; ++k) {
    if (first + k * kBlock < packs) x[k] = op.template load<W>((first + k * kBlock) * W);
  }
#pragma unroll
  for (int k = 0; k < kFlatPacks; ++k) {
    if (first + k * kBlock < packs) op.finish((first + k * kBlock) * W, x[k]);
  }
  if constexpr (W > 1) {
    const int64_t i = packs * W + threadIdx.x;
    if (blockIdx.x == 0 && i < n) op.finish(i, op.template load<1>(i));
  }
}

template <int W, class Op>
void launch_flat(Context& context, const char* name, const Work& work, bool vectors, const Op& op,
                 int64_t n) {
  if (n == 0) return;
  const auto blocks = [&](int width) {
    const unsigned count = block_count(n / width, kBlock * kFlatPacks);
    return dim3(count > 0 ? count : 1);  // a rest alone needs a block too
  };
  if (vectors) {
    launch(context, name, work, flat_kernel<W, Op>, blocks(W), dim3(kBlock), 0, op, n);
  } else {
    launch(context, name, work, flat_kernel<1, Op>, blocks(1), dim3(kBlock), 0, op, n);
  }
}

// ---- scalars ----------------------------------------------------------------------------------------------
constexpr float kNormEps = 0x1p-23f;  // of every RMSNorm: the f32 machine epsilon, in every dtype

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Second stage of sums over rows, in double, in an order that depends on the shape alone: with partials
// (rows, a.columns + b.columns) f32, out[j] += factor * sum_i partials[i, j] for the first columns, then
// likewise for those of b. Columns without `out` are left alone.
struct PartialSums {
  float* out;
  int64_t columns;
  double factor = 1;
};
void add_partials(Context& context, const Tensor& partials, const PartialSums& a,
                  const PartialSums& b = {nullptr, 0});

inline double as_double(int64_t x) { return static_cast<double>(x); }

}  // namespace flexchat::cuda
