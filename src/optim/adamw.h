// AdamW (Loshchilov & Hutter 2019) for one parameter. The update itself is a single fused kernel:
//   p *= 1 - lr*wd;  m = lerp(m, g, 1-beta1);  v = lerp(v, g^2, 1-beta2);
//   p -= lr/(1-beta1^t) * m / (sqrt(v/(1-beta2^t)) + eps)
#pragma once

#include "backend/backend.h"
#include "grad/parameter.h"

namespace flexchat {

// Updates param.value from param.grad. exp_avg and exp_avg_sq: the parameter's shape and dtype, zero before
// step 1. Errors name the parameter when its gradient or a state does not fit.
void adamw(Backend& backend, const AdamWStep& step, const Parameter& param, const Tensor& exp_avg,
           const Tensor& exp_avg_sq);

// Throws Error unless `param` has a gradient of its shape and dtype.
void check_gradient(const Parameter& param);

}  // namespace flexchat
