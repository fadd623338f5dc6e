// The main kernel of attention_backward.cuh on Hopper, for bf16 and f16 with a head dim of 64 or 128: the
// same steps, turns and sums, with products of warpgroups (wgmma.cuh), 10*D FLOPs an element.
//
// A block holds 128 keys, 64 for each of two warpgroups, which take 64 queries a step:
//
//   S^T = K Q^T   dP^T = V dO^T   dV += P^T dO   dK += dS^T Q      64 keys each; P^T and dS^T from registers
//   dQ = dS K                                                      all keys, half of the columns each
//
// A third warpgroup has two warps that keep two stages of Q, dO and row statistics filled, and two that wait
// for the block's turns and have dQ added to its sum straight from shared memory, so that nobody else waits
// for other blocks or for memory. The order of products leaves the tensor cores work during everything else:
// dP during the weights, dV during dS, dK while dS goes to shared memory, S of the next step while dQ does.
//
// A step is 10.5 MFLOP (D = 128), 2560 cycles of the tensor cores, and 368 KB to or from shared memory, 2944
// cycles at 128 bytes each.
#pragma once
#include "wgmma.cuh"

namespace flexchat::cuda {

namespace backward {

static_assert(kTile.wgmma && kM == 1 && kN == 8 && kSplit == 1 && kThreads == 256);
constexpr int kLoaders = 64;  // threads
using KeyTile = Panels<kBlockKv, kHeadDim>;
using QueryTile = Panels<kBlockQ, kHeadDim>;
// Can dV start before dS is known? Score mods and dropout want weights and dS computed together.
constexpr bool kTwoParts = !MOD_HAS_SCORE && !ATTENTION_DROPOUT;

// A step as those who load hand it to the others. tile < 0: there is no other.
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

// Barriers, the first four one for each stage, or parity of the step: Q and dO are there; nobody needs them
// any more; dS of both warpgroups is there; dQ is there; the place for dQ is free.
ATTENTION_DEVICE unsigned full(const Shared& shared, int stage) { return shared.barriers + 8 * stage; }
ATTENTION_DEVICE unsigned empty(const Shared& shared, int stage) { return shared.barriers + 16 + 8 * stage; }
ATTENTION_DEVICE unsigned ds_full(const Shared& shared, int stage) {
  return shared.barriers + 32 + 8 * stage;
}
ATTENTION_DEVICE unsigned dq_full(const Shared& shared, int stage) {
  return shared.barriers + 48 + 8 * stage;
}
ATTENTION_DEVICE unsigned dq_empty(const Shared& shared) { return shared.barriers + 64; }

// Two warps: one loads Q and statistics, the other dO.
ATTENTION_DEVICE void load_steps(const AttentionParams& p, const Shared& shared, int b, int kv_head, int j,
                                 int warp, int lane) {
  const int first_head = kv_head * (p.n_head / p.n_kv_head), heads = b * p.n_head + first_head;
  const long long token = warp == 0 ? p.q.token : p.dout.token, head = warp == 0 ? p.q.head : p.dout.head;
  const char* const start =
      (warp == 0 ? lane_start(p.q, lane) + (b * p.q.batch + first_head * p.q.head) * kElementBytes
                 : lane_start(p.dout, lane) + (b * p.dout.batch + first_head * p.dout.head) * kElementBytes);
  const unsigned tiles = warp == 0 ? shared.q : shared.dout;
  const Row row = make_row(p, b, 0);
  Step step{-1, 0, {nullptr, 0, 0}, 0, 0};
  int n = 0;
  // The stage is full once this warp's copies have arrived.
  const auto announce = [&](int stage, const Item& item) {
    if (warp == 0 && lane == 0) {
      store_item(shared.items + 16 * stage, item);
      barrier_arrive(full(shared, stage));
    }
    barrier_arrive_after_copies(full(shared, stage));
  };
#pragma unroll 1
  for (; advance(p, b, kv_head, j, step); ++n) {
    const int stage = n % 2, q0 = step.tile() * kBlockQ;
    const Item item = {step.h_in_group, step.tile(), is_partial(p, row, step, j * kBlockKv),
                       turn(p, row, step, j)};
    if (n >= 2) barrier_wait(empty(shared, stage), (n / 2 - 1) & 1);
    load_panels<kBlockQ, kBlockQ>(tiles + stage * kQBytes, 0,
                                  start + (step.h_in_group * head + q0 * token) * kElementBytes, token,
                                  row.n_q - q0, lane);
    if (warp == 0) {
      const long long at = static_cast<long long>(heads + step.h_in_group) * query_tiles(p) + item.tile;
      copy_async(shared.stats + stage * 2 * kBlockQ * 4 + lane * 16, p.stats + at * 2 * kBlockQ + lane * 4);
    }
    announce(stage, item);
  }
  for (int i = 0; i < 2; ++i, ++n) {  // one end for each that waits for a stage
    if (n >= 2) barrier_wait(empty(shared, n % 2), (n / 2 - 1) & 1);
    announce(n % 2, {0, -1, 0, 0});
  }
}

// Two warps take turns at adding dQ, even and odd steps, so that one may wait for memory while the other
// adds.
ATTENTION_DEVICE void add_steps(const AttentionParams& p, const Shared& shared, int b, int kv_head, int stage,
                                int lane) {
  const int heads = p.n_head / p.n_kv_head;
  const Row row = make_row(p, b, 0);
#pragma unroll 1
  for (int round = 0;; ++round) {
    barrier_wait(full(shared, stage), round & 1);
    const Item item = load_item(shared.items + 16 * stage);
    if (item.tile < 0) return;
    __syncwarp();
    if (lane == 0) barrier_arrive(empty(shared, stage));
    const int h = kv_head * heads + item.h_in_group;
    const long long tile = static_cast<long long>(b * p.n_head + h) * query_tiles(p) + item.tile;
    if (lane == 0) {  // the turn is asked for early: memory takes its time to answer
      while (load_acquire(p.dq_turn + tile) != item.rank) {
      }
    }
    barrier_wait(dq_full(shared, stage), round & 1);
    if (lane == 0) {
      fence_async_all();
      bulk_add(p.dq_sum + tile * kDqFloats, shared.dq, kDqFloats * 4, item.rank == 0);
      bulk_commit();
    }
    __syncwarp();
    if (kGrads > 0) {
#pragma unroll
      for (int q = lane; q < kBlockQ; q += 32)
        add_query_sums(p, {row.b, h, row.n_q, row.n_kv, row.offset}, shared.sums + stage * kSumBytes,
                       item.tile * kBlockQ, q);
      __syncwarp();
    }
    if (lane == 0) {
      bulk_wait_read();
      barrier_arrive(dq_empty(shared));
      bulk_wait();
      fence_async_all();
      store_release(p.dq_turn + tile, item.rank + 1);
    }
    __syncwarp();
  }
}

// c = A B^T over the head dim: 64 rows of a tile of keys, 64 of a tile of queries.
ATTENTION_DEVICE void product_of_rows(float (&c)[8][4], unsigned a, unsigned b) {
  wgmma_rows<KeyTile::panel_bytes, QueryTile::panel_bytes>(c, descriptor(a, 0), descriptor(b, 0));
}
// c += A B over the queries of a tile: A from registers, B the tile.
ATTENTION_DEVICE void add_product(float (&c)[kD][4], const Quad (&a)[kN / 2], unsigned b) {
  wgmma_add(c, a, descriptor(b, QueryTile::panel_bytes));
}
// dQ = dS K over the keys of the block, half of the columns.
ATTENTION_DEVICE void product_dq(float (&c)[kDqN][4], unsigned ds, unsigned k_tile, int group) {
  const unsigned column = kHeadDim == 128 ? group * KeyTile::panel_bytes : group * 64;
  wgmma_columns(c, descriptor(ds, 0), descriptor(k_tile + column, 0));
}

// The two halves of elementwise() without score mod: s becomes the weights; dp becomes dS.
template <bool masked>
ATTENTION_DEVICE void weights(const AttentionParams& p, const Row& row, const Keys& keys, float (&s)[kN][4],
                              unsigned stats, int q0, int kv_warp, int lane) {
  const unsigned hidden = masked ? hidden_elements(p, row, keys, q0, kv_warp, lane) : 0;
  const float unit = p.scale * kLog2e;
  const int column = 2 * (lane % 4);
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const float2 lse = load_shared2(stats + (8 * n + column) * 4);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      s[n][e] = exp2_fast(fmaf(s[n][e], unit, e % 2 ? -lse.y : -lse.x));
      if (masked && (hidden >> (4 * n + e) & 1)) s[n][e] = 0;
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

ATTENTION_DEVICE void compute(const AttentionParams& p, const Shared& shared, int b, int kv_head, int j,
                              int thread) {
  const int lane = thread % 32, warp = __shfl_sync(~0u, thread / 32, 0), group = warp / 4;
  const int key_row = 16 * warp, kv_warp = j * kBlockKv + key_row, heads = p.n_head / p.n_kv_head;
  const unsigned k_rows = shared.k + group * 64 * 128, v_rows = shared.v + group * 64 * 128;
  float dk[1][kD][4] = {}, dv[1][kD][4] = {}, s[1][kN][4];
  Row row = make_row(p, b, 0);
  const auto load_keys_of_warp = [&](unsigned tile, const AttentionView& view) {
    load_panels<16, kBlockKv>(
        tile, key_row,
        lane_start(view, lane) +
            (b * view.batch + kv_head * view.head + kv_warp * view.token) * kElementBytes,
        view.token, row.n_kv - kv_warp, lane);
  };
  load_keys_of_warp(shared.k, p.k);
  load_keys_of_warp(shared.v, p.v);
  copy_commit();
  copy_wait<0>();
  fence_async();
  key_barrier();
  Keys keys{};
  int head_now = -1, heads_done = 0;
  // The first product of a step, whose queries it waits for. After the last step nobody uses the result.
  const auto begin_step = [&](int n) {
    const int stage = n % 2;
    barrier_wait(full(shared, stage), n / 2 & 1);
    fence_async();
    wgmma_begin();
    product_of_rows(s[0], k_rows, shared.q + stage * kQBytes);
    wgmma_commit();
    return load_item(shared.items + 16 * stage);
  };
  Item item = begin_step(0);
  wgmma_wait<0>();
  keep(s[0]);
#pragma unroll 1
  for (int n = 0; item.tile >= 0; ++n) {
    const int stage = n % 2, q0 = item.tile * kBlockQ;
    const unsigned q_tile = shared.q + stage * kQBytes, dout_tile = shared.dout + stage * kQBytes;
    const unsigned stats = shared.stats + stage * 2 * kBlockQ * 4, ds_tile = shared.ds + stage * kDsBytes,
                   sum_tile = shared.sums + stage * kSumBytes;
    float dp[1][kN][4], dq[1][kDqN][4];
    Quad weight[kN / 2], ds[kN / 2];
    wgmma_begin();
    product_of_rows(dp[0], v_rows, dout_tile);
    wgmma_commit();

    row.h = kv_head * heads + item.h_in_group;
    if (is_new_head(p, head_now, item.h_in_group)) {
      for (; kGrads > 0 && heads_done < item.h_in_group; ++heads_done)
        write_key_sums(p, head_row(p, b, kv_head, heads_done), keys, kv_warp, true, lane);
      head_now = item.h_in_group;
      const ModContext context{p, row.b, row.h, row.n_q, row.n_kv};
      keys.head = mod_head(context);
#pragma unroll
      for (int i = 0; i < 2; ++i)
        keys.mod[0][i] = mod_kv(context, keys.head, min(kv_warp + 8 * i + lane / 4, row.n_kv - 1));
    }
    if constexpr (kTwoParts) {
      if (item.partial)
        weights<true>(p, row, keys, s[0], stats, q0, kv_warp, lane);
      else
        weights<false>(p, row, keys, s[0], stats, q0, kv_warp, lane);
    } else {
      wgmma_wait<0>();
      keep(dp[0]);
      if (ATTENTION_DROPOUT) drop(p, row, dp, q0, kv_warp, lane);
      elementwise(item.partial, p, row, sum_tile, keys, s, dp, stats, q0, 0, kv_warp, true, warp, lane);
      if (ATTENTION_DROPOUT) drop(p, row, s, q0, kv_warp, lane);
    }
    round_to_operand(weight, s[0]);
    wgmma_begin();
    add_product(dv[0], weight, dout_tile);
    wgmma_commit();
    if constexpr (kTwoParts) {
      wgmma_wait<1>();
      keep(dp[0]);
      gradients(s[0], dp[0], stats, lane);
    }
    round_to_operand(ds, dp[0]);
    wgmma_begin();
    add_product(dk[0], ds, q_tile);
    wgmma_commit();

    const unsigned ds_row = ds_tile + Panels<kBlockKv, kBlockQ>::chunk_offset(key_row + lane % 16, lane / 16);
#pragma unroll
    for (int k = 0; k < kN / 2; ++k) store_matrix(ds_row ^ k * 32, ds[k]);  // two chunks on
    fence_async();
    __syncwarp();
    if (lane == 0) barrier_arrive(ds_full(shared, stage));
    barrier_wait(ds_full(shared, stage), n / 2 & 1);
    wgmma_begin();
    product_dq(dq[0], ds_tile, shared.k, group);
    wgmma_commit();
    wgmma_wait<1>();
    keep(weight);
    keep(ds);
    __syncwarp();
    if (lane == 0) barrier_arrive(empty(shared, stage));

    item = begin_step(n + 1);
    if (n > 0) barrier_wait(dq_empty(shared), (n - 1) & 1);
    wgmma_wait<1>();
    keep(dq[0]);
#pragma unroll
    for (int i = 0; i < kDqN; ++i) store_shared4(shared.dq + (i * kThreads + thread) * 16, dq[0][i]);
    fence_async();
    __syncwarp();
    if (lane == 0) barrier_arrive(dq_full(shared, stage));
    wgmma_wait<0>();
    keep(s[0]);
  }
  keep(dk[0]);
  keep(dv[0]);
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
    for (int stage = 0; stage < 2; ++stage) {
      barrier_init(full(shared, stage), kLoaders + 1);
      barrier_init(empty(shared, stage), kTile.warps + 1);
      barrier_init(ds_full(shared, stage), kTile.warps);
      barrier_init(dq_full(shared, stage), kTile.warps);
    }
    barrier_init(dq_empty(shared), 1);
  }
  __syncthreads();
  const int drawn = load_item(shared.items).h_in_group, heads = p.batch * p.n_kv_head;
  __syncthreads();
  const int j = drawn / heads, b = drawn % heads / p.n_kv_head, kv_head = drawn % heads % p.n_kv_head;
  if (thread >= kThreads) {
    give_registers<40>();
    const int warp = (thread - kThreads) / 32, lane = thread % 32;
    if (warp < 2)
      load_steps(p, shared, b, kv_head, j, warp, lane);
    else
      add_steps(p, shared, b, kv_head, warp - 2, lane);
  } else {
    take_registers<232>();
    compute(p, shared, b, kv_head, j, thread);
  }
}

}  // namespace flexchat::cuda
