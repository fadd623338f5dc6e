#include "optim/adamw.h"

#include <cmath>

#include "base/error.h"

namespace flexchat {

void check_gradient(const Parameter& param) {
  check(param.value.defined() && param.grad.defined(), "parameter '{}' has no {}", param.name,
        param.value.defined() ? "gradient" : "value");
  check(param.grad.shape() == param.value.shape() && param.grad.dtype() == param.value.dtype(),
        "parameter '{}' is {} {} but its gradient is {} {}", param.name, dtype_name(param.value.dtype()),
        shape_string(param.value.shape()), dtype_name(param.grad.dtype()), shape_string(param.grad.shape()));
}

AdamWRates adamw_rates(const AdamWStep& s) {
  const double bias1 = 1 - std::pow(s.beta1, static_cast<double>(s.step));
  const double bias2 = 1 - std::pow(s.beta2, static_cast<double>(s.step));
  AdamWRates rates;
  rates.decay = 1 - s.lr * s.weight_decay;
  rates.rate = s.lr / bias1;
  rates.mean_weight = 1 - s.beta1;
  rates.square_weight = 1 - s.beta2;
  rates.unbias = 1 / std::sqrt(bias2);
  rates.eps = s.eps;
  return rates;
}

UpdateSlot adamw_slot(const Parameter& param, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                      int64_t rates_row) {
  check_gradient(param);
  check(exp_avg.shape() == param.value.shape() && exp_avg_sq.shape() == param.value.shape(),
        "the AdamW moments of '{}' are {} and {}, not {}", param.name, shape_string(exp_avg.shape()),
        shape_string(exp_avg_sq.shape()), shape_string(param.value.shape()));
  return {param.grad, param.value, exp_avg, exp_avg_sq, param.compute, rates_row};
}

}  // namespace flexchat
