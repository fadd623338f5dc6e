#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "base/error.h"

namespace flexchat {

Sampler::Sampler(const SamplingOptions& options) : options_(options), rng_(options.seed, /*stream=*/1) {
  check(options.temperature >= 0 && std::isfinite(options.temperature), "temperature {} must be 0 or more",
        options.temperature);
  check(options.top_k >= 0, "top-k {} must be 0 (off) or more", options.top_k);
}

int32_t Sampler::sample(std::span<const float> logits) {
  const auto largest = std::max_element(logits.begin(), logits.end());
  if (options_.temperature == 0) return static_cast<int32_t>(largest - logits.begin());
  float threshold = -std::numeric_limits<float>::infinity();
  if (options_.top_k > 0 && options_.top_k < static_cast<int64_t>(logits.size())) {
    scratch_.assign(logits.begin(), logits.end());
    const auto kth = scratch_.begin() + (options_.top_k - 1);
    std::nth_element(scratch_.begin(), kth, scratch_.end(), std::greater<>());
    threshold = *kth;
  }
  weights_.resize(logits.size());
  double total = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    const double distance = static_cast<double>(logits[i]) - static_cast<double>(*largest);
    total += logits[i] >= threshold ? std::exp(distance / options_.temperature) : 0.0;
    weights_[i] = total;  // running sum
  }
  const double draw = rng_.uniform() * total;
  const auto it = std::upper_bound(weights_.begin(), weights_.end(), draw);
  return static_cast<int32_t>(std::min<std::ptrdiff_t>(it - weights_.begin(), std::ssize(logits) - 1));
}

}  // namespace flexchat
