// The main kernel of attention_backward.cuh on Hopper, for bf16 and f16 with a head dim of 64 or 128: the
// same steps, turns and sums, with products of warpgroups (wgmma.cuh), 10*D FLOPs an element.
//
// A block holds 128 keys, 64 for each of two warpgroups, which take 64 queries a step:
//
//   S^T = K Q^T   dP^T = V dO^T   dV += P^T dO   dK += dS^T Q      64 keys each; P^T and dS^T from registers
//   dQ = dS K                                                      all keys, half of the columns each
//
// A third warpgroup keeps three stages of Q, dO and row statistics filled. The order of products leaves the
// tensor cores work during everything else: dP during the weights, dV during dS, dK while dS goes to shared
// memory, S of the next step while dQ goes out. A step reads 288 KB of shared memory for 10.5 MFLOP (D =
// 128): at 128 bytes a cycle nine tenths of the tensor cores' 2560 cycles.
#pragma once
#include "wgmma.cuh"

namespace flexchat::cuda {

namespace backward {

static_assert(kTile.wgmma && kM == 1 && kN == 8 && kSplit == 1 && kThreads == 256 && kStages == 3);
constexpr int kProducers = kTile.block_threads() - kThreads;
using KeyTile = Panels<kBlockKv, kHeadDim>;
using QueryTile = Panels<kBlockQ, kHeadDim>;
// Can dV start before dS is known? Score mods and dropout want weights and dS computed together.
constexpr bool kTwoParts = !MOD_HAS_SCORE && !ATTENTION_DROPOUT;

// A step as the producers hand it to the others. tile < 0: there is no other.
struct Item {
  int h_in_group, tile, partial, rank;
};
ATTENTION_DEVICE void store_item(unsigned to, const Item& x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.h_in_group), "r"(x.tile),
               "r"(x.partial), "r"(x.rank)
               : "memory");
}
ATTENTION_DEVICE Item load_item(unsigned from) {
  Item x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.h_in_group), "=r"(x.tile), "=r"(x.partial), "=r"(x.rank)
               : "r"(from)
               : "memory");
  return x;
}

// Barriers: a stage is full, a stage is empty, dS of both warpgroups is there and so is the turn to add dQ.
ATTENTION_DEVICE unsigned full(const Shared& shared, int stage) { return shared.barriers + 8 * stage; }
ATTENTION_DEVICE unsigned empty(const Shared& shared, int stage) {
  return shared.barriers + 8 * (kStages + stage);
}
ATTENTION_DEVICE unsigned ds_ready(const Shared& shared, int stage) {
  return shared.barriers + 8 * (2 * kStages + stage);
}

// Starts copies of `rows` rows of one head to panels; rows past `valid` become zeros, unread.
template <int rows>
ATTENTION_DEVICE void load_panels(unsigned tile, const AttentionView& view, long long first, int valid,
                                  int thread) {
  constexpr int chunks = kHeadDim / 8, at_once = kProducers / chunks;
  static_assert(at_once % 8 == 0);  // so that a thread's chunks are all swizzled alike
  const int row = thread / chunks, chunk = thread % chunks;
  const char* base = static_cast<const char*>(view.data) + first * kElementBytes + chunk * 16;
  const char* from = base + row * view.token * kElementBytes;
  unsigned to = tile + Panels<rows, kHeadDim>::chunk_offset(row, chunk);
#pragma unroll 4
  for (int r = row; r < rows; r += at_once) {
    const bool ok = r < valid;
    copy_async(to, ok ? from : base, ok);
    to += at_once * 128;
    from += at_once * view.token * kElementBytes;
  }
}

