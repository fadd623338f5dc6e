// Attention, backward. With P = exp(mod(s) - lse), s = scale q.k, and D_i = sum_d out_i dout_i - dlse_i:
//
//   dV = P^T dO      dS = P o (dO V^T - D) o mod'(s)      dK = scale dS^T Q      dQ = scale dS K
//
// One block holds a tile of keys, for all query heads of its group, and walks over the tiles of queries that
// see some of it, last first: 10*D FLOPs an element (five products). Scores are kept transposed, so that P
// and dS are already the left operands of dV and dK in registers; only dS goes through shared memory, for dQ.
// What bounds the kernel is what warps read from shared memory; where it helps (kPaired), two of them share
// keys and P goes through it, too.
//
// Deterministic: dK and dV are summed in one thread, in the order of the steps (advance). dQ of a query
// tile is summed in memory by the blocks of its key tiles, which take turns in ascending order (dq_turn).
// Blocks draw their tiles from a counter, first keys first, so whoever waits, waits for one that runs. Under
// a causal mask the first keys are also those with the most queries.
#pragma once
#include "attention_common.cuh"
#include "mbarrier.cuh"

namespace flexchat::cuda {

namespace backward {

constexpr BackwardTile kTile = backward_tile(kDType, kHeadDim, kSm90a);
static_assert(kTile.wgmma == ATTENTION_WGMMA);  // else the main kernel below
constexpr int kBlockQ = kTile.block_q, kBlockKv = kTile.block_kv(), kThreads = kTile.threads();
// Two warps may share their keys: each takes half of the queries for the scores, and half of the columns of
// dK and dV, and they exchange P and dS through shared memory, so that all in all less is read from there.
// Not with score mods, whose gradients want registers, nor on GPUs without shared memory for P.
#if __CUDA_ARCH__ >= 900
constexpr bool kPaired = !kTile.wgmma && !MOD_HAS_SCORE && paired_backward(kDType, kHeadDim);
#else
constexpr bool kPaired = false;
#endif
constexpr int kSplit = kPaired ? 2 : kTile.d_split;  // warps with the same keys
constexpr int kM = kPaired ? 2 * kTile.m_tiles : kTile.m_tiles;
constexpr int kSteps = kPaired ? 2 : 1, kStep = kTile.q_step / kSteps, kN = kStep / 8;
constexpr int kColumns = kHeadDim / kSplit, kD = kColumns / 8;
constexpr int kDqWarpsQ = kTile.dq_warps_q(), kDqM = kTile.dq_m(), kDqN = kTile.dq_n(kDType, kHeadDim),
              kDqFloats = kTile.dq_floats(kDType, kHeadDim);
constexpr int kRowBytes = Tile<kHeadDim>::row_bytes, kQBytes = kBlockQ * kRowBytes,
              kDsBytes = kBlockKv * Tile<kBlockQ>::row_bytes;
constexpr int kGrads = MOD_N_CAPTURE_GRADS, kSumBytes = kGrads * kTile.warps * kBlockQ * 4;
constexpr bool kHasLists = MOD_HAS_MASK;
ATTENTION_DEVICE constexpr char kind(int g) { return MOD_CAPTURE_GRAD_KINDS[g]; }

// Where things lie in shared memory.
struct Shared {
  unsigned k, v, q, dout, ds, stats, sums;  // all but k and v: two stages
  unsigned p;                               // kPaired: the weights
  unsigned dq, items, barriers;             // wgmma
};
ATTENTION_DEVICE Shared make_shared(const char* base) {
  Shared s;
  s.k = shared_address(base);
  s.v = s.k + kBlockKv * kRowBytes;
  s.q = s.v + kBlockKv * kRowBytes;
  s.dout = s.q + 2 * kQBytes;
  s.ds = s.dout + 2 * kQBytes;
  s.stats = s.ds + 2 * kDsBytes;
  s.sums = s.stats + 4 * kBlockQ * 4;
  s.p = s.dq = s.sums + 2 * kSumBytes;
  s.items = s.dq + kDqFloats * 4;
  s.barriers = s.items + 2 * 16;
  return s;
}

ATTENTION_DEVICE int query_tiles(const AttentionParams& p) { return (p.q_len + kBlockQ - 1) / kBlockQ; }

// The query tiles that visit key tile j.
ATTENTION_DEVICE TileWalk walk(const AttentionParams& p, const Row& row, int j) {
  if (p.transposed.begin) return list_walk(p.transposed, row, (p.kv_len + kBlockKv - 1) / kBlockKv, j);
  int first = 0, last = row.n_q - 1;
  if (p.causal) {
    first = max(0, j * kBlockKv - row.offset);
    if (p.window >= 0) last = min(last, min(j * kBlockKv + kBlockKv, row.n_kv) - 1 + p.window - row.offset);
  }
  if (j * kBlockKv >= row.n_kv || first > last) return {nullptr, 0, 0};
  return {nullptr, first / kBlockQ, last / kBlockQ - first / kBlockQ + 1};
}

// One step of a block: a query tile of one of its heads. `turn`: how many key tiles come before in its dQ.
struct Step {
  int h_in_group, i;  // position in the walk of that head
  TileWalk walk;
  int entry, entry_next;  // the next one of the walk is asked for a step ahead
  ATTENTION_DEVICE int tile() const { return entry >> 1; }
};
ATTENTION_DEVICE Row head_row(const AttentionParams& p, int b, int kv_head, int h_in_group) {
  return make_row(p, b, kv_head * (p.n_head / p.n_kv_head) + h_in_group);
}
// Do all heads visit the same tiles, and is nothing else kept for each? Then the heads of a tile come one
// after the other, so that blocks of other keys, which begin with the same tile, stay behind each other.
ATTENTION_DEVICE bool heads_inside(const AttentionParams& p) {
  return !MOD_HAS_SCORE && (!kHasLists || (p.transposed.begin && p.transposed.head_rows == 1));
}
// Must what mods know of the head be computed anew?
ATTENTION_DEVICE bool is_new_head(const AttentionParams& p, int head_now, int head) {
  return head_now < 0 || (head_now != head && !heads_inside(p));
}
// The next step, through heads with nothing to do; false after the last. Query tiles are taken last first.
ATTENTION_DEVICE bool advance(const AttentionParams& p, int b, int kv_head, int j, Step& s) {
  const int heads = p.n_head / p.n_kv_head;
  const bool inside = heads_inside(p), begun = s.h_in_group >= 0;
  if (inside && begun && ++s.h_in_group < heads) return true;
  ++s.i;
  while (s.i >= s.walk.count) {
    if ((inside && begun) || ++s.h_in_group >= heads) return false;
    s.walk = walk(p, head_row(p, b, kv_head, s.h_in_group), j);
    s.i = 0;
    if (kHasLists && s.walk.count > 0) s.entry_next = s.walk.at(s.walk.count - 1);
  }
  if (inside) s.h_in_group = 0;
  s.entry = kHasLists ? s.entry_next : s.walk.at(s.walk.count - 1 - s.i);
  if (kHasLists && s.i + 1 < s.walk.count) s.entry_next = s.walk.at(s.walk.count - 2 - s.i);
  return true;
}
ATTENTION_DEVICE int turn(const AttentionParams& p, const Row& row, const Step& s, int j) {
  if (s.walk.entry)
    return __ldg(p.transposed.rank + (s.walk.entry - p.transposed.entry) + s.walk.count - 1 - s.i);
  return j - key_range(p, row, row.offset + s.tile() * kBlockQ).first / kBlockKv;
}

// Is any element of the step hidden?
ATTENTION_DEVICE bool is_partial(const AttentionParams& p, const Row& row, const Step& s, int kv0) {
  const int q0 = s.tile() * kBlockQ;
  return (s.entry & 1) || (MOD_HAS_MASK && !s.walk.entry) ||
         crosses_border(p, row, row.offset + q0, row.offset + min(q0 + kBlockQ, row.n_q) - 1, kv0, kBlockKv);
}

ATTENTION_DEVICE void load_queries(const AttentionParams& p, const Row& row, const Shared& shared, int tile,
                                   int stage, int thread) {
  const int q0 = tile * kBlockQ;
  const auto rows = [&](unsigned to, const AttentionView& view) {
    const char* from = static_cast<const char*>(view.data) +
                       (row.b * view.batch + row.h * view.head + q0 * view.token) * kElementBytes;
    load_rows<kBlockQ, kThreads>(to + stage * kQBytes, from, view.token, row.n_q - q0, thread);
  };
  rows(shared.q, p.q);
  rows(shared.dout, p.dout);
  const float* stats =
      p.stats + (static_cast<long long>(row.b * p.n_head + row.h) * query_tiles(p) + tile) * 2 * kBlockQ;
  if (thread < 2 * kBlockQ / 4)
    copy_async(shared.stats + stage * 2 * kBlockQ * 4 + thread * 16, stats + thread * 4, true);
  copy_commit();
}

// What a thread knows of its 2*kM keys for the present head.
struct Keys {
  ModHead head;
  ModKv mod[kM][2];
  float grad[kGrads > 0 ? kGrads : 1][kM][2];  // captured tensors, kind k
};

// x = coarse + fine: multiples of 2^-20 and of 2^-56. Integer sums do not depend on their order. What is no
// number, or beyond 2^39, leaves a mark that no further addition hides.
ATTENTION_DEVICE void add_fixed(unsigned long long* sum, float x) {
  if (!(fabsf(x) < 0x1p39f)) {
    atomicExch(sum, 1ull << 61);
    return;
  }
  const float coarse = rintf(x * 0x1p20f), fine = rintf((x - coarse * 0x1p-20f) * 0x1p56f);
  if (coarse != 0) atomicAdd(sum, static_cast<unsigned long long>(static_cast<long long>(coarse)));
  if (fine != 0) atomicAdd(sum + 1, static_cast<unsigned long long>(static_cast<long long>(fine)));
}

// The dropout factor of every weight times x.
ATTENTION_DEVICE void drop(const AttentionParams& p, const Row& row, float (&x)[kM][kN][4], int q0,
                           int kv_warp, int lane) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int q = q0 + 8 * n + 2 * (lane % 4) + e % 2, key = kv_warp + 16 * m + 8 * (e / 2) + lane / 4;
        const DropoutBits bits = dropout_bits(p.dropout_seed, row.b, row.h, q, key / 4);
        const unsigned low = key & 1 ? bits.word[1] : bits.word[0],
                       high = key & 1 ? bits.word[3] : bits.word[2];
        x[m][n][e] *= (key & 2 ? high : low) < p.dropout_threshold ? 0.0f : p.dropout_scale;
      }
}

