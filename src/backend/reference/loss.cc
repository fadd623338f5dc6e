#include <algorithm>
#include <cmath>

#include "backend/reference/reference_backend.h"

namespace flexchat {

void ReferenceBackend::softcap(const Tensor& z, double cap) {
  if (cap <= 0) return;
  for (int64_t i = 0; i < z.numel(); ++i) z.as<double>()[i] = cap * std::tanh(z.as<double>()[i] / cap);
}

void ReferenceBackend::argmax(const Tensor& x, const Tensor& out) {
  const int64_t v = x.dim(1);
  for (int64_t n = 0; n < x.dim(0); ++n) {
    int64_t best = -1;
    for (int64_t j = 0; j < v; ++j) {
      const double value = x.as<double>()[n * v + j];
      if (!std::isnan(value) && (best < 0 || value > x.as<double>()[n * v + best])) best = j;
    }
    out.as<int32_t>()[n] = static_cast<int32_t>(best);
  }
}

void ReferenceBackend::cross_entropy(const Tensor& logits, const Tensor& targets, double cap, double weight,
                                     const Tensor& nll, const Tensor* grad) {
  const int64_t v = logits.dim(1);
  softcap(logits, cap);
  for (int64_t n = 0; n < logits.dim(0); ++n) {
    const double* z = logits.as<double>() + n * v;
    const int64_t target = targets.as<int32_t>()[n];
    const double largest = *std::max_element(z, z + v);
    double sum = 0;
    for (int64_t j = 0; j < v; ++j) sum += std::exp(z[j] - largest);
    const double lse = largest + std::log(sum);
    nll.as<double>()[n] = target < 0 ? 0 : lse - z[target];
    if (!grad) continue;
    for (int64_t j = 0; j < v; ++j) {
      const double slope = cap > 0 ? 1 - (z[j] / cap) * (z[j] / cap) : 1;  // d softcap / d logit
      const double p = std::exp(z[j] - lse) - (j == target ? 1 : 0);
      grad->as<double>()[n * v + j] = target < 0 ? 0 : weight * p * slope;
    }
  }
}

}  // namespace flexchat
