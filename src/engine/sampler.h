// From logits to a token.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/rng.h"

namespace flexchat {

struct SamplingOptions {
  double temperature = 1.0;  // 0: the largest logit (the first of equals)
  int64_t top_k = 0;         // keep every logit >= the k-th largest, before temperature; 0: keep all
  uint64_t seed = 42;
};

class Sampler {
 public:
  explicit Sampler(const SamplingOptions& options);  // Error on a negative or non-finite option
  // `logits` (V) f32. One uniform draw a token; none at temperature 0.
  int32_t sample(std::span<const float> logits);

 private:
  SamplingOptions options_;
  Rng rng_;
  std::vector<float> scratch_;
  std::vector<double> weights_;
};

}  // namespace flexchat
