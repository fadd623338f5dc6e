// Attention, forward: out (B, Tq, H, D) = softmax_j(mod(scale * q_i . k_j)) v_j and lse (B, H, Tq).
//
// One block computes a tile of queries of one head, walking over the tiles of keys that some of them see, in
// ascending order, with the online softmax of FlashAttention-2 (Dao 2023) in base 2. 4*D FLOPs an element;
// reads q once and k, v once a query tile. While a tile is computed the next is copied. Tiles of queries are
// handed out last first: under a causal mask the longest start first. On Hopper the kernel is that of
// attention_forward_wgmma.cuh, with the same steps.
#pragma once
#include "attention_common.cuh"

namespace flexchat::cuda {

namespace forward {

constexpr ForwardTile kTile = forward_tile(kDType, kHeadDim, kSm90a, MOD_IS_DEAR);
static_assert(kTile.wgmma == ATTENTION_WGMMA);  // else the kernel below
constexpr int kBlockQ = kTile.block_q(), kBlockKv = kTile.block_kv, kThreads = kTile.threads();
constexpr int kM = kTile.m_tiles, kN = kBlockKv / 8, kD = kHeadDim / 8;
constexpr int kTileBytes = kBlockKv * Tile<kHeadDim>::row_bytes;
// Below, registers are dearer.
constexpr Loop kLoop = !kExact && kHeadDim > 64 ? Loop::quick : Loop::unrolled;
// By how much a row's scores may grow, in base 2, before its sums follow: weights then stay below 2^8, and
// almost no tile after the first has to touch the sums.
constexpr float kSlack = kExact ? 0.0f : 8.0f;

// What the mod knows of the columns of a tile, computed by one thread for all.
constexpr bool kHasColumns = !__is_empty(ModKv);
struct Columns {
  ModKv at[kHasColumns ? kBlockKv : 1];
  ATTENTION_DEVICE ModKv of(int column) const { return at[kHasColumns ? column : 0]; }
};

// The state of a thread's 2*kM queries.
struct State {
  float out[kM][kD][4];
  float max[kM][2], sum[kM][2];  // max in base 2; sum over this thread's columns
  ModQ mod[kM][2];
};

ATTENTION_DEVICE TileWalk walk(const AttentionParams& p, const Row& row, int tile, int q_first, int q_last) {
  if constexpr (kHasLists) return list_walk(p.blocks, row, (p.q_len + kBlockQ - 1) / kBlockQ, tile);
  const int first = key_range(p, row, q_first).first / kBlockKv, end = key_range(p, row, q_last).end;
  return {nullptr, first, max(0, (end + kBlockKv - 1) / kBlockKv - first), {2 * first, 2 * first + 2}};
}

// Calls f(x, mod of its query, mod of its key, query, key) for every score x of a thread.
template <class F>
ATTENTION_DEVICE void for_each_score(const Row& row, const State& state, const Columns& columns,
                                     float (&s)[kM][kN][4], int q_warp, int kv, int lane, const F& f) {
  for_each_piece<kRolledMods>(
      [&](int n, int at) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = 8 * n + 2 * (lane % 4) + e, key = min(kv + column, row.n_kv - 1);
          const ModKv mod = columns.of(column);
#pragma unroll
          for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const int q = row.offset + min(q_warp + 16 * m + 8 * i + lane / 4, row.n_q - 1);
              f(s[m][at][2 * i + e], state.mod[m][i], mod, q, key);
            }
        }
      },
      s);
}

// s becomes the mod's score: in base 2, but in f32 as it is, for times log2(e) it would be rounded once more.
ATTENTION_DEVICE void apply_mod(const AttentionParams& p, const Row& row, const ModContext& context,
                                const ModHead& head, const State& state, const Columns& columns,
                                float (&s)[kM][kN][4], int q_warp, int kv, int lane) {
  for_each_score(row, state, columns, s, q_warp, kv, lane,
                 [&](float& x, const ModQ& mq, const ModKv& mkv, int q, int key) {
                   if (kExact)
                     x = mod_score(context, head, mq, mkv, x * p.scale, q, key);
                   else
                     x = mod_score_base2(context, head, mq, mkv, x * p.scale, x * (p.scale * kLog2e), q, key);
                 });
}

ATTENTION_DEVICE void scale_scores(float (&s)[kM][kN][4], float factor) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[m][n][e] *= factor;
}

