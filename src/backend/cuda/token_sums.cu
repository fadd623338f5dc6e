// The parts of token_sums.cuh that do not depend on dtypes: sorting positions by id (CUB's radix sort, which
// is stable) and adding up runs of equal ids that cross tiles.
#include "backend/cuda/token_sums.cuh"

#include <bit>
#include <cub/device/device_radix_sort.cuh>

namespace flexchat::cuda {
namespace {

__global__ void __launch_bounds__(kBlock) positions_kernel(int64_t n, int32_t* positions) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (i < n) positions[i] = static_cast<int32_t>(i);
}

// The first index in [begin, n) whose id is above `id`, in steps that double: most runs are short.
__device__ int64_t upper_bound(const int32_t* ids, int64_t begin, int64_t n, int32_t id) {
  for (int64_t step = kTile; begin + step < n; step *= 2) {
    if (ids[begin + step] > id) {
      n = begin + step;
    } else {
      begin += step + 1;
    }
  }
  while (begin < n) {
    const int64_t middle = (begin + n) / 2;
    if (ids[middle] > id) {
      n = middle;
    } else {
      begin = middle + 1;
    }
  }
  return begin;
}

__global__ void __launch_bounds__(kBlock)
    add_edges_kernel(const int32_t* ids, int64_t n, const float* edges, int64_t c, float* out) {
  const int64_t tile = blockIdx.x, next = (tile + 1) * kTile;
  if (next >= n) return;
  const int32_t id = ids[next];
  if (ids[next - 1] != id) return;                                   // no run crosses the end of this tile
  if (tile > 0 && ids[tile * kTile - 1] == id) return;               // it started in an earlier one
  const int64_t last = (upper_bound(ids, next, n, id) - 1) / kTile;  // the tile it ends in
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kBlock + threadIdx.x;
  if (column >= c) return;
  float sum = edges[(2 * tile + 1) * c + column];
#pragma unroll 8
  for (int64_t i = tile + 1; i <= last; ++i) sum += edges[2 * i * c + column];
  out[id * c + column] += sum;
}

}  // namespace

TokenOrder sort_tokens(Context& context, const Tensor& ids, int64_t vocab) {
  const int64_t n = ids.numel();
  const Tensor positions(context.arena(), {n}, DType::i32);
  TokenOrder order = {Tensor(context.arena(), {n}, DType::i32), Tensor(context.arena(), {n}, DType::i32)};
  if (n == 0) return order;
  launch(context, "positions", {4 * as_double(n), 0}, positions_kernel, dim3(block_count(n, kBlock)),
         dim3(kBlock), 0, n, positions.as<int32_t>());
  const int bits = std::max(1, static_cast<int>(std::bit_width(static_cast<uint64_t>(vocab - 1))));
  size_t bytes = 0;
  const auto sort = [&](void* temporary) {
    check_cuda(cub::DeviceRadixSort::SortPairs(temporary, bytes, ids.as<uint32_t>(), order.ids.as<uint32_t>(),
                                               positions.as<int32_t>(), order.tokens.as<int32_t>(),
                                               static_cast<int>(n), 0, bits, context.stream()),
               "sort_tokens");
  };
  sort(nullptr);  // says how much temporary memory it needs
  const Tensor temporary(context.arena(), {static_cast<int64_t>(bytes)}, DType::u8);
  context.begin_launch("sort_tokens", {16 * as_double(n) * ((bits + 7) / 8), 0});
  sort(temporary.data());
  context.end_launch("sort_tokens");
  return order;
}

void add_edges(Context& context, const TokenOrder& order, const Tensor& edges, int64_t c, float* out) {
  launch(context, "add_edges", {4 * as_double(edges.numel()), as_double(edges.numel())}, add_edges_kernel,
         dim3(static_cast<unsigned>(edges.dim(0) / 2), block_count(c, kBlock)), dim3(kBlock), 0,
         order.ids.as<int32_t>(), order.ids.numel(), edges.as<float>(), c, out);
}

}  // namespace flexchat::cuda