ATTENTION_DEVICE void produce(const AttentionParams& p, const Shared& shared, int b, int kv_head, int j,
                              int thread) {
  const int kv0 = j * kBlockKv;
  const auto announce = [&](int n) {
    fence_async();
    barrier_arrive(full(shared, n % kStages));
  };
  Step step{-1, 0, {nullptr, 0, 0}, 0, 0};
  int n = 0;
#pragma unroll 1
  for (; advance(p, b, kv_head, j, step); ++n) {
    const int stage = n % kStages, q0 = step.tile() * kBlockQ;
    const Row row = head_row(p, b, kv_head, step.h_in_group);
    if (n == 0) {
      const auto keys = [&](unsigned to, const AttentionView& view) {
        load_panels<kBlockKv>(to, view, b * view.batch + kv_head * view.head + kv0 * view.token,
                              row.n_kv - kv0, thread);
      };
      keys(shared.k, p.k);
      keys(shared.v, p.v);
    }
    if (n >= kStages) barrier_wait(empty(shared, stage), (n / kStages - 1) & 1);
    const auto queries = [&](unsigned to, const AttentionView& view) {
      load_panels<kBlockQ>(to + stage * kQBytes, view,
                           row.b * view.batch + row.h * view.head + q0 * view.token, row.n_q - q0, thread);
    };
    queries(shared.q, p.q);
    queries(shared.dout, p.dout);
    const float* stats =
        p.stats +
        (static_cast<long long>(row.b * p.n_head + row.h) * query_tiles(p) + step.tile()) * 2 * kBlockQ;
    if (thread < 2 * kBlockQ / 4)
      copy_async(shared.stats + stage * 2 * kBlockQ * 4 + thread * 16, stats + thread * 4, true);
    copy_commit();
    if (thread == 0)
      store_item(shared.items + 16 * stage,
                 {step.h_in_group, step.tile(), is_partial(p, row, step, kv0), turn(p, row, step, j)});
    if (n > 0) {
      copy_wait<1>();
      announce(n - 1);
    }
  }
  copy_wait<0>();
  if (n > 0) announce(n - 1);
  if (n >= kStages) barrier_wait(empty(shared, n % kStages), (n / kStages - 1) & 1);
  if (thread == 0) store_item(shared.items + 16 * (n % kStages), {0, -1, 0, 0});
  announce(n);
}

// c = A B^T over the head dim: 64 rows of a tile of keys, 64 of a tile of queries.
ATTENTION_DEVICE void product_of_rows(float (&c)[8][4], unsigned a, unsigned b) {
#pragma unroll
  for (int k = 0; k < kHeadDim / 16; ++k) {
    const auto x = descriptor(a + k / 4 * KeyTile::panel_bytes + k % 4 * 32, 0),
               y = descriptor(b + k / 4 * QueryTile::panel_bytes + k % 4 * 32, 0);
    if (k == 0)
      wgmma<false, false>(c, x, y);
    else
      wgmma<true, false>(c, x, y);
  }
}
// c += A B over the queries of a tile: A from registers, B the tile.
ATTENTION_DEVICE void add_product(float (&c)[kD][4], const Quad (&a)[kN / 2], unsigned b) {
#pragma unroll
  for (int k = 0; k < kN / 2; ++k) wgmma(c, a[k], descriptor(b + k * 16 * 128, QueryTile::panel_bytes));
}
// dQ = dS K over the keys of the block, half of the columns.
ATTENTION_DEVICE void product_dq(float (&c)[kDqN][4], unsigned ds, unsigned k_tile, int group) {
  const unsigned column = kHeadDim == 128 ? group * KeyTile::panel_bytes : group * 64;
#pragma unroll
  for (int k = 0; k < kBlockKv / 16; ++k) {
    const auto x = descriptor(ds + k * 16 * 128, 0), y = descriptor(k_tile + column + k * 16 * 128, 0);
    if (k == 0)
      wgmma<false, true>(c, x, y);
    else
      wgmma<true, true>(c, x, y);
  }
}

// An accumulator as the left operand of a product.
ATTENTION_DEVICE void round_to_operand(Quad (&to)[kN / 2], const float (&x)[kN][4]) {
#pragma unroll
  for (int k = 0; k < kN / 2; ++k)
    to[k] = {{pack(x[2 * k][0], x[2 * k][1]), pack(x[2 * k][2], x[2 * k][3]),
              pack(x[2 * k + 1][0], x[2 * k + 1][1]), pack(x[2 * k + 1][2], x[2 * k + 1][3])}};
}

