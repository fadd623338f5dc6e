// What tuning compares algorithms by: noise to multiply, and a hash of the bits of a result, to tell whether
// two gave the same without keeping both. Every word is mixed with its index and the mixes are added as
// integers, so the order cannot matter. Either touches the buffer once.
#include "backend/cuda/products.h"
#include "backend/cuda/reduce.cuh"

namespace flexchat::cuda {
namespace {

constexpr int kThreads = 256;

// The finaliser of SplitMix64 (Steele, Lea, Flood 2014).
__device__ uint64_t mix(uint64_t x) {
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return x ^ x >> 31;
}

template <class Word>
__global__ void __launch_bounds__(kThreads) hash_kernel(const Word* x, int64_t n, uint64_t* sum) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  uint64_t own = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step) {
    own += mix(static_cast<uint64_t>(i) * 0x9E3779B97F4A7C15u + static_cast<uint64_t>(x[i]));
  }
  const uint64_t all = block_sum<kThreads>(own);
  if (threadIdx.x == 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(sum), static_cast<unsigned long long>(all));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) noise_kernel(T* x, int64_t n) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step) {
    const uint64_t bits = mix(static_cast<uint64_t>(i) * 0x9E3779B97F4A7C15u) >> 40;
    x[i] = from_float<T>(static_cast<float>(bits) * 0x1p-23f - 1);
  }
}

template <class Word>
void hash_words(Context& context, const void* x, int64_t bytes, uint64_t* sum) {
  const int64_t n = bytes / static_cast<int64_t>(sizeof(Word));
  launch(context, "hash_bits", {static_cast<double>(bytes), 0}, hash_kernel<Word>,
         block_count(n, kThreads * 8, int64_t{16} * context.device().sm_count), kThreads, 0,
         static_cast<const Word*>(x), n, sum);
}

}  // namespace

void hash_bits(Context& context, const void* x, int64_t bytes, uint64_t* sum) {
  const bool words = (reinterpret_cast<uintptr_t>(x) | static_cast<uint64_t>(bytes)) % 8 == 0;
  words ? hash_words<uint64_t>(context, x, bytes, sum) : hash_words<uint8_t>(context, x, bytes, sum);
}

void fill_noise(Context& context, const Tensor& x) {
  for_dtype(x.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(context, "fill_noise", {static_cast<double>(x.bytes()), 0}, noise_kernel<T>,
           block_count(x.numel(), kThreads * 8, int64_t{16} * context.device().sm_count), kThreads, 0,
           x.as<T>(), x.numel());
  });
}

}  // namespace flexchat::cuda
