// Gradients of tables whose rows tokens looked up: out[id] += the sum over the tokens n with that id, in
// token order, of w(n) * d[n]. Without atomics, and balanced whatever the ids:
//   1. token positions are sorted by id, stably (sort_tokens);
//   2. a block sums each run of equal ids within its tile of 32 sorted positions and adds it to `out`, or, if
//      the run crosses the tile's border, leaves the partial sum in `edges` (two rows a tile);
//   3. the block of the tile where such a run starts adds up its partial sums and adds them to `out`.
// The order of every sum follows from the ids alone. Bytes: d once, out twice and (with a table) the table
// once a run.
#pragma once

#include <type_traits>

#include "backend/cuda/ops.cuh"

namespace flexchat::cuda {

struct TokenOrder {
  Tensor ids, tokens;  // (N) i32: the ids in ascending order, and where they stood; equals in token order
};
TokenOrder sort_tokens(Context& context, const Tensor& ids, int64_t vocab);

constexpr int kTile = kWarp;           // sorted positions of a block
constexpr int kTokenSumThreads = 512;  // at most
constexpr int kTokenSumElements = 16;  // of a row, a thread at most

// Over all threads of the block, however many warps; `sums` holds 32.
__device__ inline float any_block_sum(float x, float* sums) {
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = 0;
  for (unsigned i = 0; i < blockDim.x / kWarp; ++i) x += sums[i];
  __syncthreads();
  return x;
}

// Op: weight(token, part) is w for elements [part * part_width, (part + 1) * part_width). With a table t
// (rows like out) an Op with kProjects makes of every token's row w * (d - t * w^2 * (d . t) / c), and one
// with kDots gets dot(token, part, d . t over that part). Dynamic shared memory with kDots: (kRowsAhead<K>, c
// / W) f32.
template <int K>
constexpr int kRowsAhead = K == 1 ? 4 : 1;  // rows in flight

template <class T, int W, int K, class Op>
__global__ void __launch_bounds__(kTokenSumThreads)
    token_sums_kernel(Op op, const int32_t* ids, const int32_t* tokens, int64_t n, const T* d, int64_t stride,
                      int c, int part_width, float* out, float* edges) {
  constexpr int kAhead = kRowsAhead<K>;
  extern __shared__ float dots[];
  __shared__ int32_t tile_ids[kTile], tile_tokens[kTile];
  __shared__ float sums[kWarp];
  const int64_t tile = blockIdx.x, begin = tile * kTile;
  const int count = static_cast<int>(n - begin < kTile ? n - begin : kTile);
  if (threadIdx.x < count) {
    tile_ids[threadIdx.x] = ids[begin + threadIdx.x];
    tile_tokens[threadIdx.x] = tokens[begin + threadIdx.x];
  }
  __syncthreads();
  const auto column = [](int k) { return static_cast<int>(threadIdx.x + k * blockDim.x) * W; };
  const int lanes = part_width / W;  // that hold a part, neighbours of one warp if they divide it
  const bool in_warp = lanes <= kWarp && (lanes & (lanes - 1)) == 0;

  for (int first = 0, end = 0; first < count; first = end) {
    const int64_t id = tile_ids[first];
    for (end = first + 1; end < count && tile_ids[end] == id;) ++end;
    Packed<float, W> t[K];
    if constexpr (Op::kProjects || Op::kDots) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (column(k) < c) t[k].load(op.table + id * c + column(k));
      }
    }
    float total[K][W] = {}, dot = 0;
    for (int m = first; m < end; m += kAhead) {
      Packed<T, W> rows[kAhead][K];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
#pragma unroll
        for (int k = 0; k < K; ++k) {
          if (m + a < end && column(k) < c) rows[a][k].load(d + tile_tokens[m + a] * stride + column(k));
        }
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
#pragma unroll
        for (int k = 0; k < K; ++k) {
          if (m + a >= end) continue;
          float along = 0;
          if (column(k) < c) {
            const float w = op.weight(tile_tokens[m + a], column(k) / part_width);
#pragma unroll
            for (int j = 0; j < W; ++j) {
              total[k][j] += w * rows[a][k][j];
              if constexpr (Op::kProjects || Op::kDots) along += rows[a][k][j] * t[k][j];
            }
            dot += w * w * w * along;
          }
          if constexpr (Op::kDots) {
            if (in_warp) {
              along = group_sum(along, lanes);
              if (column(k) < c && column(k) % part_width == 0) {
                op.dot(tile_tokens[m + a], column(k) / part_width, along);
              }
            } else if (column(k) < c) {
              dots[(a * c + column(k)) / W] = along;
            }
          }
        }
      }
      if constexpr (Op::kDots) {
        if (in_warp) continue;
        __syncthreads();
        const int parts = c / part_width;
        for (int p = static_cast<int>(threadIdx.x); p < kAhead * parts && m + p / parts < end;
             p += blockDim.x) {
          float sum = 0;
          for (int i = 0; i < lanes; ++i) sum += dots[p * lanes + i];
          op.dot(tile_tokens[m + p / parts], p % parts, sum);
        }
        __syncthreads();
      }
    }
    if constexpr (Op::kProjects) dot = any_block_sum(dot, sums) / static_cast<float>(c);

    const bool from_before = first == 0 && begin > 0 && ids[begin - 1] == id;
    const bool goes_on = end == count && begin + count < n && ids[begin + count] == id;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (column(k) >= c) continue;
      float* to = from_before ? edges + 2 * tile * c : goes_on ? edges + (2 * tile + 1) * c : out + id * c;
      Packed<float, W> old;
      if (!from_before && !goes_on) old.load(to + column(k));
      store_packed<W>(to + column(k), [&](int j) {
        float x = total[k][j];
        if constexpr (Op::kProjects) x -= dot * t[k][j];
        return from_before || goes_on ? x : old[j] + x;
      });
    }
  }
}

