// Small models with everything in them, and weights far from their initial zeros.
#pragma once

#include <cmath>
#include <string>

#include "models/gpt.h"
#include "testing/tensors.h"

namespace flexchat {

// A vocabulary that needs padding, grouped heads and, in the modern one, a window of 128 in the first layer,
// value embeddings in the first and last, and a backout that is not the last block.
inline GptConfig tiny_config(Arch arch) {
  GptConfig c;
  c.arch = arch;
  c.sequence_len = 256;
  c.vocab_size = 37;
  c.n_layer = 3;
  c.n_head = 4;
  c.n_kv_head = 2;
  c.n_embd = 24;
  c.window_pattern = "SL";
  return c;
}

// The same values, exact in f32, for every backend.
inline void randomize(Gpt& model, uint64_t seed) {
  uint64_t stream = 0;
  model.load([&](const std::string& name, const Shape& shape) {
    Rng rng(seed, ++stream);
    double mean = 0, deviation = 0.5;
    if (name == "resid_lambdas") mean = 1, deviation = 0.1;
    if (name == "x0_lambdas") mean = 0.3, deviation = 0.1;
    if (name == "smear_lambda") mean = 0.8, deviation = 0;
    if (name == "backout_lambda") mean = 0.4, deviation = 0;
    if (name == "transformer.wte.weight") deviation = 1;
    if (name.find(".attn.c_") != std::string::npos || name.find(".mlp.c_") != std::string::npos) {
      deviation = 1 / std::sqrt(static_cast<double>(shape[1]));
    }
    const Tensor value(host_arena(), shape, DType::f32);
    for (int64_t i = 0; i < value.numel(); ++i) value.set(i, mean + deviation * rng.normal());
    return value;
  });
}

struct Batch {
  Tensor ids, targets;  // (B, T) i32; every fifth target is ignored
};
inline Batch random_batch(const GptConfig& config, int64_t batch, int64_t t_len, uint64_t seed) {
  Rng rng(seed, 5);
  Batch b{random_ids(rng, {batch, t_len}, config.vocab_size),
          random_ids(rng, {batch, t_len}, config.vocab_size)};
  for (int64_t i = 4; i < b.targets.numel(); i += 5) b.targets.set(i, -1);
  return b;
}

inline double sum_of(const Tensor& x) {
  double sum = 0;
  for (int64_t i = 0; i < x.numel(); ++i) sum += x.get(i);
  return sum;
}

}  // namespace flexchat