// Of a thread's columns 8*n + 2*(lane % 4) + e, bit 2*n + e of each with 8*n + e < column.
static_assert(2 * kN <= 32);
ATTENTION_DEVICE unsigned columns_before(int column) {
  const int x = min(max(column, 0), 8 * kN);
  return static_cast<unsigned>((1ull << (x / 8 * 2 + min(x % 8, 2))) - 1);
}

// s becomes -inf where lengths or the built-in mask hide the key.
ATTENTION_DEVICE void apply_range(const AttentionParams& p, const Row& row, float (&s)[kM][kN][4], int q_warp,
                                  int kv, int lane) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int q = row.offset + min(q_warp + 16 * m + 8 * i + lane / 4, row.n_q - 1);
      const KeyRange range = key_range(p, row, q);
      const int column = kv + 2 * (lane % 4);
      const unsigned seen = columns_before(range.end - column) & ~columns_before(range.first - column);
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (!(seen >> (2 * n + e) & 1)) s[m][n][2 * i + e] = negative_infinity();
    }
}

// s becomes -inf where the expression hides the key.
ATTENTION_DEVICE void apply_mask(const Row& row, const ModContext& context, const ModHead& head,
                                 const State& state, const Columns& columns, float (&s)[kM][kN][4],
                                 int q_warp, int kv, int lane) {
  for_each_score(row, state, columns, s, q_warp, kv, lane,
                 [&](float& x, const ModQ& mq, const ModKv& mkv, int q, int key) {
                   if (!mod_mask(context, head, mq, mkv, q, key)) x = negative_infinity();
                 });
}

// Raises the maxima where s has grown beyond them; sums and out follow. `unit` turns s into base 2.
ATTENTION_DEVICE void raise_maxima(State& state, const float (&s)[kM][kN][4], float unit) {
  float top[kM][2];
  bool raise = false;
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float x = s[m][0][2 * i];
#pragma unroll
      for (int n = 0; n < kN; ++n) x = fmaxf(x, fmaxf(s[m][n][2 * i], s[m][n][2 * i + 1]));
      x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
      x = fmaxf(x, __shfl_xor_sync(~0u, x, 2)) * unit;
      top[m][i] = x > state.max[m][i] + kSlack ? x : state.max[m][i];
      raise = raise || top[m][i] != state.max[m][i];
    }
  if (!__any_sync(~0u, raise)) return;
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float factor = exp2_fast(state.max[m][i] - (top[m][i] == negative_infinity() ? 0.0f : top[m][i]));
      state.max[m][i] = top[m][i];
      state.sum[m][i] *= factor;
#pragma unroll
      for (int n = 0; n < kD; ++n) {
        state.out[m][n][2 * i] *= factor;
        state.out[m][n][2 * i + 1] *= factor;
      }
    }
}

// Drops weights of columns 8*n...
ATTENTION_DEVICE void drop(const AttentionParams& p, const Row& row, float (&s)[kM][kN][4], int n, int q_warp,
                           int kv, int lane) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int q = q_warp + 16 * m + 8 * i + lane / 4, key = kv + 8 * n + 2 * (lane % 4);
      const DropoutBits bits = dropout_bits(p.dropout_seed, row.b, row.h, q, key / 4);
      const bool high = lane & 1;
      if ((high ? bits.word[2] : bits.word[0]) < p.dropout_threshold) s[m][n][2 * i] = 0;
      if ((high ? bits.word[3] : bits.word[1]) < p.dropout_threshold) s[m][n][2 * i + 1] = 0;
    }
}

// s becomes the weights exp2(s * unit - max), which are added to state.sum. `each` calls what it is given
// with n = 0, 2, ..: columns 8*n .. 8*n + 15 are to become weights.
template <class Each>
ATTENTION_DEVICE void make_weights(const AttentionParams& p, const Row& row, State& state,
                                   float (&s)[kM][kN][4], float unit, int q_warp, int kv, int lane,
                                   const Each& each) {
  float base[kM][2], sum[kM][2] = {};
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i) base[m][i] = state.max[m][i] == negative_infinity() ? 0.0f : state.max[m][i];
  each([&](int first) {
#pragma unroll
    for (int n = first; n < first + 2; ++n) {
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          s[m][n][e] = exp2_fast(fmaf(s[m][n][e], unit, -base[m][e / 2]));
          sum[m][e / 2] += s[m][n][e];
        }
      if (ATTENTION_DROPOUT) drop(p, row, s, n, q_warp, kv, lane);
    }
  });
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i) state.sum[m][i] += sum[m][i];
}