// The two halves of elementwise() without score mod: s becomes the weights; dp becomes dS.
template <bool masked>
ATTENTION_DEVICE void weights(const AttentionParams& p, const Row& row, const Keys& keys, float (&s)[kN][4],
                              unsigned stats, int q0, int kv_warp, int lane) {
  const ModContext context{p, row.b, row.h, row.n_q, row.n_kv};
  const float unit = p.scale * kLog2e;
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const float2 lse = load_shared2(stats + (8 * n + 2 * (lane % 4)) * 4);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      s[n][e] = exp2_fast(fmaf(s[n][e], unit, e % 2 ? -lse.y : -lse.x));
      if (masked) {
        const int q = row.offset + min(q0 + 8 * n + 2 * (lane % 4) + e % 2, row.n_q - 1);
        const int key = kv_warp + 8 * (e / 2) + lane / 4;
        const KeyRange range = key_range(p, row, q);
        const bool seen = key >= range.first && key < range.end &&
                          mod_mask(context, keys.head, mod_q(context, keys.head, q), keys.mod[0][e / 2], q,
                                   min(key, row.n_kv - 1));
        if (!seen) s[n][e] = 0;
      }
    }
  }
}
ATTENTION_DEVICE void gradients(const float (&s)[kN][4], float (&dp)[kN][4], unsigned stats, int lane) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const float2 delta = load_shared2(stats + (kBlockQ + 8 * n + 2 * (lane % 4)) * 4);
#pragma unroll
    for (int e = 0; e < 4; ++e) dp[n][e] = s[n][e] * (dp[n][e] - (e % 2 ? delta.y : delta.x));
  }
}

// dQ of the last step to its sum.
ATTENTION_DEVICE void add_pending(const AttentionParams& p, const Row& row, const Shared& shared,
                                  const Pending& pending, const float (&dq)[1][kDqN][4], int n, int thread) {
  if (!pending.turn) return;
  add_to_sum(p.dq_sum + pending.tile * kDqFloats, dq, pending.rank == 0, thread);
  if (kGrads > 0)
    add_query_sums(p, {row.b, pending.h, row.n_q, row.n_kv, row.offset}, shared.sums + n % 2 * kSumBytes,
                   pending.q0, thread);
  if (thread >= 32) arrive();
}

