#include <algorithm>
#include <cmath>
#include <limits>

#include "backend/reference/reference_backend.h"

namespace flexchat {
namespace {

double capped(double logit, double cap) { return cap > 0 ? cap * std::tanh(logit / cap) : logit; }
// dz / dlogit where z = capped(logit)
double slope(double z, double cap) { return cap > 0 ? 1 - (z / cap) * (z / cap) : 1; }

}  // namespace

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
      const double p = std::exp(z[j] - lse) - (j == target ? 1 : 0);
      grad->as<double>()[n * v + j] = target < 0 ? 0 : weight * p * slope(z[j], cap);
    }
  }
}

void ReferenceBackend::softmax_panel(const Tensor& logits, const Tensor& targets, int64_t first, double cap,
                                     const SoftmaxRows& rows, const Tensor* unscaled) {
  const int64_t columns = logits.dim(1);
  for (int64_t n = 0; n < logits.dim(0); ++n) {
    const double* x = logits.as<double>() + n * columns;
    const int64_t target = targets.as<int32_t>()[n];
    if (first == 0) {
      rows.shift.as<double>()[n] = -std::numeric_limits<double>::infinity();
      rows.sum.as<double>()[n] = rows.target.as<double>()[n] = 0;
      if (rows.argmax.defined()) rows.argmax.as<int32_t>()[n] = -1;
    }
    double& shift = rows.shift.as<double>()[n];
    double& sum = rows.sum.as<double>()[n];
    for (int64_t j = 0; j < columns; ++j) {
      const double z = capped(x[j], cap), before = shift;
      shift = cap > 0 && cap <= kShiftCap ? cap : std::max(shift, z);
      // Nothing to rescale at first; and -inf - (-inf) is no number.
      const double old = sum == 0 ? 0 : sum * std::exp(before - shift);
      sum = old + std::exp(z - (std::isinf(shift) ? 0 : shift));
      if (first + j == target) rows.target.as<double>()[n] = z;
      if (unscaled) {
        unscaled->set(n * unscaled->dim(1) + first + j, target < 0 ? 0 : std::exp(z - cap) * slope(z, cap));
      }
      if (!rows.argmax.defined() || std::isnan(z)) continue;
      int32_t& argmax = rows.argmax.as<int32_t>()[n];
      double& best = rows.best.as<double>()[n];
      if (argmax >= 0 && z <= best) continue;
      best = z;
      argmax = static_cast<int32_t>(first + j);
    }
  }
}

void ReferenceBackend::softmax_nll(const SoftmaxRows& rows, const Tensor& targets, const Tensor& lse,
                                   const Tensor& nll) {
  for (int64_t n = 0; n < lse.numel(); ++n) {
    const double l = rows.shift.as<double>()[n] + std::log(rows.sum.as<double>()[n]);
    lse.as<double>()[n] = l;
    nll.as<double>()[n] = targets.as<int32_t>()[n] < 0 ? 0 : l - rows.target.as<double>()[n];
  }
}

void ReferenceBackend::softmax_factor(const SoftmaxRows& rows, const Tensor& lse, const Tensor& targets,
                                      double cap, double weight, const Tensor& unscaled,
                                      const Tensor& factor) {
  for (int64_t n = 0; n < lse.numel(); ++n) {
    const int64_t target = targets.as<int32_t>()[n];
    const double l = lse.as<double>()[n], z = rows.target.as<double>()[n];
    factor.as<double>()[n] = target < 0 ? 0 : weight * std::exp(cap - l);
    if (target < 0) continue;
    unscaled.set(n * unscaled.dim(1) + target, (std::exp(z - cap) - std::exp(l - cap)) * slope(z, cap));
  }
}

bool ReferenceBackend::softmax_gradient(const Tensor& logits, const Tensor& targets, int64_t first,
                                        double cap, double weight, const Tensor& lse, double filter,
                                        const Tensor& grad) {
  const int64_t columns = logits.dim(1);
  const auto gradient = [&](int64_t n, int64_t j) {
    const double z = capped(logits.as<double>()[n * columns + j], cap);
    const double p = std::exp(z - lse.as<double>()[n]) - (first + j == targets.as<int32_t>()[n] ? 1 : 0);
    return p * slope(z, cap);
  };
  const auto ignored = [&](int64_t i) { return targets.as<int32_t>()[i / columns] < 0; };
  bool reached = filter <= 0;
  for (int64_t i = 0; i < logits.numel() && !reached; ++i) {
    reached = !ignored(i) && !(std::abs(gradient(i / columns, i % columns)) < filter);
  }
  if (!reached) return false;
  for (int64_t i = 0; i < logits.numel(); ++i) {
    grad.set(i, ignored(i) ? 0 : weight * gradient(i / columns, i % columns));
  }
  return true;
}

void ReferenceBackend::row_scale(const Tensor& x, const Tensor& factor, const Tensor& out) {
  for (int64_t i = 0; i < x.numel(); ++i) out.set(i, factor.get(i / x.dim(1)) * x.get(i));
}

}  // namespace flexchat