// Of a thread's elements [m][n][e], those that lengths or the mask hide, as bits 4 * (kM * n + m) + e.
static_assert(4 * kM * kN <= 32);
ATTENTION_DEVICE unsigned hidden_elements(const AttentionParams& p, const Row& row, const Keys& keys, int q0,
                                          int kv_warp, int lane) {
  const ModContext context{p, row.b, row.h, row.n_q, row.n_kv};
  unsigned hidden = 0;
#pragma unroll
  for (int n = 0; n < kN; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int q = row.offset + min(q0 + 8 * n + 2 * (lane % 4) + e, row.n_q - 1);
      const ModQ mod = mod_q(context, keys.head, q);
      const KeyRange range = key_range(p, row, q);
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int key = kv_warp + 16 * m + 8 * i + lane / 4;
          const bool seen = key >= range.first && key < range.end &&
                            mod_mask(context, keys.head, mod, keys.mod[m][i], q, min(key, row.n_kv - 1));
          if (!seen) hidden |= 1u << (4 * (kM * n + m) + 2 * i + e);
        }
    }
  return hidden;
}

// s (raw products) becomes the weights, dp (dO V^T) becomes dS; both are (keys, queries). q0: the first query
// of this step of kStep queries, at row in_tile of the tile. hidden: as above, if `masked`.
template <bool masked>
ATTENTION_DEVICE void elementwise(const AttentionParams& p, const Row& row, unsigned sum_tile, Keys& keys,
                                  float (&s)[kM][kN][4], float (&dp)[kM][kN][4], unsigned hidden,
                                  unsigned stats, int q0, int in_tile, int kv_warp, bool counts, int warp,
                                  int lane) {
  const ModContext context{p, row.b, row.h, row.n_q, row.n_kv};
  const float unit = MOD_HAS_SCORE ? kLog2e : p.scale * kLog2e;
  const auto piece = [&](int n, int at) {
    const int column = 8 * n + 2 * (lane % 4);
    const float2 lses = load_shared2(stats + (in_tile + column) * 4);
    const float2 deltas = load_shared2(stats + (kBlockQ + in_tile + column) * 4);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float lse = e ? lses.y : lses.x, delta = e ? deltas.y : deltas.x;
      const int q = row.offset + min(q0 + column + e, row.n_q - 1);
      const ModQ mod = mod_q(context, keys.head, q);
      float sums[kGrads > 0 ? kGrads : 1] = {};
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int inside = min(kv_warp + 16 * m + 8 * i + lane / 4, row.n_kv - 1);
          float& w = s[m][at][2 * i + e];
          float& d = dp[m][at][2 * i + e];
          const float score = w * p.scale;
          const float changed =
              MOD_HAS_SCORE ? mod_score(context, keys.head, mod, keys.mod[m][i], score, q, inside) : w;
          w = exp2_fast(fmaf(changed, unit, -lse));
          if (masked && (hidden >> (4 * (kM * n + m) + 2 * i + e) & 1)) w = 0;
          d = w * (d - delta);
          if (MOD_HAS_SCORE) {
            // A weight of zero has no gradient, even where the mod's slope is infinite.
#pragma unroll
            for (int g = 0; g < kGrads; ++g) {
              const float slope =
                  mod_capture_grad(g, context, keys.head, mod, keys.mod[m][i], score, q, inside);
              const float grad = w == 0 ? 0.0f : d * slope;
              if (kind(g) == 'k') keys.grad[g][m][i] += grad;
              if (kind(g) == 'q') sums[g] += grad;
              if (kind(g) == 'a' && counts && grad != 0)
                add_fixed(p.capture_sum[g] + 2 * mod_capture_index(g, context, q, inside), grad);
            }
            const float slope = mod_score_grad(context, keys.head, mod, keys.mod[m][i], score, q, inside);
            d = w == 0 ? 0.0f : d * slope;
          }
        }
#pragma unroll
      for (int g = 0; g < kGrads; ++g)
        if (kind(g) == 'q') {
          float x = sums[g];
#pragma unroll
          for (int step = 4; step < 32; step *= 2) x += __shfl_xor_sync(~0u, x, step);
          const unsigned to = sum_tile + ((g * kTile.warps + warp) * kBlockQ + in_tile + column + e) * 4;
          if (lane < 4) store_shared(to, __float_as_uint(counts ? x : 0.0f));
        }
    }
  };
  for_each_piece<kRolledMods>(piece, s, dp);
}
// The same, whatever is hidden. Score mods are long: there is one copy of theirs.
ATTENTION_DEVICE void elementwise(bool partial, const AttentionParams& p, const Row& row, unsigned sum_tile,
                                  Keys& keys, float (&s)[kM][kN][4], float (&dp)[kM][kN][4], unsigned stats,
                                  int q0, int in_tile, int kv_warp, bool counts, int warp, int lane) {
  const unsigned hidden = partial ? hidden_elements(p, row, keys, q0, kv_warp, lane) : 0;
  if (MOD_HAS_SCORE || partial)
    elementwise<true>(p, row, sum_tile, keys, s, dp, hidden, stats, q0, in_tile, kv_warp, counts, warp, lane);
  else
    elementwise<false>(p, row, sum_tile, keys, s, dp, 0, stats, q0, in_tile, kv_warp, counts, warp, lane);
}

