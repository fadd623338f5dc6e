// Random tensors: element i from its own words of a Philox stream (base/rng.h), so the order in which threads
// run cannot matter. Writes each element once; about 100 integer operations and, for normals, two f64
// functions each.
#include "backend/cuda/convert.cuh"
#include "backend/cuda/cuda_backend.h"

namespace flexchat::cuda {
namespace {

struct Words {
  uint32_t w[4];
};

// base/rng.h's philox4x32
__device__ Words philox(uint64_t block, uint64_t stream, uint64_t key) {
  uint32_t c[4] = {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32),
                   static_cast<uint32_t>(stream), static_cast<uint32_t>(stream >> 32)};
  auto k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t hi0 = __umulhi(0xD2511F53u, c[0]), lo0 = 0xD2511F53u * c[0];
    const uint32_t hi1 = __umulhi(0xCD9E8D57u, c[2]), lo1 = 0xCD9E8D57u * c[2];
    c[0] = hi1 ^ c[1] ^ k0;
    c[1] = lo1;
    c[2] = hi0 ^ c[3] ^ k1;
    c[3] = lo0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c[0], c[1], c[2], c[3]}};
}

// Two words, the first one low, as 53 bits in [0, 1).
__device__ double unit(uint32_t high, uint32_t low) {
  return static_cast<double>((static_cast<uint64_t>(high) << 32 | low) >> 11) * 0x1p-53;
}

template <class T>
__global__ void draw_kernel(Distribution d, uint64_t seed, uint64_t stream, T* out, int64_t n) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
    double x = d.a;
    if (d.kind == Distribution::normal) {  // Box-Muller, as Rng::normal
      const Words w = philox(static_cast<uint64_t>(i), stream, seed);
      const double u = 1.0 - unit(w.w[0], w.w[1]), v = unit(w.w[2], w.w[3]);
      x = d.a + d.b * (sqrt(-2.0 * log(u)) * cospi(2.0 * v));
    } else if (d.kind == Distribution::uniform) {
      const Words w = philox(static_cast<uint64_t>(i / 2), stream, seed);
      x = d.a + (d.b - d.a) * (i % 2 == 0 ? unit(w.w[0], w.w[1]) : unit(w.w[2], w.w[3]));
    }
    out[i] = from_float<T>(static_cast<float>(x));
  }
}

}  // namespace

void CudaBackend::draw(const Distribution& distribution, uint64_t seed, uint64_t stream, const Tensor& out) {
  constexpr int kThreads = 256;
  const auto blocks = static_cast<unsigned>(
      std::min<int64_t>((out.numel() + kThreads - 1) / kThreads, int64_t{16} * context_.device().sm_count));
  for_dtype(out.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(context_, "draw", {static_cast<double>(out.bytes()), 0}, draw_kernel<T>, dim3(blocks),
           dim3(kThreads), 0, distribution, seed, stream, out.as<T>(), out.numel());
  });
}

}  // namespace flexchat::cuda
