// What an optimizer step knows besides its tensors: rates, factors and what the gradients' norm says. They
// lie in the backend's memory, so that the kernels of a step, and a captured graph of them, never wait for
// the host. Host and kernels share this layout; kernels of f32 masters round each number to f32 where they
// use it.
//
// A rates tensor is f64 (1 + groups, kRatesPerRow): row 0 is a GradientRates, row 1 + g an AdamWRates or a
// MuonRates.
#pragma once

#include <cmath>
#include <cstdint>

#include "base/host_device.h"

namespace flexchat {

inline constexpr int64_t kRatesPerRow = 8;

struct GradientRates {
  double unscale = 1;   // set by the host: 1 / loss scale
  double max_norm = 0;  // set by the host: limit of the norm; none when <= 0
  double norm = 0;      // the rest by Backend::grad_norm: L2 norm of all gradients together, unscaled
  double factor = 1;    // what updates multiply every gradient by: unscale * min(1, max_norm / (norm + 1e-6))
  double skip = 0;      // 1 when the norm is NaN or infinite: updates then leave everything as it was
  double unused[3] = {};
};

// p *= decay; m += mean_weight * (g - m); v += square_weight * (g^2 - v);
// p -= rate * m / (sqrt(v) * unbias + eps)
struct AdamWRates {
  double decay = 1;          // 1 - lr * weight decay
  double rate = 0;           // lr / (1 - beta1^t)
  double mean_weight = 0;    // 1 - beta1
  double square_weight = 0;  // 1 - beta2
  double unbias = 1;         // 1 / sqrt(1 - beta2^t)
  double eps = 0;
  double unused[2] = {};
};

struct MuonRates {
  double lr = 0;  // before the shape's factor sqrt(max(1, rows/cols))
  double momentum = 0.95;
  double beta2 = 0.9;       // modern: decay of the second momentum
  double weight_decay = 0;  // modern: cautious decay, scaled by lr
  double unused[4] = {};
};

static_assert(sizeof(GradientRates) == kRatesPerRow * sizeof(double));
static_assert(sizeof(AdamWRates) == kRatesPerRow * sizeof(double));
static_assert(sizeof(MuonRates) == kRatesPerRow * sizeof(double));

// Fills in what grad_norm knows once it has the sum of squares of the scaled gradients.
FLEXCHAT_HOST_DEVICE inline void finish_gradient_rates(double sum_squares, GradientRates& rates) {
  rates.norm = std::sqrt(sum_squares) * rates.unscale;
  rates.skip = std::isfinite(rates.norm) ? 0 : 1;
  const double limit = rates.max_norm > 0 ? rates.max_norm / (rates.norm + 1e-6) : 1;
  rates.factor = limit < 1 ? rates.unscale * limit : rates.unscale;
}

}  // namespace flexchat