ATTENTION_DEVICE int load_acquire(const int* p) {
  int x;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
ATTENTION_DEVICE int load_relaxed(const int* p) {
  int x;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
ATTENTION_DEVICE void store_release(int* p, int x) {
  asm volatile("fence.acq_rel.gpu; st.relaxed.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
// Of the two warps that share keys.
ATTENTION_DEVICE void pair_barrier(int warp) {
  asm volatile("bar.sync %0, 64;" ::"r"(1 + warp / 2) : "memory");
}

// dQ of a query tile += this block's share; only one block at a time is here for a tile. The first writes.
ATTENTION_DEVICE void add_to_sum(float* sum, const float (&dq)[kDqM][kDqN][4], bool first, int thread) {
#pragma unroll
  for (int m = 0; m < kDqM; ++m)
#pragma unroll
    for (int n = 0; n < kDqN; ++n) {
      float* to = sum + ((m * kDqN + n) * kThreads + thread) * 4;
      const float(&x)[4] = dq[m][n];
      if (first) {
        asm volatile("st.global.cg.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x[0]), "f"(x[1]), "f"(x[2]),
                     "f"(x[3])
                     : "memory");
      } else {
#if __CUDA_ARCH__ >= 900
        asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x[0]), "f"(x[1]),
                     "f"(x[2]), "f"(x[3])
                     : "memory");
#else
#pragma unroll
        for (int e = 0; e < 4; ++e)
          asm volatile("red.global.add.f32 [%0], %1;" ::"l"(to + e), "f"(x[e]) : "memory");
#endif
      }
    }
}

// The captured gradients of kind k that belong to the head just done, summed over its queries.
ATTENTION_DEVICE void write_key_sums(const AttentionParams& p, const Row& row, Keys& keys, int kv_warp,
                                     bool counts, int lane) {
#pragma unroll
  for (int g = 0; g < kGrads; ++g)
    if (kind(g) == 'k') {
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float x = keys.grad[g][m][i];
          x += __shfl_xor_sync(~0u, x, 1);
          x += __shfl_xor_sync(~0u, x, 2);
          const int key = kv_warp + 16 * m + 8 * i + lane / 4;
          if (counts && lane % 4 == 0 && key < p.kv_len)
            p.capture_part[g][(static_cast<long long>(row.b) * p.n_head + row.h) * p.kv_len + key] = x;
          keys.grad[g][m][i] = 0;
        }
    }
}

ATTENTION_DEVICE void add_query_sums(const AttentionParams& p, const Row& row, unsigned sum_tile, int q0,
                                     int thread) {
#pragma unroll
  for (int g = 0; g < kGrads; ++g)
    if (kind(g) == 'q' && thread < kBlockQ && q0 + thread < p.q_len) {
      float x = 0;
      for (int w = 0; w < kTile.warps; ++w)
        x += load_shared(sum_tile + ((g * kTile.warps + w) * kBlockQ + thread) * 4);
      float* to =
          p.capture_part[g] + (static_cast<long long>(row.b) * p.n_head + row.h) * p.q_len + q0 + thread;
      __stcg(to, __ldcg(to) + x);
    }
}

// The dQ that the last step has prepared and the present one adds up. turn null: none. `seen` is the turn as
// it was a step ago; a fence has followed (pass_turn) if `fenced`. Usually the tile was free by then, and
// nobody waits for the memory to answer.
struct Pending {
  int* turn;
  long long tile;
  int rank, h, q0, seen;
  bool fenced;
};
ATTENTION_DEVICE void await_turn(const Pending& pending) {
  if (!pending.turn || (pending.fenced && pending.seen == pending.rank)) return;
  while (load_acquire(pending.turn) != pending.rank) {
  }
}
ATTENTION_DEVICE void add_dq(const AttentionParams& p, const Shared& shared, const Pending& pending,
                             unsigned added, int stage, int b, int row, int column, int thread) {
  if (!pending.turn) return;
  float dq[kDqM][kDqN][4] = {};
  product_tn<kBlockQ, kHeadDim, kBlockKv>(dq, shared.ds + stage * kDsBytes, row, shared.k, column,
                                          thread % 32);
  add_to_sum(p.dq_sum + pending.tile * kDqFloats, dq, pending.rank == 0, thread);
  if (kGrads > 0)
    add_query_sums(p, make_row(p, b, pending.h), shared.sums + stage * kSumBytes, pending.q0, thread);
  barrier_arrive(added);
}
// The next block may add to that tile once every thread of this one has: the `turns`-th time that one passes
// a turn on.
ATTENTION_DEVICE void pass_turn(const Pending& pending, unsigned added, int& turns, int thread) {
  if (!pending.turn || thread != 0) return;
  barrier_wait(added, turns++ & 1);
  store_release(pending.turn, pending.rank + 1);
}

// dS (keys, queries) to its tile.
ATTENTION_DEVICE void store_ds(unsigned tile, const float (&ds)[kM][kN][4], int key_row, int column,
                               int lane) {
  float ones[kM][2];
#pragma unroll
  for (int m = 0; m < kM; ++m) ones[m][0] = ones[m][1] = 1;
  store_tile<kBlockQ>(tile, ds, ones, key_row, column, lane);
}

// Of the warps that hold keys: all but those that load, where there are such.
ATTENTION_DEVICE void key_barrier() { asm volatile("bar.sync 0, %0;" ::"n"(kThreads) : "memory"); }

template <int m_tiles, int n_tiles>
ATTENTION_DEVICE void write_key_gradient(const AttentionView& view, const AttentionParams& p,
                                         const Shared& shared, const float (&acc)[m_tiles][n_tiles][4],
                                         float factor, int b, int kv_head, int j, int key_row, int column,
                                         int thread) {
  float factors[m_tiles][2];
#pragma unroll
  for (int m = 0; m < m_tiles; ++m) factors[m][0] = factors[m][1] = factor;
  key_barrier();
  store_tile<kHeadDim>(shared.k, acc, factors, key_row, column, thread % 32);
  key_barrier();
  char* to = static_cast<char*>(view.data) +
             (b * view.batch + kv_head * view.head + j * kBlockKv * view.token) * kElementBytes;
  write_rows<kBlockKv, kThreads>(shared.k, 0, to, view.token, p.kv_len - j * kBlockKv, thread);
}

}  // namespace backward

