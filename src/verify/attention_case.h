// One attention with random inputs, run on any backend, so that its results can be held against the reference
// backend's in double.
//
// What must not be read is NaN (queries and keys past a row's lengths, unused pages), and so is every output
// before it is written. Inputs are rounded to the dtype of the case first: the reference gets the very
// numbers that the kernel under test gets.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "backend/reference/reference_backend.h"
#include "verify/check.h"

namespace flexchat {

struct AttentionCase {
  std::string name;
  AttentionShape shape;
  AttentionSpec spec;         // values of captured tensors in host memory
  bool fused = false;         // q, k and v as columns of one buffer; otherwise three
  bool lse_gradient = false;  // something reads the LSE too
  bool backward = true;       // never with pages
  uint64_t seed = 1;          // of q, k, v, the output's gradient, and the order of pages
};

// In host memory: out, dq (B, Tq, H*D), dk, dv (B, Tkv, G*D) in the dtype of the case, the others master. NaN
// where the kernel did not write.
struct AttentionResults {
  Tensor q, k, v, dout;  // what the kernel was given, as one tensor each
  Tensor out, lse;       // lse (B, H, Tq)
  Tensor dq, dk, dv;
  std::vector<std::pair<std::string, Tensor>> captures;  // gradients of differentiable captured tensors
  std::string kernel;                                    // that ran
};

AttentionResults run_attention(const AttentionCase& c, Backend& backend, DType dtype,
                               const std::string& kernel = "auto");
// The same case on the reference backend, and how well conditioned it is. What kernels are given in `dtype`
// is rounded to it: inputs, and for the backward the output.
struct AttentionReference {
  AttentionResults results;
  ScoreSizes sizes;
  Tensor dq, dk, dv;  // sizes of the terms of gradients (ReferenceBackend::attention_term_sizes)
  std::vector<std::pair<std::string, Tensor>> captures;
};
AttentionReference reference_attention(const AttentionCase& c, DType dtype);

// Largest error allowed in `dtype`: of outputs absolutely (they have unit scale), of gradients relatively.
// check_attention allows more in two cases, where the problem itself does not define more digits:
//   large scores: a score is a number of f32 and the exponent of a weight. Roundings on the way to it and to
//     the LSE move LSE and gradients by u = 2^-24 of the sizes of what is rounded, relatively; outputs, where
//     roundings inside the mod average out over keys, are held to 2 u |s|, which matters from |s| = 4 on;
//   gradients that cancel: gradients are held to their size or to kCancelled of that of their terms.
struct AttentionLimits {
  double out, lse, gradient;
};
AttentionLimits attention_limits(DType dtype);
constexpr double kCancelled = 1.0 / 32;

// Runs the case and compares every tensor: checks named "<case name> out", " lse", " dq", ...
std::vector<Check> check_attention(const AttentionCase& c, Backend& backend, DType dtype,
                                   const std::string& kernel = "auto");

// The differentiable captured tensors of a spec.
std::vector<flex::Capture> differentiable_captures(const AttentionSpec& spec);

}  // namespace flexchat
