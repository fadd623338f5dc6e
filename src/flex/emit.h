// From expressions to CUDA source: the Mod section of an attention kernel, whose contract is
// backend/cuda/kernels/mod_contract.cuh.
//
// The section is straight-line code: every distinct node once in each function, numbers in f32, integers in
// int, meaning exactly what flex/expr.h says. What does not depend on the element is computed where it
// changes: per head, per query, per key. Two rewritings make that worth more, and neither changes a value
// beyond f32 rounding:
//   products   x*k1*y/k2 becomes (x*y)*(k1/k2) where k1 and k2 are known before the element is
//   positions  float(q - kv) becomes float(q) - float(kv), which is exact up to 2^24 (AttentionSpec::check
//              admits no position beyond) and needs no conversion per element
//
// Invariants: the same expressions give the same text, which does not mention names of captured tensors,
// their values or shapes, nor constants but a few (0, 1, 2, 1/2, divisors of integers); kernels are cached by
// it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "flex/expr.h"

namespace flexchat::flex {

// One access of a differentiable captured tensor: entry i of AttentionParams::capture_grad.
struct EmittedGradient {
  int capture;  // index into EmittedMod::captures
  char kind;    // 'k' its index depends on no q, 'q' on q but not kv, 'a' on both
};

struct EmittedMod {
  std::string text;
  std::vector<Capture> captures;  // entry i of AttentionParams::captures
  std::vector<float> numbers;     // entry i of AttentionParams::numbers
  std::vector<int32_t> integers;  // entry i of AttentionParams::integers
  std::vector<EmittedGradient> gradients;
  bool dear = false;  // MOD_IS_DEAR
};

// kMaxCaptures and kMaxConstants of backend/cuda/kernels/attention_params.cuh.
constexpr int max_emitted_captures = 8;
constexpr size_t max_emitted_constants = 16;  // of numbers, and of integers; more stay in the text

// Errors: as check_mask and check_score_mod; more captured tensors, or accesses of differentiable ones, than
// max_emitted_captures; a differentiable one whose index depends on score.
EmittedMod emit_mod(const std::optional<Expr>& mask, const std::optional<Expr>& score_mod);

// An equal expression whose products are arranged as described above, and whose small whole powers are
// products. emit_mod applies it to the score mod and to its derivatives.
Expr arrange_products(const Expr& expr);

}  // namespace flexchat::flex
