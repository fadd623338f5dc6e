// Completes symmetric matrices of 16-bit elements: the upper triangle from the lower one, in square tiles
// through shared memory, 4 bytes moved an element above the diagonal's blocks; and a number on the diagonal.
#include "backend/cuda/products.h"
#include "backend/cuda/reduce.cuh"

namespace flexchat::cuda {
namespace {

constexpr int kTile = 64, kThreads = 256;
constexpr int kPacks = kTile / 8;  // 16-byte accesses in a row of a tile

// Tile (y, x) of the grid from tile (x, y). Pack p of row r lies at p ^ (r / 8), so that reading down the
// columns of eight packs meets different banks.
template <class T>
__global__ void __launch_bounds__(kThreads)
    symmetric_kernel(T* matrices, int64_t side, int64_t block, float diagonal) {
  const int64_t row = int64_t{blockIdx.y} * kTile, column = int64_t{blockIdx.x} * kTile;
  T* matrix = matrices + blockIdx.z * side * side;
  if (row == column && diagonal != 0.0f) {
    const int64_t d = row + threadIdx.x;
    if (threadIdx.x < kTile && d < side) {
      T* element = matrix + d * side + d;
      *element = from_float<T>(to_float(*element) + diagonal);
    }
  }
  if (column / block <= row / block) return;
  __shared__ __align__(16) T tile[kTile * kTile];
#pragma unroll
  for (int i = threadIdx.x; i < kTile * kPacks; i += kThreads) {
    const int r = i / kPacks, p = i % kPacks;
    *reinterpret_cast<uint4*>(tile + r * kTile + (p ^ (r / 8)) * 8) =
        *reinterpret_cast<const uint4*>(matrix + (column + r) * side + row + p * 8);
  }
  __syncthreads();
#pragma unroll
  for (int i = threadIdx.x; i < kTile * kPacks; i += kThreads) {
    const int r = i / kPacks, p = i % kPacks;
    __align__(16) T x[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) x[k] = tile[(p * 8 + k) * kTile + ((r / 8) ^ p) * 8 + r % 8];
    *reinterpret_cast<uint4*>(matrix + (row + r) * side + column + p * 8) =
        *reinterpret_cast<const uint4*>(x);
  }
}

}  // namespace

void finish_symmetric(Context& context, const Tensor& out, int64_t block, double diagonal) {
  const int64_t n = out.dim(0), side = out.dim(1);
  if (block == side && diagonal == 0) return;
  const unsigned tiles = block_count(side, kTile);
  const double mirrored = static_cast<double>(n * side) * static_cast<double>(side - block) / 2;
  for_dtype(out.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (sizeof(T) == 2) {
      launch(context, "finish_symmetric", {4 * mirrored, 0}, symmetric_kernel<T>,
             dim3(tiles, tiles, static_cast<unsigned>(n)), kThreads, 0, out.as<T>(), side, block, diagonal);
    }
  });
}

}  // namespace flexchat::cuda