ATTENTION_DEVICE void consume(const AttentionParams& p, const Shared& shared, int b, int kv_head, int j,
                              int thread) {
  const int lane = thread % 32, warp = __shfl_sync(~0u, thread / 32, 0), group = warp / 4;
  const int key_row = 16 * warp, kv_warp = j * kBlockKv + key_row, heads = p.n_head / p.n_kv_head;
  const unsigned k_rows = shared.k + group * 64 * 128, v_rows = shared.v + group * 64 * 128;
  float dk[1][kD][4] = {}, dv[1][kD][4] = {}, dq[1][kDqN][4] = {};
  Row row = make_row(p, b, 0);
  Keys keys{};
  Pending pending{nullptr, 0, 0, 0, 0, 0, false};
  int head_now = -1, heads_done = 0, n = 0;
#pragma unroll 1
  for (int stage = 0, round = 0;; ++n) {
    barrier_wait(full(shared, stage), round & 1);
    const Item item = load_item(shared.items + 16 * stage);
    if (item.tile < 0) break;
    const unsigned q_tile = shared.q + stage * kQBytes, dout_tile = shared.dout + stage * kQBytes;
    const unsigned stats = shared.stats + stage * 2 * kBlockQ * 4, ds_tile = shared.ds + n % 2 * kDsBytes;
    float s[1][kN][4], dp[1][kN][4];
    wgmma_begin();
    product_of_rows(s[0], k_rows, q_tile);
    wgmma_commit();
    wgmma_wait<0>();
    keep(dq[0]);
    add_pending(p, row, shared, pending, dq, n + 1, thread);
    wgmma_begin();
    product_of_rows(dp[0], v_rows, dout_tile);
    wgmma_commit();

    if (head_now != item.h_in_group) {
      for (; kGrads > 0 && heads_done < item.h_in_group; ++heads_done)
        write_key_sums(p, head_row(p, b, kv_head, heads_done), keys, kv_warp, true, lane);
      head_now = item.h_in_group;
      row.h = kv_head * heads + head_now;
      const ModContext context{p, row.b, row.h, row.n_q, row.n_kv};
      keys.head = mod_head(context);
#pragma unroll
      for (int i = 0; i < 2; ++i)
        keys.mod[0][i] = mod_kv(context, keys.head, min(kv_warp + 8 * i + lane / 4, row.n_kv - 1));
    }
    const int q0 = item.tile * kBlockQ;
    const long long tile_at = static_cast<long long>(row.b * p.n_head + row.h) * query_tiles(p) + item.tile;
    const Pending now = {p.dq_turn + tile_at,
                         tile_at,
                         item.rank,
                         row.h,
                         q0,
                         thread == 0 ? load_relaxed(p.dq_turn + tile_at) : 0,
                         pending.turn != nullptr};
    Quad weight[kN / 2], ds[kN / 2];
    if constexpr (kTwoParts) {
      wgmma_wait<1>();
      keep(s[0]);
      if (item.partial)
        weights<true>(p, row, keys, s[0], stats, q0, kv_warp, lane);
      else
        weights<false>(p, row, keys, s[0], stats, q0, kv_warp, lane);
    } else {
      wgmma_wait<0>();
      keep(s[0]);
      keep(dp[0]);
      const unsigned sum_tile = shared.sums + n % 2 * kSumBytes;
      if (ATTENTION_DROPOUT) drop(p, row, dp, q0, kv_warp, lane);
      if (item.partial)
        elementwise<true>(p, row, sum_tile, keys, s, dp, stats, q0, 0, kv_warp, true, warp, lane);
      else
        elementwise<false>(p, row, sum_tile, keys, s, dp, stats, q0, 0, kv_warp, true, warp, lane);
      if (ATTENTION_DROPOUT) drop(p, row, s, q0, kv_warp, lane);
    }
    round_to_operand(weight, s[0]);
    wgmma_begin();
    add_product(dv[0], weight, dout_tile);
    wgmma_commit();
    pass_turn(pending, warp, lane);
    if constexpr (kTwoParts) {
      wgmma_wait<1>();
      keep(dp[0]);
      gradients(s[0], dp[0], stats, lane);
    }
    round_to_operand(ds, dp[0]);
    wgmma_begin();
    add_product(dk[0], ds, q_tile);
    wgmma_commit();

#pragma unroll
    for (int k = 0; k < kN / 2; ++k)
      store_matrix(ds_tile + Panels<kBlockKv, kBlockQ>::chunk_offset(key_row + lane % 16, 2 * k + lane / 16),
                   ds[k]);
    fence_async();
    if (thread == 0) await_turn(now);
    __syncwarp();
    if (lane == 0) barrier_arrive(ds_ready(shared, n % 2));
    barrier_wait(ds_ready(shared, n % 2), n / 2 & 1);
    wgmma_begin();
    product_dq(dq[0], ds_tile, shared.k, group);
    wgmma_commit();
    wgmma_wait<1>();
    keep(weight);
    keep(ds);
    __syncwarp();
    if (lane == 0) barrier_arrive(empty(shared, stage));
    pending = now;
    if (++stage == kStages) {
      stage = 0;
      ++round;
    }
  }
  wgmma_wait<0>();
  keep(dq[0]);
  keep(dk[0]);
  keep(dv[0]);
  add_pending(p, row, shared, pending, dq, n + 1, thread);
  pass_turn(pending, warp, lane);
  for (; kGrads > 0 && heads_done < heads; ++heads_done)
    write_key_sums(p, head_row(p, b, kv_head, heads_done), keys, kv_warp, true, lane);
  write_key_gradient(p.dk, p, shared, dk, p.scale, b, kv_head, j, key_row, 0, thread);
  write_key_gradient(p.dv, p, shared, dv, 1.0f, b, kv_head, j, key_row, 0, thread);
}

}  // namespace backward

extern "C" __global__ void __launch_bounds__(backward::kTile.block_threads(), 1)
    attention_backward(const __grid_constant__ AttentionParams p) {
  using namespace backward;
  extern __shared__ __align__(1024) char shared_memory[];
  const Shared shared = make_shared(shared_memory);
  const int thread = threadIdx.x;
  if (thread == 0) {
    store_item(shared.items, {atomicAdd(p.ticket, 1), 0, 0, 0});
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(full(shared, stage), kProducers);
      barrier_init(empty(shared, stage), kTile.warps);
    }
    for (int stage = 0; stage < 2; ++stage) barrier_init(ds_ready(shared, stage), kTile.warps);
  }
  __syncthreads();
  const int drawn = load_item(shared.items).h_in_group, heads = p.batch * p.n_kv_head;
  __syncthreads();
  const int j = drawn / heads, b = drawn % heads / p.n_kv_head, kv_head = drawn % heads % p.n_kv_head;
  if (thread >= kThreads) {
    give_registers<40>();
    produce(p, shared, b, kv_head, j, thread - kThreads);
  } else {
    take_registers<232>();
    consume(p, shared, b, kv_head, j, thread);
  }
}

}  // namespace flexchat::cuda
