// Attention with few queries a row: decoding and short chunks. Bound by reading the keys and values once:
// 2*D*Tkv elements for each (batch row, key head), whatever the number of query heads that share it.
//
// The query heads of a group and their queries are the 16 rows of one tile. Keys are cut into n_split pieces
// of split_len, one block each; in a block every warp walks over its own keys, 16 at a time, with its own
// pipeline of copies, so that nothing in the loop waits for another warp. Warps, then splits, are merged in
// ascending order: split_out and split_lse, if there are several, are combined by attention_decode_combine.
//
// Which keys fall into which piece depends on positions alone, so pages change no bit of the result.
#pragma once
#include "attention_common.cuh"

namespace flexchat::cuda {

namespace decode {

constexpr DecodeTile kTile = decode_tile(kDType, kHeadDim);
constexpr int kWarps = kTile.warps, kStages = kTile.stages, kThreads = kWarps * 32;
constexpr int kKeys = 16, kN = kKeys / 8, kD = kHeadDim / 8;  // keys of a warp at a time
constexpr int kRowBytes = Tile<kHeadDim>::row_bytes, kTileBytes = kKeys * kRowBytes;

// One of the 16 rows of a block's tile: a query of one head.
struct Query {
  int h, q;  // head; index of the query, q_len and up where there is none
};
ATTENTION_DEVICE Query query(const AttentionParams& p, int kv_head, int row) {
  const int group = p.n_head / p.n_kv_head;
  return {kv_head * group + row % group, row / group};
}

// s (16 x 16) becomes scores, -inf where hidden.
ATTENTION_DEVICE void scores(const AttentionParams& p, int b, int kv_head, int row0, int kv,
                             float (&s)[1][kN][4], int lane) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Query at = query(p, kv_head, row0 + 8 * i + lane / 4);
    const Row row = make_row(p, b, at.h < p.n_head ? at.h : 0);
    const bool exists = at.q < row.n_q;
    const int q = row.offset + max(0, min(at.q, row.n_q - 1));
    const KeyRange range = key_range(p, row, q);
    const ModContext context{p, row.b, row.h, row.n_q, row.n_kv};
    const ModHead head = mod_head(context);
    const ModQ mod = mod_q(context, head, q);
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s[0][n][2 * i + e];
        const int key = kv + 8 * n + 2 * (lane % 4) + e, inside = min(key, row.n_kv - 1);
        const ModKv column = mod_kv(context, head, inside);
        x *= p.scale;
        if (MOD_HAS_SCORE) x = mod_score(context, head, mod, column, x, q, inside);
        const bool seen = exists && key >= range.first && key < range.end &&
                          mod_mask(context, head, mod, column, q, inside);
        if (!seen) x = negative_infinity();
      }
  }
}

struct State {
  float out[1][kD][4];
  float max[2], sum[2];  // max in base 2
};

ATTENTION_DEVICE void softmax(State& state, float (&s)[1][kN][4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float top = state.max[i];
#pragma unroll
    for (int n = 0; n < kN; ++n) top = fmaxf(top, fmaxf(s[0][n][2 * i], s[0][n][2 * i + 1]) * kLog2e);
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    const float base = top == negative_infinity() ? 0.0f : top, factor = exp2_fast(state.max[i] - base);
    state.max[i] = top;
    float sum = 0;
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s[0][n][2 * i + e];
        x = exp2_fast(fmaf(x, kLog2e, -base));
        sum += x;
      }
    state.sum[i] = fmaf(state.sum[i], factor, sum);
#pragma unroll
    for (int n = 0; n < kD; ++n) {
      state.out[0][n][2 * i] *= factor;
      state.out[0][n][2 * i + 1] *= factor;
    }
  }
}