// stats and the start of every sum. One warp for each row, rows that do not exist included.
extern "C" __global__ void __launch_bounds__(256)
    attention_backward_prepare(const __grid_constant__ AttentionParams p) {
  using namespace backward;
  const int lane = threadIdx.x % 32, rows = query_tiles(p) * kBlockQ;
  const long long at = static_cast<long long>(blockIdx.x) * 8 + threadIdx.x / 32;
  if (at == 0 && lane == 0) *p.ticket = 0;
  if (at >= static_cast<long long>(p.batch) * p.n_head * rows) return;
  const int bh = static_cast<int>(at / rows), q = static_cast<int>(at % rows);
  const Row row = make_row(p, bh / p.n_head, bh % p.n_head);
  float sum = 0, lse = -negative_infinity();
  if (q < row.n_q) {
    const auto chunk = [&](const AttentionView& view, int c) {
      return *reinterpret_cast<const float4*>(
          static_cast<const char*>(view.data) +
          (row.b * view.batch + row.h * view.head + q * view.token) * kElementBytes + c * 16);
    };
    for (int c = lane; c < kHeadDim * kElementBytes / 16; c += 32) {
      const float4 x = chunk(p.out, c), y = chunk(p.dout, c);
      const float xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (kExact) {
          sum = fmaf(xs[i], ys[i], sum);
        } else {
          float x0, x1, y0, y1;
          unpack(__float_as_uint(xs[i]), x0, x1);
          unpack(__float_as_uint(ys[i]), y0, y1);
          sum = fmaf(x1, y1, fmaf(x0, y0, sum));
        }
      }
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
    const long long i = static_cast<long long>(bh) * p.q_len + q;
    if (p.dlse) sum -= p.dlse[i];
    const float natural = p.lse[i];
    if (natural != negative_infinity()) lse = natural * kLog2e;
  }
  if (lane != 0) return;
  float* stats =
      p.stats + (static_cast<long long>(bh) * query_tiles(p) + q / kBlockQ) * 2 * kBlockQ + q % kBlockQ;
  stats[0] = lse;
  stats[kBlockQ] = lse == -negative_infinity() ? 0.0f : sum;
  if (q % kBlockQ == 0) p.dq_turn[static_cast<long long>(bh) * query_tiles(p) + q / kBlockQ] = 0;
  for (int g = 0; g < kGrads; ++g)
    if (kind(g) == 'q' && q < p.q_len) p.capture_part[g][static_cast<long long>(bh) * p.q_len + q] = 0;
}