// Adds up the runs that cross tiles; a thread a column, a block a tile and kBlock columns.
void add_edges(Context& context, const TokenOrder& order, const Tensor& edges, int64_t c, float* out);

// d: N rows of c elements, `stride` apart; out (vocab, c).
template <class T, class Op>
void add_token_sums(Context& context, const char* name, const TokenOrder& order, const T* d, int64_t stride,
                    int64_t c, int64_t part_width, const Op& op, float* out) {
  const int64_t n = order.ids.numel();
  if (n == 0 || c == 0) return;
  const Tensor edges(context.arena(), {2 * ((n + kTile - 1) / kTile), c}, DType::f32);
  bool vectors =
      aligned16({d, out}) && c % kVector<T> == 0 && stride % kVector<T> == 0 && part_width % kVector<T> == 0;
  if constexpr (Op::kProjects || Op::kDots) vectors = vectors && aligned16({op.table});
  const auto run = [&](auto width, auto packs) {
    constexpr int W = decltype(width)::value, K = decltype(packs)::value;
    const int64_t per_row = (c + W * K - 1) / (W * K);
    const unsigned threads = block_count(per_row, kWarp) * kWarp;
    const size_t shared = Op::kDots ? sizeof(float) * kRowsAhead<K> * static_cast<size_t>(c / W) : 0;
    launch(context, name, {as_double(n * c) * sizeof(T) + 8 * as_double(n * c), 4 * as_double(n * c)},
           token_sums_kernel<T, W, K, Op>, dim3(block_count(n, kTile)), dim3(threads), shared, op,
           order.ids.as<int32_t>(), order.tokens.as<int32_t>(), n, d, stride, c, part_width, out,
           edges.as<float>());
  };
  constexpr int kWidth = kVector<T>;
  using One = std::integral_constant<int, 1>;
  using Wide = std::integral_constant<int, kWidth>;
  using Many = std::integral_constant<int, kTokenSumElements>;
  using ManyWide = std::integral_constant<int, kTokenSumElements / kWidth>;
  check(c <= int64_t{kTokenSumThreads} * kTokenSumElements,
        "a table row of {} is too wide for {} (at most {})", c, name, kTokenSumThreads * kTokenSumElements);
  if (c <= int64_t{kTokenSumThreads} * (vectors ? kWidth : 1)) {
    vectors ? run(Wide{}, One{}) : run(One{}, One{});
  } else {
    vectors ? run(Wide{}, ManyWide{}) : run(One{}, Many{});
  }
  add_edges(context, order, edges, c, out);
}

}  // namespace flexchat::cuda
