// What each attention kernel can do, in one table: plans refuse by it, and `flexchat info` prints it.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "flex/attention.h"

namespace flexchat {

struct AttentionSupport {
  std::string_view device, kernel;       // "cuda", "cuda_mma"
  std::string_view dtypes;               // of q, k, v and out: "f32, bf16, f16"
  std::span<const int64_t> head_dims{};  // empty: any
  bool grouped_heads = false;            // fewer key heads than query heads
  bool mask = false, score_mod = false;  // any expression
  // Lengths and offsets of their own for each row. Without: rows that all end with their last key, as in
  // decoding, or that all begin at position 0.
  bool ragged = false;
  bool dropout = false;
  bool pages = false;              // keys and values through a block table; never with backward
  bool backward = false;           // dq, dk, dv
  bool capture_gradients = false;  // of differentiable captured tensors
  bool lse_gradient = false;       // takes the gradient of the LSE
  bool splits_keys = false;        // few queries a row: keys are spread over processors
  bool deterministic = false;      // the same bits in every run, backward too

  std::string head_dims_text() const;  // "32, 64, 80" or "any"
  bool takes(DType dtype) const;
};

// Every kernel, of every device, usable here or not.
std::span<const AttentionSupport> attention_support();

// The row of a kernel. Error: there is none.
const AttentionSupport& attention_support(std::string_view kernel);

// Does the first query of every row stand at position 0, or the last one at the last key?
bool rows_begin_at_zero(const AttentionShape& shape);
bool rows_end_together(const AttentionShape& shape);

// Why the kernel cannot do this shape or spec: names kernel, feature and what is allowed. "": it can.
std::string attention_refusal(std::string_view kernel, const AttentionShape& shape,
                              const AttentionSpec& spec);
// Error: the refusal, if there is one.
void check_attention_support(std::string_view kernel, const AttentionShape& shape, const AttentionSpec& spec);

}  // namespace flexchat