#if !ATTENTION_WGMMA
extern "C" __global__ void __launch_bounds__(backward::kThreads, backward::kTile.ctas)
    attention_backward(const __grid_constant__ AttentionParams p) {
  using namespace backward;
  extern __shared__ __align__(1024) char shared_memory[];
  __shared__ int drawn;
  __shared__ unsigned long long barrier;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const unsigned added = shared_address(&barrier);  // a barrier for those who have added to a sum of dQ
  if (thread == 0) {
    drawn = atomicAdd(p.ticket, 1);
    barrier_init(added, kThreads);
  }
  __syncthreads();
  const int heads = p.batch * p.n_kv_head, j = drawn / heads, b = drawn % heads / p.n_kv_head;
  const int kv_head = drawn % heads % p.n_kv_head, kv0 = j * kBlockKv;
  const Shared shared = make_shared(shared_memory);

  const int part = warp % kSplit, key_row = warp / kSplit * 16 * kM, kv_warp = kv0 + key_row;
  const int dq_row = warp % kDqWarpsQ * 16 * kDqM, dq_column = warp / kDqWarpsQ * 8 * kDqN;
  float dk[kM][kD][4] = {}, dv[kM][kD][4] = {};
  Keys keys{};

  Step next{-1, 0, {nullptr, 0, 0}, 0, 0};
  bool more = advance(p, b, kv_head, j, next);
  int heads_done = 0;  // heads of the group whose captured gradients are written
  if (more) {
    const Row row = head_row(p, b, kv_head, next.h_in_group);
    load_keys<kBlockKv, kThreads>(shared.k, p, p.k, row, kv_head, kv0, thread);
    load_keys<kBlockKv, kThreads>(shared.v, p, p.v, row, kv_head, kv0, thread);
    load_queries(p, row, shared, next.tile(), 0, thread);
  }
  Pending pending{nullptr, 0, 0, 0, 0, 0, false};
  int head_now = -1, last_stage = 0, turns = 0;
#pragma unroll 1
  for (int stage = 0; more; stage ^= 1) {
    const Step step = next;
    const Row row = head_row(p, b, kv_head, step.h_in_group);
    more = advance(p, b, kv_head, j, next);
    copy_wait<0>();
    if (thread == 0) await_turn(pending);
    __syncthreads();  // this step's rows and the last one's dS have arrived; the other stage is free
    if (more)
      load_queries(p, head_row(p, b, kv_head, next.h_in_group), shared, next.tile(), stage ^ 1, thread);
    const long long tile_at = static_cast<long long>(row.b * p.n_head + row.h) * query_tiles(p) + step.tile();
    const int seen = thread == 0 ? load_relaxed(p.dq_turn + tile_at) : 0;
    add_dq(p, shared, pending, added, stage ^ 1, b, dq_row, dq_column, thread);
    const ModContext context{p, row.b, row.h, row.n_q, row.n_kv};
    if (is_new_head(p, head_now, step.h_in_group)) {
      for (; kGrads > 0 && heads_done < step.h_in_group; ++heads_done)
        write_key_sums(p, head_row(p, b, kv_head, heads_done), keys, kv_warp, part == 0, lane);
      head_now = step.h_in_group;
      keys.head = mod_head(context);
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          keys.mod[m][i] = mod_kv(context, keys.head, min(kv_warp + 16 * m + 8 * i + lane / 4, row.n_kv - 1));
    }
    const int q0 = step.tile() * kBlockQ;
    const bool partial = is_partial(p, row, step, kv0);
    const unsigned q_tile = shared.q + stage * kQBytes, dout_tile = shared.dout + stage * kQBytes;
    const unsigned stats = shared.stats + stage * 2 * kBlockQ * 4, sum_tile = shared.sums + stage * kSumBytes;
#pragma unroll(kExact ? 1 : 4)
    for (int c = 0; c < kBlockQ; c += kSteps * kStep) {
      float s[kM][kN][4] = {}, dp[kM][kN][4] = {};
      const int mine = c + (kPaired ? part * kStep : 0);
      product_nt<kHeadDim>(s, shared.k, key_row, q_tile, mine, lane);
      product_nt<kHeadDim>(dp, shared.v, key_row, dout_tile, mine, lane);
      if (ATTENTION_DROPOUT) drop(p, row, dp, q0 + mine, kv_warp, lane);
      elementwise(partial, p, row, sum_tile, keys, s, dp, stats, q0 + mine, mine, kv_warp, part == 0, warp,
                  lane);
      if (ATTENTION_DROPOUT) drop(p, row, s, q0 + mine, kv_warp, lane);
      const unsigned ds_tile = shared.ds + stage * kDsBytes;
      if (kPaired || part == 0) store_ds(ds_tile, dp, key_row, mine, lane);
      if constexpr (kPaired) {
        store_ds(shared.p, s, key_row, mine, lane);
        pair_barrier(warp);
        product_nn<kBlockQ, kHeadDim, kSteps * kStep>(dv, shared.p, key_row, c, dout_tile, part * kColumns,
                                                      lane);
      } else {
        product_rn<kHeadDim>(dv, s, dout_tile, c, part * kColumns, lane);
      }
      if (c + kSteps * kStep == kBlockQ) pass_turn(pending, added, turns, thread);
      if constexpr (kPaired)
        product_nn<kBlockQ, kHeadDim, kSteps * kStep>(dk, ds_tile, key_row, c, q_tile, part * kColumns, lane);
      else
        product_rn<kHeadDim>(dk, dp, q_tile, c, part * kColumns, lane);
    }
    pending = {p.dq_turn + tile_at, tile_at, turn(p, row, step, j), row.h, q0, seen, pending.turn != nullptr};
    last_stage = stage;
  }
  if (thread == 0) await_turn(pending);
  __syncthreads();
  add_dq(p, shared, pending, added, last_stage, b, dq_row, dq_column, thread);
  pass_turn(pending, added, turns, thread);
  for (; kGrads > 0 && heads_done < p.n_head / p.n_kv_head; ++heads_done)
    write_key_sums(p, head_row(p, b, kv_head, heads_done), keys, kv_warp, part == 0, lane);
  write_key_gradient(p.dk, p, shared, dk, p.scale, b, kv_head, j, key_row, part * kColumns, thread);
  write_key_gradient(p.dv, p, shared, dv, 1.0f, b, kv_head, j, key_row, part * kColumns, thread);
}
#endif

