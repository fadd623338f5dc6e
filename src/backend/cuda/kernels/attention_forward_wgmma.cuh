// The kernel of attention_forward.cuh on Hopper, for bf16 and f16 with a head dim of 64 or 128: the same
// steps with products of warpgroups (wgmma.cuh), 4*D FLOPs an element.
//
// A block holds 128 queries, 64 for each of two warpgroups, which take 128 keys a step, or 64 (tiles.cuh):
//
//   S = Q K^T     both from shared memory
//   out += P V    P from registers
//
// A third warpgroup keeps stages of K and V filled, and has what the mod knows of their columns. The two
// others take turns at the tensor cores (as in FlashAttention-3, Shah et al. 2024): while one computes
// weights, the other's products run, out of this step and S of the next in one go.
//
// A step of 128 keys is 4.2 MFLOP for a warpgroup (D = 128), 1024 cycles of the tensor cores, and 8192
// exponentials, 512 cycles of each quarter of a multiprocessor.
#pragma once
#include "wgmma.cuh"

namespace flexchat::cuda {

namespace forward {

static_assert(kTile.wgmma && kM == 1 && kThreads == 256);
constexpr int kLoaders = 128, kRowsOfLoader = kBlockKv / 4, kStages = kTile.stages;
static_assert(kBlockKv <= kLoaders);
using QueryTile = Panels<kBlockQ, kHeadDim>;
using KeyTile = Panels<kBlockKv, kHeadDim>;

struct Shared {
  unsigned q, k, v, barriers;  // k and v: kStages
};
ATTENTION_DEVICE Shared make_shared(const char* base) {
  const unsigned q = shared_address(base), k = q + QueryTile::bytes, v = k + kStages * KeyTile::bytes;
  return {q, k, v, v + kStages * KeyTile::bytes};
}

// Barriers of each stage: keys, and what mods know of them, are there; values are; nobody needs the keys, or
// the values, any more.
ATTENTION_DEVICE unsigned stage_barrier(const Shared& shared, int kind, int stage) {
  return shared.barriers + 8 * (kind * kStages + stage);
}
ATTENTION_DEVICE unsigned k_full(const Shared& shared, int stage) { return stage_barrier(shared, 0, stage); }
ATTENTION_DEVICE unsigned v_full(const Shared& shared, int stage) { return stage_barrier(shared, 1, stage); }
ATTENTION_DEVICE unsigned k_empty(const Shared& shared, int stage) { return stage_barrier(shared, 2, stage); }
ATTENTION_DEVICE unsigned v_empty(const Shared& shared, int stage) { return stage_barrier(shared, 3, stage); }

// Of a block that has 128 or 256 threads in them: barrier 0 is that of __syncthreads.
ATTENTION_DEVICE void group_barrier(int group) {
  asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
}
ATTENTION_DEVICE void groups_barrier() { asm volatile("bar.sync 3, 256;" ::: "memory"); }
// A group's turn at the tensor cores.
ATTENTION_DEVICE void wait_for_turn(int group) {
  asm volatile("bar.sync %0, 256;" ::"r"(4 + group) : "memory");
}
ATTENTION_DEVICE void give_turn_to(int group) {
  asm volatile("bar.arrive %0, 256;" ::"r"(4 + group) : "memory");
}

// A warp starts copies of its rows first.. of the tile of keys or values kv...
ATTENTION_DEVICE void load_rows_of_tile(unsigned tile, int first, const AttentionParams& p,
                                        const AttentionView& view, const Row& row, int kv_head, int kv,
                                        int lane) {
#if ATTENTION_PAGED
  const char* data =
      static_cast<const char*>(view.data) + kv_head * view.head * kElementBytes + lane % kChunks * 16;
  const int* table = p.block_table + static_cast<long long>(row.b) * p.table_stride;
#pragma unroll 4
  for (int r = lane / kChunks; r < kRowsOfLoader; r += kRowsAtOnce) {
    const int key = kv + first + r;
    const bool ok = key < row.n_kv;
    long long from = 0;
    if (ok) {
      const int page = key / p.page_size;
      from = (__ldg(table + page) * view.batch + (key - page * p.page_size) * view.token) * kElementBytes;
    }
    copy_async(tile + KeyTile::chunk_offset(first + r, lane % kChunks), data + from, ok);
  }
#else
  load_panels<kRowsOfLoader, kBlockKv>(
      tile, first,
      lane_start(view, lane) +
          (row.b * view.batch + kv_head * view.head + (kv + first) * view.token) * kElementBytes,
      view.token, row.n_kv - kv - first, lane);
#endif
}

// The four warps that load.
ATTENTION_DEVICE void load_tiles(const AttentionParams& p, const Shared& shared, Columns (&columns)[kStages],
                                 const Row& row, int kv_head, const TileWalk& walk, int thread) {
  const int lane = thread % 32, first = thread / 32 * kRowsOfLoader;
  const ModContext context{p, row.b, row.h, row.n_q, row.n_kv};
  const ModHead head = mod_head(context);
  ListReader<false> list{};
  if (kHasLists && walk.count > 0) list.load(walk.entry, walk.count, 0);
#pragma unroll 1
  for (int t = 0; t < walk.count; ++t) {
    const int entry = !kHasLists ? 2 * (walk.first + t)
                      : t == 0   ? walk.entries[0]
                      : t == 1   ? walk.entries[1]
                                 : list(walk.entry, walk.count, t);
    const int stage = t % kStages, kv = (entry >> 1) * kBlockKv;
    if (t >= kStages) barrier_wait(k_empty(shared, stage), (t / kStages - 1) & 1);
    load_rows_of_tile(shared.k + stage * KeyTile::bytes, first, p, p.k, row, kv_head, kv, lane);
    if (kHasColumns && thread < kBlockKv) {
      columns[stage].at[thread] = mod_kv(context, head, min(kv + thread, row.n_kv - 1));
      barrier_arrive(k_full(shared, stage));
    }
    barrier_arrive_after_copies(k_full(shared, stage));
    if (t >= kStages) barrier_wait(v_empty(shared, stage), (t / kStages - 1) & 1);
    load_rows_of_tile(shared.v + stage * KeyTile::bytes, first, p, p.v, row, kv_head, kv, lane);
    barrier_arrive_after_copies(v_full(shared, stage));
  }
}

// The two warpgroups that compute.
ATTENTION_DEVICE void compute(const AttentionParams& p, const Shared& shared,
                              const Columns (&columns)[kStages], const Row& row, const TileWalk& walk,
                              int tile, int thread) {
  const int lane = thread % 32, warp = __shfl_sync(~0u, thread / 32, 0), group = warp / 4;
  const int q0 = tile * kBlockQ, q_warp = q0 + 16 * warp;
  const int q_first = row.offset + q_warp, q_last = row.offset + min(q_warp + 16, row.n_q) - 1;
  const auto q_rows = descriptor(shared.q + group * 64 * 128, 0);
  const float unit = score_unit(p);
  const ModContext context{p, row.b, row.h, row.n_q, row.n_kv};
  ModHead head{};
  State state;
  start(state);
  float s[1][kN][4];
  int entry = walk.entries[0], entry_next = walk.entries[1];
  ListReader<false> list{};
  if (walk.count > 0) {
    load_panels<16, kBlockQ>(
        shared.q, 16 * warp,
        lane_start(p.q, lane) + (row.b * p.q.batch + row.h * p.q.head + q_warp * p.q.token) * kElementBytes,
        p.q.token, row.n_q - q_warp, lane);
    copy_commit();
    if (kHasLists) list.load(walk.entry, walk.count, 0);
    head = mod_head(context);
    start_mods(state, row, context, head, q_warp, lane);
    copy_wait<0>();
    fence_async();
    group_barrier(group);
    barrier_wait(k_full(shared, 0), 0);
    fence_async();
    wgmma_begin();
    wgmma_rows<QueryTile::panel_bytes, KeyTile::panel_bytes>(s[0], q_rows, descriptor(shared.k, 0));
    wgmma_commit();
    if (group == 1) give_turn_to(0);
    wgmma_wait<0>();
    keep(s[0]);
  }
#pragma unroll 1
  for (int t = 0; t < walk.count; ++t) {
    const int kv = (entry >> 1) * kBlockKv, stage = t % kStages, next = (t + 1) % kStages;
    int entry_after = 2 * (walk.first + t + 2);
    if (kHasLists && t + 2 < walk.count) entry_after = list(walk.entry, walk.count, t + 2);
    finish_scores(p, row, context, head, state, columns[stage], s, entry & 1,
                  crosses_border(p, row, q_first, q_last, kv, kBlockKv), q_warp, kv, lane);
    __syncwarp();
    if (lane == 0) barrier_arrive(k_empty(shared, stage));
    raise_maxima(state, s, unit);
    make_weights(p, row, state, s, unit, q_warp, kv, lane, [](const auto& columns_from) {
#pragma unroll
      for (int n = 0; n < kN; n += 2) columns_from(n);
    });
    Quad weight[kN / 2];
    round_to_operand(weight, s[0]);
    wait_for_turn(group);
    barrier_wait(v_full(shared, stage), t / kStages & 1);
    fence_async();
    wgmma_begin();
    wgmma_add(state.out[0], weight, descriptor(shared.v + stage * KeyTile::bytes, KeyTile::panel_bytes));
    wgmma_commit();
    // After the last step nobody uses the result.
    if (t + 1 < walk.count) barrier_wait(k_full(shared, next), (t + 1) / kStages & 1);
    fence_async();
    wgmma_rows<QueryTile::panel_bytes, KeyTile::panel_bytes>(s[0], q_rows,
                                                             descriptor(shared.k + next * KeyTile::bytes, 0));
    wgmma_commit();
    give_turn_to(group ^ 1);
    wgmma_wait<0>();
    keep(s[0]);
    keep(state.out[0]);
    keep(weight);
    __syncwarp();
    if (lane == 0) barrier_arrive(v_empty(shared, stage));
    entry = entry_next;
    entry_next = entry_after;
  }
  groups_barrier();  // keys' place is free
  finish(p, row, state, shared.k, q0, q_warp, warp, lane);
}

}  // namespace forward

extern "C" __global__ void __launch_bounds__(forward::kTile.block_threads(), 1)
    attention_forward(const __grid_constant__ AttentionParams p) {
  using namespace forward;
  extern __shared__ __align__(1024) char shared_memory[];
  __shared__ Columns columns[kStages];
  const Shared shared = make_shared(shared_memory);
  const int thread = threadIdx.x;
  const int heads = p.batch * p.n_head, tiles = (p.q_len + kBlockQ - 1) / kBlockQ;
  const int bh = blockIdx.x % heads, tile = tiles - 1 - blockIdx.x / heads;
  const Row row = make_row(p, bh / p.n_head, bh % p.n_head);
  const int q0 = tile * kBlockQ;
  TileWalk tile_walk{};
  if (q0 < row.n_q && row.n_kv > 0)
    tile_walk = walk(p, row, tile, row.offset + q0, row.offset + min(q0 + kBlockQ, row.n_q) - 1);
  if (thread == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(k_full(shared, stage), kHasColumns ? kLoaders + kBlockKv : kLoaders);
      barrier_init(v_full(shared, stage), kLoaders);
      barrier_init(k_empty(shared, stage), kTile.warps);
      barrier_init(v_empty(shared, stage), kTile.warps);
    }
  }
  __syncthreads();
  if (thread >= kThreads) {
    give_registers<40>();
    load_tiles(p, shared, columns, row, row.h / (p.n_head / p.n_kv_head), tile_walk, thread - kThreads);
  } else {
    take_registers<232>();
    compute(p, shared, columns, row, tile_walk, tile, thread);
  }
}

}  // namespace flexchat::cuda
