// The runtime data of one attention launch: one plain struct that the host fills and every attention kernel
// takes by value. Shapes, lengths, strides, masks, pages and captured tensors are all here, so that nothing
// but dtype, head dim and the form of the mod is compiled in. Read by g++, nvcc and NVRTC: it includes
// nothing.
#pragma once

namespace flexchat::cuda {

constexpr int kMaxCaptures = 8, kMaxCaptureAxes = 4, kMaxConstants = 16;

// (B, T, heads, D) with D contiguous; strides in elements. With pages `batch` is the stride of a page.
struct AttentionView {
  void* data;
  long long batch, token, head;
};

// A captured tensor: f32 when it holds numbers, i32 when integers; strides in elements, one for each axis.
struct AttentionCapture {
  const void* data;
  long long stride[kMaxCaptureAxes];
};

// Lists of tiles to visit, one list for each (batch row, head, tile row). Of list r, begin[4 * r ..] is where
// it begins in `entry`, how many entries it has, and the first two of them, so that a block knows what to
// copy after one question to memory. Entries ascend: 2 * tile + 1 when the mask must be evaluated per
// element, else 2 * tile. begin null: no lists, the built-in causal mask and window alone decide.
struct AttentionBlocks {
  const int* begin;
  const int* entry;
  const int* rank;            // transposed lists only: how many tiles of the query tile's list come before
  int batch_rows, head_rows;  // 1: the same lists for every batch row, or head
};

struct AttentionParams {
  AttentionView q, k, v, out;    // q, out (B, Tq, H, D); k, v (B, Tkv, G, D) or (pages, page_size, G, D)
  float* lse;                    // (B, H, Tq), natural log; may be null in the forward
  int batch, n_head, n_kv_head;  // query head h reads key head h / (n_head / n_kv_head)
  int q_len, kv_len;             // of the longest row
  const int *q_lens, *kv_lens;   // (B) or null
  const int* q_offsets;          // (B) or null: logical position of a row's first query
  float scale;
  int causal, window;          // window < 0: none
  AttentionBlocks blocks;      // of query tiles: key tiles to visit
  AttentionBlocks transposed;  // of key tiles: query tiles to visit (backward)
  AttentionCapture captures[kMaxCaptures];
  float numbers[kMaxConstants];  // constants of the mod
  int integers[kMaxConstants];
  unsigned dropout_threshold;  // a weight whose bits are below it is dropped; 0: no dropout
  float dropout_scale;         // 1 / (1 - dropout)
  unsigned long long dropout_seed;
  const int* block_table;  // (B, table_stride) page numbers, or null
  int page_size, table_stride;
  // backward
  AttentionView dout, dq, dk, dv;
  const float* dlse;  // (B, H, Tq) or null
  float* stats;       // (B, H, query tiles, 2, block_q) scratch: lse in base 2, then
                      // sum_d out * dout - dlse; rows that see nothing have lse +inf
  float* dq_sum;      // (B, H, query tiles, dq_floats) f32 scratch
  int* dq_turn;       // (B, H, query tiles) scratch: how many key tiles are in dq_sum
  int* ticket;        // (1) scratch: the next piece of work
  // Of access i of a differentiable captured tensor: scratch sums (B, H, Tkv) of kind k or (B, H, Tq) of kind
  // q, and the fixed-point gradient, two 64-bit words for each element of the tensor, zeroed by the host.
  float* capture_part[kMaxCaptures];
  unsigned long long* capture_sum[kMaxCaptures];
  // decode
  int n_split, split_len;  // keys of a row are cut into n_split pieces of split_len keys
  float* split_out;        // (B, H, Tq, n_split, D) f32 scratch
  float* split_lse;        // (B, H, Tq, n_split) scratch
};

}  // namespace flexchat::cuda
