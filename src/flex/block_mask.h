// Which blocks of (queries x keys) attention has to visit.
//
// A mask expression is turned into lists: for each block of queries, the key blocks where every element is
// allowed (full: the mask need not be evaluated) and those where some may be (partial: evaluate it per
// element). Blocks in neither list are empty and never touched.
//
//   kv ->                   Construction is a quadtree over blocks: a whole region is classified by interval
//   F F P . . .             analysis (flex/interval.h), and only mixed regions are split further. Work
//   follows F F F P . .             the border of the mask, not its area, and no S x S tensor exists
//   anywhere. . F F F P .
//
// Lengths, offsets and captured tensors are data, so the same expression serves padded batches, ragged
// batches, chunked prefill and decode. Queries past q_lens[b] and keys past kv_lens[b] belong to no block; a
// block at such an edge is classified over the positions that exist, and the kernel bounds the tail itself.
//
// Invariants: `full` never holds an element the mask forbids, an empty block never one it allows; each list
// is ascending; a block is in at most one list.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "flex/bindings.h"
#include "flex/expr.h"

namespace flexchat::flex {

// The rows of a batch. Empty vectors: every row has all n_q queries, all n_kv keys, offset 0.
struct Extent {
  int64_t n_batch = 1, n_head = 1;           // heads of queries
  int64_t n_q = 0, n_kv = 0;                 // longest row, in positions
  std::vector<int64_t> q_lens{}, kv_lens{};  // (n_batch); the n_q and n_kv that expressions read
  std::vector<int64_t> q_offsets{};          // (n_batch): logical position of a row's first query

  int64_t q_len(int64_t b) const { return q_lens.empty() ? n_q : q_lens[static_cast<size_t>(b)]; }
  int64_t kv_len(int64_t b) const { return kv_lens.empty() ? n_kv : kv_lens[static_cast<size_t>(b)]; }
  int64_t q_offset(int64_t b) const { return q_offsets.empty() ? 0 : q_offsets[static_cast<size_t>(b)]; }

  // Errors: negative sizes, vectors of another length than n_batch, lengths beyond n_q or n_kv.
  void check() const;
  bool uniform() const;  // do all rows have the same lengths and offset?
};

// Lists of block numbers, one list per row of blocks, in compressed form (CSR).
struct BlockLists {
  std::vector<int64_t> begin{0};  // (rows + 1): list r is blocks[begin[r] .. begin[r + 1])
  std::vector<int32_t> blocks;    // ascending within a list

  std::span<const int32_t> row(int64_t r) const {
    const auto at = static_cast<size_t>(r);
    return {blocks.data() + begin[at], static_cast<size_t>(begin[at + 1] - begin[at])};
  }
  int64_t count() const { return static_cast<int64_t>(blocks.size()); }
};

struct BlockMask {
  int64_t block_q = 0, block_kv = 0;        // positions in a block
  int64_t n_q_blocks = 0, n_kv_blocks = 0;  // ceil(n_q / block_q), ceil(n_kv / block_kv)
  int64_t n_batch = 1, n_head = 1;          // 1: the mask is the same for all rows, or heads
  BlockLists full, partial;                 // row (b*n_head + h)*n_q_blocks + query block: key blocks

  // The list's row for query block i of batch row b and head h of the attention.
  int64_t row(int64_t b, int64_t h, int64_t i) const {
    return ((n_batch == 1 ? 0 : b) * n_head + (n_head == 1 ? 0 : h)) * n_q_blocks + i;
  }
  std::span<const int32_t> full_blocks(int64_t b, int64_t h, int64_t i) const {
    return full.row(row(b, h, i));
  }
  std::span<const int32_t> partial_blocks(int64_t b, int64_t h, int64_t i) const {
    return partial.row(row(b, h, i));
  }

  int64_t n_blocks() const { return n_batch * n_head * n_q_blocks * n_kv_blocks; }
  // Full and partial blocks as a share of all blocks; 0 when there are none.
  double visited_share() const;

  // The same mask with the roles of queries and keys exchanged: for each key block, its query blocks. This is
  // what the backward pass walks for dK and dV.
  BlockMask transposed() const;
};

// Errors: an expression that is no mask (check_mask), a bad extent, block sizes below 1, captured tensors
// that are missing or too small.
BlockMask build_block_mask(const Expr& mask, const Bindings& bindings, const Extent& extent, int64_t block_q,
                           int64_t block_kv);

}  // namespace flexchat::flex