// dq = scale * dq_sum, one block for each query tile.
extern "C" __global__ void __launch_bounds__(backward::kThreads)
    attention_backward_finish(const __grid_constant__ AttentionParams p) {
  using namespace backward;
  extern __shared__ __align__(1024) char shared_memory[];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int bh = blockIdx.x / query_tiles(p), tile = blockIdx.x % query_tiles(p);
  const unsigned rows = shared_address(shared_memory);
  const bool some = p.dq_turn[blockIdx.x] > 0;
  const int row = warp % kDqWarpsQ * 16 * kDqM, column = warp / kDqWarpsQ * 8 * kDqN;
#pragma unroll
  for (int m = 0; m < kDqM; ++m)
#pragma unroll
    for (int n = 0; n < kDqN; ++n) {
      if (column + 8 * n >= kHeadDim) continue;
      float4 x = {};
      if (some)
        x = *reinterpret_cast<const float4*>(p.dq_sum + static_cast<long long>(blockIdx.x) * kDqFloats +
                                             ((m * kDqN + n) * kThreads + thread) * 4);
      const float acc[1][1][4] = {{{x.x, x.y, x.z, x.w}}};
      const float factor[1][2] = {{p.scale, p.scale}};
      store_tile<kHeadDim>(rows, acc, factor, row + 16 * m, column + 8 * n, lane);
    }
  __syncthreads();
  const int b = bh / p.n_head, h = bh % p.n_head, q0 = tile * kBlockQ;
  char* to =
      static_cast<char*>(p.dq.data) + (b * p.dq.batch + h * p.dq.head + q0 * p.dq.token) * kElementBytes;
  write_rows<kBlockQ, kThreads>(rows, 0, to, p.dq.token, p.q_len - q0, thread);
}

