// A hash of the bits of a buffer, to tell whether two algorithms gave the same result without keeping both.
// Every word is mixed with its index and the mixes are added as integers, so the order cannot matter.
// Reads the buffer once.
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

}  // namespace flexchat::cuda