ATTENTION_DEVICE void drop(const AttentionParams& p, int b, int kv_head, int row0, int kv,
                           float (&s)[1][kN][4], int lane) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Query at = query(p, kv_head, row0 + 8 * i + lane / 4);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const DropoutBits bits = dropout_bits(p.dropout_seed, b, at.h, at.q, (kv + 8 * n + 2 * (lane % 4)) / 4);
      const bool high = lane & 1;
      if ((high ? bits.word[2] : bits.word[0]) < p.dropout_threshold) s[0][n][2 * i] = 0;
      if ((high ? bits.word[3] : bits.word[1]) < p.dropout_threshold) s[0][n][2 * i + 1] = 0;
    }
  }
}

// Where key kv + lane % 16 lies: its page and its row there. Found one step ahead of its use, for the block
// table answers late.
struct Place {
  int page, row;
};
ATTENTION_DEVICE Place find(const AttentionParams& p, const Row& row, int kv, int lane) {
  if (!ATTENTION_PAGED || row.n_kv == 0) return {0, 0};
  const int key = min(kv + lane % kKeys, row.n_kv - 1), page = key / p.page_size;
  return {__ldg(p.block_table + static_cast<long long>(row.b) * p.table_stride + page),
          key - page * p.page_size};
}
// Starts copies of keys or values kv.. kv + 15 by one warp.
template <Loop loop>
ATTENTION_DEVICE void load_cached(unsigned tile, const AttentionParams& p, const AttentionView& view,
                                  const Row& row, int kv_head, int kv, const Place& place, int lane) {
  if constexpr (ATTENTION_PAGED) {
    using T = Tile<kHeadDim>;
    const char* data = static_cast<const char*>(view.data) + kv_head * view.head * kElementBytes;
    constexpr int total = kKeys * T::chunks;
    static_assert(total % 32 == 0);
#pragma unroll
    for (int i = 0; i < total / 32; ++i) {
      const int at = i * 32 + lane, key = at / T::chunks, chunk = at % T::chunks;
      const int page = __shfl_sync(~0u, place.page, key), in_page = __shfl_sync(~0u, place.row, key);
      const bool ok = kv + key < row.n_kv;
      copy_async(tile + T::chunk_offset(key, chunk),
                 data + (ok ? (page * view.batch + in_page * view.token) * kElementBytes + chunk * 16 : 0),
                 ok);
    }
  } else {
    load_keys<kKeys, 32, loop>(tile, p, view, row, kv_head, kv, lane);
  }
}

// What the block has merged: sums over its warps, unnormalised, in shared memory.
struct Merged {
  float out[16][kHeadDim];
  float max[kWarps][16], sum[kWarps][16];
};

// Adds up the warps' states in order.
ATTENTION_DEVICE void merge(Merged& merged, State& state, int warp, int lane) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float sum = state.sum[i];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (lane % 4 == 0) {
      merged.max[warp][8 * i + lane / 4] = state.max[i];
      merged.sum[warp][8 * i + lane / 4] = sum;
    }
  }
  __syncthreads();
  float factor[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float top = negative_infinity();
#pragma unroll 1
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, merged.max[w][8 * i + lane / 4]);
    factor[i] = top == negative_infinity() ? 0.0f : exp2_fast(state.max[i] - top);
  }
#pragma unroll 1
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        auto* const to = reinterpret_cast<float2*>(&merged.out[8 * i + lane / 4][2 * (lane % 4)]);
#pragma unroll
        for (int n = 0; n < kD; ++n) {
          const float2 before = w == 0 ? float2{0, 0} : to[4 * n];
          to[4 * n] = {fmaf(state.out[0][n][2 * i], factor[i], before.x),
                       fmaf(state.out[0][n][2 * i + 1], factor[i], before.y)};
        }
      }
    }
    __syncthreads();
  }
}

ATTENTION_DEVICE void store_element(void* data, long long i, float x) {
  if constexpr (kExact)
    static_cast<float*>(data)[i] = x;
  else
    static_cast<unsigned short*>(data)[i] = static_cast<unsigned short>(pack(x, 0.0f));
}