#if MOD_N_CAPTURE_GRADS > 0
// Adds the sums of kinds k and q to the elements they belong to. One thread for each (b, h, position).
extern "C" __global__ void __launch_bounds__(256)
    attention_backward_captures(const __grid_constant__ AttentionParams p) {
  using namespace backward;
  const long long at = static_cast<long long>(blockIdx.x) * 256 + threadIdx.x;
  const int length = max(p.q_len, p.kv_len);
  if (at >= static_cast<long long>(p.batch) * p.n_head * length) return;
  const int bh = static_cast<int>(at / length), t = static_cast<int>(at % length);
  const Row row = make_row(p, bh / p.n_head, bh % p.n_head);
  const ModContext context{p, row.b, row.h, row.n_q, row.n_kv};
#pragma unroll
  for (int g = 0; g < kGrads; ++g) {
    if (kind(g) == 'k' && t < row.n_kv && row.n_q > 0)
      add_fixed(p.capture_sum[g] + 2 * mod_capture_index(g, context, row.offset, t),
                p.capture_part[g][static_cast<long long>(bh) * p.kv_len + t]);
    if (kind(g) == 'q' && t < row.n_q && row.n_kv > 0)
      add_fixed(p.capture_sum[g] + 2 * mod_capture_index(g, context, row.offset + t, 0),
                p.capture_part[g][static_cast<long long>(bh) * p.q_len + t]);
  }
}
#endif

}  // namespace flexchat::cuda

#if ATTENTION_WGMMA
#include "attention_backward_wgmma.cuh"
#endif
