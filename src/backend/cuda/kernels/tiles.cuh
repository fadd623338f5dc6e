// Tile sizes of the attention kernels: the one table that kernels, host and tests read. A function of dtype
// and head dim alone, and of whether Hopper's own instructions are there. Read by g++, nvcc and NVRTC.
//
// Limits that shape it: 255 registers a thread, so a warp's f32 accumulators stay under ~192; shared memory
// that fits sm_80 (163 KB) wherever the fastest choice does.
#pragma once

namespace flexchat::cuda {

enum AttentionDType { kAttentionF32 = 0, kAttentionBf16 = 1, kAttentionF16 = 2 };

// Bytes of one row of a tile in shared memory. Rows whose 16-byte chunks come in eights are swizzled; others
// are padded to an odd number of chunks: eight rows at one column then lie in eight different bank groups.
constexpr int tile_row_bytes(int elements, int element_bytes) {
  const int chunks = elements * element_bytes / 16;
  return (chunks % 8 == 0 ? chunks : (chunks | 1)) * 16;
}

// Where Hopper's products of warpgroups serve.
constexpr bool wgmma_tiles(int dtype, int d) { return dtype != kAttentionF32 && (d == 64 || d == 128); }

struct ForwardTile {
  int warps, m_tiles;  // each warp holds m_tiles x 16 queries
  int block_kv, stages, ctas;
  bool wgmma = false;  // four more warps load (attention_forward_wgmma.cuh)
  constexpr int block_q() const { return warps * m_tiles * 16; }
  constexpr int threads() const { return warps * 32; }
  constexpr int block_threads() const { return threads() + (wgmma ? 128 : 0); }
};

// sm90a: compiled for Hopper, with its own instructions. dear: the score mod is (MOD_IS_DEAR); steps of 64
// keys in place of 128 then cost 1 to 2%, where cheap mods lose 12, and compile in two thirds of the time.
constexpr ForwardTile forward_tile(int dtype, int d, bool sm90a, bool dear) {
  if (sm90a && wgmma_tiles(dtype, d))
    return dear ? ForwardTile{8, 1, 64, 4, 1, true} : ForwardTile{8, 1, 128, 2, 1, true};
  if (dtype == kAttentionF32) return d <= 128 ? ForwardTile{4, 1, 32, 2, 2} : ForwardTile{4, 1, 16, 2, 1};
  if (d <= 64) return {4, 2, 64, 2, 3};
  if (d <= 128) return {4, 2, 64, 2, 2};
  return {4, 1, 64, 2, 1};
}

// Q and the stages of K and V, and four barriers of each in the wgmma kernel. `major`: of the GPU.
constexpr int forward_shared_bytes(int dtype, int d, int major, bool dear) {
  const ForwardTile t = forward_tile(dtype, d, major == 9, dear);
  const int row = tile_row_bytes(d, dtype == kAttentionF32 ? 4 : 2);
  return (t.block_q() + 2 * t.stages * t.block_kv) * row + (t.wgmma ? 4 * t.stages * 8 : 0);
}

// The backward: a block holds block_kv keys; each warp m_tiles x 16 of them and, of its keys' gradients, the
// columns [D / d_split * part, ...). Scores of q_step queries are in registers at a time.
struct BackwardTile {
  int warps, m_tiles, d_split, block_q, q_step, ctas;
  bool wgmma = false;  // four more warps load (attention_backward_wgmma.cuh)
  constexpr int block_threads() const { return threads() + (wgmma ? 128 : 0); }
  constexpr int block_kv() const { return warps / d_split * m_tiles * 16; }
  constexpr int threads() const { return warps * 32; }
  // dQ of a query tile: warps are dq_warps_q x the rest over (queries x columns), each dq_m x 16 queries and
  // dq_n x 8 columns (more than there are, when they do not divide).
  constexpr int dq_warps_q() const { return wgmma ? 4 : block_q >= 32 ? 2 : 1; }
  constexpr int dq_m() const { return block_q / 16 / dq_warps_q(); }
  constexpr int dq_n(int dtype, int d) const {
    const int warps_d = warps / dq_warps_q(), n = (d / 8 + warps_d - 1) / warps_d;
    return dtype == kAttentionF32 ? n : (n + 1) / 2 * 2;
  }
  // Floats of a query tile's dQ sum, in the order in which threads hold them.
  constexpr int dq_floats(int dtype, int d) const { return threads() * dq_m() * dq_n(dtype, d) * 4; }
};

constexpr BackwardTile backward_tile(int dtype, int d, bool sm90a) {
  if (sm90a && wgmma_tiles(dtype, d)) return {8, 1, 1, 64, 64, 1, true};
  if (dtype == kAttentionF32) {
    if (d <= 64) return {8, 1, 1, 32, 32, 1};
    if (d <= 128) return {8, 1, 2, 32, 16, 1};
    if (d <= 192) return {8, 1, 2, 16, 16, 1};
    return {4, 1, 2, 16, 16, 1};
  }
  if (d <= 64) return {4, 2, 1, 64, 32, 2};
  if (d <= 128) return {8, 1, 1, 64, 64, 1};
  if (d <= 192) return {8, 1, 2, 64, 32, 1};
  return {8, 1, 2, 32, 32, 1};
}

// May two warps share their keys (attention_backward.cuh)? Where one warp holds 16 keys and all columns.
constexpr bool paired_backward(int dtype, int d) {
  const BackwardTile t = backward_tile(dtype, d, false);
  return dtype != kAttentionF32 && t.d_split == 1 && t.m_tiles == 1 && d % 32 == 0;
}

// K, V; two stages of Q, dO, row statistics, dS, and each warp's sums by query of n_grads captured accesses;
// on sm_90 and up P where warps share keys, or dQ, two steps and nine barriers of the wgmma kernel. `major`:
// of the GPU.
constexpr int backward_shared_bytes(int dtype, int d, int n_grads, int major) {
  const BackwardTile t = backward_tile(dtype, d, major == 9);
  const int element = dtype == kAttentionF32 ? 4 : 2, row = tile_row_bytes(d, element);
  const int ds = t.block_kv() * tile_row_bytes(t.block_q, element);
  return 2 * t.block_kv() * row + 4 * t.block_q * row + 2 * ds + 4 * t.block_q * 4 +
         2 * n_grads * t.warps * t.block_q * 4 + (t.wgmma ? t.dq_floats(dtype, d) * 4 + 2 * 16 + 9 * 8 : 0) +
         (major >= 9 && !t.wgmma && paired_backward(dtype, d) ? ds : 0);
}

static_assert(backward_shared_bytes(kAttentionBf16, 128, 8, 9) <= 227 * 1024);  // what a block may have

// Decoding: each warp has its own stages of 16 keys and values.
struct DecodeTile {
  int warps, stages;
  constexpr int keys() const { return warps * 16; }  // of a block at a time: split_len is a multiple
};
constexpr int kDecodeRows = 16;  // query heads of a group x queries

constexpr DecodeTile decode_tile(int dtype, int d) {
  const int stage = 32 * tile_row_bytes(d, dtype == kAttentionF32 ? 4 : 2);  // 16 keys, 16 values
  if (12 * stage <= 100 * 1024) return {4, 3};
  if (8 * stage <= 140 * 1024) return {4, 2};
  return {2, 2};
}

constexpr int decode_shared_bytes(int dtype, int d) {
  const DecodeTile t = decode_tile(dtype, d);
  const int row = tile_row_bytes(d, dtype == kAttentionF32 ? 4 : 2);
  const int loop = 16 * row + t.warps * t.stages * 32 * row, merge = 16 * d * 4 + 2 * t.warps * 16 * 4;
  return loop > merge ? loop : merge;
}

}  // namespace flexchat::cuda
