// What one call of attention computes, as values: its sizes and lengths, its mask and score mod, dropout.
// Kernels (backend/backend.h) turn it into a plan once a batch, which all layers share.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "flex/bindings.h"
#include "flex/block_mask.h"
#include "flex/expr.h"

namespace flexchat {

// Sizes, all runtime data. Rows of a batch may be shorter than q_len and kv_len: queries past q_lens[b] give
// zero output, zero gradient and an LSE of -inf, whatever their memory holds; keys past kv_lens[b] are never
// read. The first query of row b stands at logical position q_offsets[b], key j at position j.
struct AttentionShape {
  int64_t batch = 0, q_len = 0, kv_len = 0;  // the longest row
  int64_t n_head = 0, n_kv_head = 0;         // query head h reads key head h / (n_head / n_kv_head)
  int64_t head_dim = 0;
  std::vector<int64_t> q_lens{}, kv_lens{}, q_offsets{};  // (batch) each; empty: q_len, kv_len, 0 for all

  // The same sizes as expressions and block masks see them.
  flex::Extent extent() const { return {batch, n_head, q_len, kv_len, q_lens, kv_lens, q_offsets}; }
  // Errors: sizes below 0, heads that do not divide, lengths out of range.
  void check() const;
};

// softmax over keys j visible to query i of score_mod(scale * q_i . k_j), times v. Visible: allowed by the
// built-in causal mask and by the expression.
struct AttentionSpec {
  double scale = 1.0;
  // The mask that every kernel has built in: with `causal`, key j is visible to position i iff 0 <= i - j,
  // and i - j <= window when window >= 0.
  bool causal = false;
  int64_t window = -1;  // only with causal
  std::optional<flex::Expr> mask{}, score_mod{};
  // Values of captured tensors. Those that the mask reads and all integer ones must be in host memory;
  // numbers of a score mod may be in the device's.
  flex::Bindings bindings{};
  // Each weight is dropped with this probability, the others divided by 1 - dropout. Weight (b, h, q, kv), in
  // indices of tokens, is dropped iff attention_dropout_bits(...) < dropout * 2^32.
  double dropout = 0;
  uint64_t dropout_seed = 0;
  // Keys and values live in pages of so many tokens, found through a block table; 0: they are contiguous.
  int64_t page_size = 0;

  // Does it need nothing beyond the built-in mask?
  bool plain() const { return !mask && !score_mod; }
  // Errors: a mask or score mod of the wrong type, a window without causal, dropout outside [0, 1), a
  // captured tensor that is missing or whose index may leave it somewhere in the shape.
  void check(const AttentionShape& shape) const;
};

// 32 random bits for one weight: word kv % 4 of Philox with counter (kv / 4, q, h, b) under the seed. The
// same on every device. (base/rng.h)
uint32_t attention_dropout_bits(uint64_t seed, int64_t b, int64_t h, int64_t q, int64_t kv);

}  // namespace flexchat