ATTENTION_DEVICE float natural_lse(float max, float sum) {
  return kExact ? max * kLn2 + logf(sum) : (max + __log2f(sum)) * kLn2;
}

}  // namespace decode

// Blocks: ((batch * kv head) * row tiles + row tile) * n_split + split.
extern "C" __global__ void __launch_bounds__(decode::kThreads)
    attention_decode(const __grid_constant__ AttentionParams p) {
  using namespace decode;
  extern __shared__ __align__(1024) char shared[];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int group = p.n_head / p.n_kv_head, row_tiles = (group * p.q_len + 15) / 16;
  const int split = blockIdx.x % p.n_split, tile = blockIdx.x / p.n_split % row_tiles;
  const int bg = blockIdx.x / p.n_split / row_tiles, b = bg / p.n_kv_head, kv_head = bg % p.n_kv_head,
            row0 = tile * 16;
  const unsigned q_tile = shared_address(shared),
                 mine = q_tile + 16 * kRowBytes + warp * kStages * 2 * kTileBytes;
  const Row any = make_row(p, b, kv_head * group);

#pragma unroll 1
  for (int at = thread; at < 16 * Tile<kHeadDim>::chunks; at += kThreads) {
    const int r = at / Tile<kHeadDim>::chunks, chunk = at % Tile<kHeadDim>::chunks;
    const Query row = query(p, kv_head, row0 + r);
    const bool ok = row.q < any.n_q && row0 + r < group * p.q_len;
    const char* from =
        static_cast<const char*>(p.q.data) +
        (ok ? (b * p.q.batch + row.h * p.q.head + row.q * p.q.token) * kElementBytes + chunk * 16 : 0);
    copy_async(q_tile + Tile<kHeadDim>::chunk_offset(r, chunk), from, ok);
  }
  copy_commit();

  // Keys that some row of the tile may see, cut to this split; this warp takes every kWarps-th 16 of them.
  const int q_last = min((row0 + 15) / group, any.n_q - 1);
  int first = split * p.split_len, end = 0;
  if (row0 / group < any.n_q) {
    const KeyRange low = key_range(p, any, any.offset + row0 / group),
                   high = key_range(p, any, any.offset + q_last);
    end = min(high.end, first + p.split_len);
    first = max(first, low.first / (kKeys * kWarps) * (kKeys * kWarps));
  }
  const int kv0 = first + warp * kKeys, step = kKeys * kWarps;
  Place place = find(p, any, kv0, lane);
  const auto load = [&](auto as, int kv, int stage) {
    if (kv < end) {
      const unsigned to = mine + stage * 2 * kTileBytes;
      load_cached<decltype(as)::loop>(to, p, p.k, any, kv_head, kv, place, lane);
      load_cached<decltype(as)::loop>(to + kTileBytes, p, p.v, any, kv_head, kv, place, lane);
    }
    copy_commit();
    place = find(p, any, kv + step, lane);
  };
#pragma unroll 1
  for (int s = 0; s < kStages - 1; ++s) load(LoopTag<Loop::rolled>{}, kv0 + s * step, s);
  copy_wait<kStages - 1>();
  __syncthreads();  // the queries have arrived

  State state{};
  state.max[0] = state.max[1] = negative_infinity();
  int stage = 0;
#pragma unroll 1
  for (int kv = kv0; kv < end; kv += step) {
    copy_wait<kStages - 2>();
    __syncwarp();
    load(LoopTag<Loop::unrolled>{}, kv + (kStages - 1) * step, (stage + kStages - 1) % kStages);
    float s[1][kN][4] = {};
    const unsigned k_tile = mine + stage * 2 * kTileBytes;
    product_nt<kHeadDim>(s, q_tile, 0, k_tile, 0, lane);
    scores(p, b, kv_head, row0, kv, s, lane);
    softmax(state, s);
    if (ATTENTION_DROPOUT) drop(p, b, kv_head, row0, kv, s, lane);
    product_rn<kHeadDim>(state.out, s, k_tile + kTileBytes, 0, 0, lane);
    __syncwarp();
    stage = (stage + 1) % kStages;
  }
  copy_wait<0>();
  __syncthreads();
  Merged& merged = *reinterpret_cast<Merged*>(shared);
  merge(merged, state, warp, lane);

#pragma unroll 1
  for (int r = warp; r < 16; r += kWarps) {
    const Query at = query(p, kv_head, row0 + r);
    if (at.q >= p.q_len) continue;
    float top = negative_infinity(), sum = 0;
#pragma unroll 1
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, merged.max[w][r]);
#pragma unroll 1
    for (int w = 0; w < kWarps; ++w)
      if (merged.max[w][r] != negative_infinity())
        sum += merged.sum[w][r] * exp2_fast(merged.max[w][r] - top);
    const long long row = (static_cast<long long>(b) * p.n_head + at.h) * p.q_len + at.q;
    const float factor = sum > 0 ? (ATTENTION_DROPOUT ? p.dropout_scale : 1.0f) / sum : 0.0f;
    const float lse = sum > 0 ? natural_lse(top, sum) : negative_infinity();
    for (int d = lane; d < kHeadDim; d += 32) {
      const float x = sum > 0 ? merged.out[r][d] * factor : 0.0f;
      if (p.n_split == 1)
        store_element(p.out.data, b * p.out.batch + at.h * p.out.head + at.q * p.out.token + d, x);
      else
        p.split_out[(row * p.n_split + split) * kHeadDim + d] = x;
    }
    if (lane == 0) {
      if (p.n_split > 1) p.split_lse[row * p.n_split + split] = lse;
      if (p.n_split == 1 && p.lse) p.lse[row] = lse;
    }
  }
}

