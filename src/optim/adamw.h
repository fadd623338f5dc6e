// AdamW (Loshchilov & Hutter 2019): its rates and slots. The update itself, Backend::adamw, is one launch for
// any number of parameters:
//   p *= 1 - lr*wd;  m = lerp(m, g, 1-beta1);  v = lerp(v, g^2, 1-beta2);
//   p -= lr/(1-beta1^t) * m / (sqrt(v/(1-beta2^t)) + eps)
#pragma once

#include "backend/backend.h"
#include "backend/update_rates.h"
#include "grad/parameter.h"

namespace flexchat {

struct AdamWStep {
  double lr, beta1, beta2, eps, weight_decay;
  int64_t step;  // from 1
};
AdamWRates adamw_rates(const AdamWStep& step);

// The slot of one parameter. exp_avg and exp_avg_sq: the parameter's shape and dtype, zero before step 1.
// Errors name the parameter when its gradient or a state does not fit.
UpdateSlot adamw_slot(const Parameter& param, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                      int64_t rates_row);

// Throws Error unless `param` has a gradient of its shape and dtype.
void check_gradient(const Parameter& param);

}  // namespace flexchat
