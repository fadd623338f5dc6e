// The certificate of programmable attention: named cases of everything attention promises, kernel by kernel,
// and of whole models. `flexchat verify attention` and the tests run them.
#pragma once

#include <string>
#include <vector>

#include "backend/attention_support.h"
#include "backend/backend.h"
#include "verify/attention_case.h"
#include "verify/check.h"

namespace flexchat {

// The matrix: causal, KV decode, KV chunk, MHA, GQA, MQA, padding, bidirectional, dropout, window, documents,
// pages, head dims, LSE gradient, score mods with gradients of captured tensors, rows that see nothing.
std::vector<AttentionCase> attention_suite();

// Can the kernel do the case?
bool does_case(const AttentionSupport& kernel, const AttentionCase& c);

// A random case: sizes, ratios, lengths, offsets, mask, score mod, dropout, pages. The same seed gives the
// same case. forms > 0: what GPU kernels are compiled for (expressions, head dim, dropout, pages) is one of
// so many forms, so that many cases need few kernels.
AttentionCase random_attention_case(uint64_t seed, uint64_t forms = 0);

// The mask and score mod a user gave, on several shapes.
std::vector<AttentionCase> attention_cases_of(const AttentionSpec& spec, const AttentionShape& shape);

// Pages in another order must give the same bits, and those of contiguous keys and values.
Check check_pages_bit_for_bit(Backend& backend, DType dtype, const std::string& kernel);
// `repeats` backwards of one case must give the same bits.
Check check_backward_repeats(Backend& backend, DType dtype, const std::string& kernel, int repeats);

// Small models, mqa|gqa|mha x full_forward|kv_decode_last|kv_chunk_decode: logits of the expression path
// against the built-in one on this backend, and of both against the reference backend.
std::vector<Check> check_models(Backend& backend, DType dtype);

}  // namespace flexchat