// What turns scores into base 2 after their maximum is taken, so it must not be negative.
ATTENTION_DEVICE float score_unit(const AttentionParams& p) {
  return MOD_HAS_SCORE ? (kExact ? kLog2e : 1.0f) : p.scale <= 0 ? 1.0f : p.scale * kLog2e;
}

// Products q.k become scores, -inf where hidden.
ATTENTION_DEVICE void finish_scores(const AttentionParams& p, const Row& row, const ModContext& context,
                                    const ModHead& head, const State& state, const Columns& columns,
                                    float (&s)[kM][kN][4], bool partial, bool border, int q_warp, int kv,
                                    int lane) {
  if (!MOD_HAS_SCORE && p.scale <= 0) scale_scores(s, p.scale * kLog2e);
  if (MOD_HAS_SCORE) apply_mod(p, row, context, head, state, columns, s, q_warp, kv, lane);
  if (MOD_HAS_MASK && partial) apply_mask(row, context, head, state, columns, s, q_warp, kv, lane);
  if (border) apply_range(p, row, s, q_warp, kv, lane);
}

// No query has seen anything.
ATTENTION_DEVICE void start(State& state) {
  state = State{};
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i) state.max[m][i] = negative_infinity();
}
ATTENTION_DEVICE void start_mods(State& state, const Row& row, const ModContext& context, const ModHead& head,
                                 int q_warp, int lane) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      state.mod[m][i] =
          mod_q(context, head, row.offset + min(q_warp + 16 * m + 8 * i + lane / 4, row.n_q - 1));
}

// Divides by the sums and writes out and lse; rows that do not exist in a shorter batch row are zeros. Of the
// four lanes that hold a query's sums, one divides and takes the logarithm: lane j those of query j.
ATTENTION_DEVICE void finish(const AttentionParams& p, const Row& row, State& state, unsigned tile, int q0,
                             int q_warp, int warp, int lane) {
  float top = 0, total = 0;
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = state.sum[m][i];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (lane % 4 == 2 * m + i) {
        top = state.max[m][i];
        total = sum;
      }
    }
  const int j = lane % 4, q = q_warp + 8 * j + lane / 4;
  const bool seen = total > 0 && q < row.n_q;
  const float scale = seen ? (ATTENTION_DROPOUT ? p.dropout_scale : 1.0f) / total : 0.0f;
  if (p.lse && j < 2 * kM && q < p.q_len) {
    const float lse = kExact ? fmaf(top, kLn2, logf(total)) : (top + __log2f(total)) * kLn2;
    p.lse[(static_cast<long long>(row.b) * p.n_head + row.h) * p.q_len + q] =
        seen ? lse : negative_infinity();
  }
  float factor[kM][2];
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i) factor[m][i] = __shfl_sync(~0u, scale, (lane & ~3) | (2 * m + i));
  constexpr int rows = 16 * kM;
  __syncwarp();  // nobody reads the tile's rows of this warp any more
  store_tile<kHeadDim>(tile, state.out, factor, warp * rows, 0, lane);
  __syncwarp();
  char* out = static_cast<char*>(p.out.data) +
              (row.b * p.out.batch + row.h * p.out.head + q0 * p.out.token) * kElementBytes;
  write_rows<rows, 32>(tile, warp * rows, out, p.out.token, p.q_len - q0, lane);
}

}  // namespace forward

}  // namespace flexchat::cuda