// out = sum_s exp(lse_s - lse) split_out_s. One warp for each row.
extern "C" __global__ void __launch_bounds__(128)
    attention_decode_combine(const __grid_constant__ AttentionParams p) {
  using namespace decode;
  const int lane = threadIdx.x % 32;
  const long long row = static_cast<long long>(blockIdx.x) * 4 + threadIdx.x / 32;
  if (row >= static_cast<long long>(p.batch) * p.n_head * p.q_len) return;
  const int q = static_cast<int>(row % p.q_len), h = static_cast<int>(row / p.q_len % p.n_head);
  const int b = static_cast<int>(row / p.q_len / p.n_head);
  const float* lses = p.split_lse + row * p.n_split;
  float top = negative_infinity(), sum = 0;
  for (int s = 0; s < p.n_split; ++s) top = fmaxf(top, lses[s]);
  const bool seen = top != negative_infinity();
  for (int s = 0; s < p.n_split && seen; ++s) sum += exp2_fast((lses[s] - top) * kLog2e);
  float out[(kHeadDim + 31) / 32] = {};
  for (int s = 0; s < p.n_split && seen; ++s) {
    const float weight = exp2_fast((lses[s] - top) * kLog2e) / sum;
    if (weight == 0) continue;
#pragma unroll
    for (int i = 0; i < (kHeadDim + 31) / 32; ++i)
      if (lane + 32 * i < kHeadDim)
        out[i] = fmaf(weight, p.split_out[(row * p.n_split + s) * kHeadDim + lane + 32 * i], out[i]);
  }
#pragma unroll
  for (int i = 0; i < (kHeadDim + 31) / 32; ++i)
    if (lane + 32 * i < kHeadDim)
      store_element(p.out.data, b * p.out.batch + h * p.out.head + q * p.out.token + lane + 32 * i, out[i]);
  if (lane == 0 && p.lse) p.lse[row] = seen ? top + logf(sum) : negative_infinity();
}

}  // namespace flexchat::cuda
