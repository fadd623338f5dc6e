// What shapes a GPT: its configuration, and the pure functions of it that need no weights (parameter counts,
// FLOPs, KV bytes). Two architectures: `classic` and `modern`; a saved configuration is modern exactly when
// it holds `window_pattern`. Letters: L n_layer, C n_embd, H n_head, G n_kv_head, D head dim, V vocab_size,
// Vp padded vocabulary.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

#include "base/dtype.h"
#include "base/options.h"

namespace flexchat {

enum class Arch { classic, modern };
std::string_view arch_name(Arch arch);
Arch parse_arch(std::string_view name);  // throws Error naming the allowed words

// modern: leading channels that the gates read.
inline constexpr int64_t kSmearChannels = 24;      // smear_gate (1, 24)
inline constexpr int64_t kValueGateChannels = 12;  // ve_gate (G, 12)

struct GptConfig {
  Arch arch = Arch::classic;
  int64_t sequence_len = 1024;
  int64_t vocab_size = 50304;
  int64_t n_layer = 12;
  int64_t n_head = 6;
  int64_t n_kv_head = 6;
  int64_t n_embd = 768;
  std::string window_pattern = "SSSL";  // modern: letters S and L, tiled over the layers; classic ignores it

  int64_t head_dim() const { return n_embd / n_head; }
  // Rows of wte, lm_head and the value embeddings: vocab_size rounded up to a multiple of 64.
  int64_t padded_vocab() const { return (vocab_size + 63) / 64 * 64; }
  // modern: every other layer, the last one always; classic: none.
  bool has_value_embedding(int64_t layer) const;
  // Key j is visible to query i iff 0 <= i - j <= window. -1: unlimited (classic).
  int64_t window(int64_t layer) const;

  // Throws Error with one line on anything a model cannot be built from.
  void validate() const;

  // {sequence_len, vocab_size, n_layer, n_head, n_kv_head, n_embd[, window_pattern]}: the keys of
  // model_config in a checkpoint's meta JSON; window_pattern is written for modern alone.
  Json to_json() const;
  // The inverse, validated. Missing, unknown and mistyped keys are errors that name `source`.
  static GptConfig from_json(const Json& object, const std::string& source);

  bool operator==(const GptConfig&) const = default;
};

// Numbers of parameters by kind, padded rows included.
struct ParamCounts {
  int64_t wte = 0;
  int64_t value_embeds = 0;
  int64_t lm_head = 0;
  int64_t transformer_matrices = 0;  // every matrix of the blocks, ve_gate included
  int64_t scalars = 0;               // resid, x0, smear and backout lambdas, smear_gate
  int64_t total() const { return wte + value_embeds + lm_head + transformer_matrices + scalars; }
};
ParamCounts count_params(const GptConfig& config);

// FLOPs of training (forward and backward) per token at the full sequence length.
double flops_per_token(const GptConfig& config);
// FLOPs of decoding one token that sees `context` tokens, and of a prefill of `tokens` from nothing.
double decode_flops_per_token(const GptConfig& config, int64_t context);
double prefill_flops(const GptConfig& config, int64_t tokens);
// Bytes of keys and values stored per token, and read by one decode step at `context` tokens.
int64_t kv_bytes_per_token(const GptConfig& config, DType dtype);
int64_t kv_bytes_read(const GptConfig& config, int64_t context, DType dtype);

}  // namespace flexchat