#if ATTENTION_WGMMA
#include "attention_forward_wgmma.cuh"
#else
namespace flexchat::cuda {

extern "C" __global__ void __launch_bounds__(forward::kThreads, forward::kTile.ctas)
    attention_forward(const __grid_constant__ AttentionParams p) {
  using namespace forward;
  extern __shared__ __align__(1024) char shared[];
  __shared__ Columns columns[2];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int heads = p.batch * p.n_head, tiles = (p.q_len + kBlockQ - 1) / kBlockQ;
  const int bh = blockIdx.x % heads, tile = tiles - 1 - blockIdx.x / heads;
  const Row row = make_row(p, bh / p.n_head, bh % p.n_head);
  const int kv_head = row.h / (p.n_head / p.n_kv_head);
  const int q0 = tile * kBlockQ, q_warp = q0 + warp * 16 * kM;
  const int q_first = row.offset + q0, q_last = row.offset + min(q0 + kBlockQ, row.n_q) - 1;

  const unsigned q_tile = shared_address(shared);
  const unsigned k_tile = q_tile + kBlockQ * Tile<kHeadDim>::row_bytes, v_tile = k_tile + 2 * kTileBytes;
  TileWalk tile_walk{};
  if (q0 < row.n_q && row.n_kv > 0) {
    tile_walk = walk(p, row, tile, q_first, q_last);
    const char* q_data = static_cast<const char*>(p.q.data) +
                         (row.b * p.q.batch + row.h * p.q.head + q0 * p.q.token) * kElementBytes;
    load_rows<kBlockQ, kThreads, Loop::rolled>(q_tile, q_data, p.q.token, row.n_q - q0, thread);
  }
  int entry = tile_walk.entries[0], entry_next = tile_walk.entries[1];
  ListReader<false> list{};

  const ModContext context{p, row.b, row.h, row.n_q, row.n_kv};
  ModHead head{};
  State state;
  start(state);
  if (tile_walk.count > 0) {
    const int kv = (entry >> 1) * kBlockKv;
    load_keys<kBlockKv, kThreads, Loop::rolled>(k_tile, p, p.k, row, kv_head, kv, thread);
    load_keys<kBlockKv, kThreads, Loop::rolled>(v_tile, p, p.v, row, kv_head, kv, thread);
    copy_commit();
    if (kHasLists) list.load(tile_walk.entry, tile_walk.count, 0);
    head = mod_head(context);
    if (kHasColumns && thread < kBlockKv)
      columns[0].at[thread] = mod_kv(context, head, min(kv + thread, row.n_kv - 1));
    start_mods(state, row, context, head, q_warp, lane);
  }

  const float unit = score_unit(p);
#pragma unroll 1
  for (int t = 0; t < tile_walk.count; ++t) {
    const int kv = (entry >> 1) * kBlockKv, stage = t & 1;
    int entry_after = 2 * (tile_walk.first + t + 2);
    if (kHasLists && t + 2 < tile_walk.count) entry_after = list(tile_walk.entry, tile_walk.count, t + 2);
    const bool more = t + 1 < tile_walk.count;
    copy_wait<0>();
    __syncthreads();  // this tile has arrived, and every warp is done with the buffers filled next
    ModKv column{};
    if (more) {
      const int next = (entry_next >> 1) * kBlockKv;
      load_keys<kBlockKv, kThreads, kLoop>(k_tile + (stage ^ 1) * kTileBytes, p, p.k, row, kv_head, next,
                                           thread);
      load_keys<kBlockKv, kThreads, kLoop>(v_tile + (stage ^ 1) * kTileBytes, p, p.v, row, kv_head, next,
                                           thread);
      copy_commit();
      if (kHasColumns && thread < kBlockKv) column = mod_kv(context, head, min(next + thread, row.n_kv - 1));
    }
    float s[kM][kN][4] = {};
    product_nt<kHeadDim>(s, q_tile, warp * 16 * kM, k_tile + stage * kTileBytes, 0, lane);
    if (kHasColumns && more && thread < kBlockKv) columns[stage ^ 1].at[thread] = column;
    finish_scores(p, row, context, head, state, columns[stage], s, entry & 1,
                  crosses_border(p, row, q_first, q_last, kv, kBlockKv), q_warp, kv, lane);
    raise_maxima(state, s, unit);
    // The weights of some columns while the products of the ones before are under way.
    make_weights(p, row, state, s, unit, q_warp, kv, lane, [&](const auto& columns_from) {
      product_rn<kHeadDim>(state.out, s, v_tile + stage * kTileBytes, 0, 0, lane, columns_from);
    });
    entry = entry_next;
    entry_next = entry_after;
  }
  if (tile_walk.count == 0) {  // the queries were asked for in vain; their place is used again
    copy_commit();
    copy_wait<0>();
    __syncthreads();
  }
  finish(p, row, state, q_tile, q0, q_warp, warp, lane);
}

}  // namespace flexchat::cuda
#endif
