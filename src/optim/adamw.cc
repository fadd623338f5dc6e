#include "optim/adamw.h"

#include "base/error.h"

namespace flexchat {

void check_gradient(const Parameter& param) {
  check(param.value.defined() && param.grad.defined(), "parameter '{}' has no {}", param.name,
        param.value.defined() ? "gradient" : "value");
  check(param.grad.shape() == param.value.shape() && param.grad.dtype() == param.value.dtype(),
        "parameter '{}' is {} {} but its gradient is {} {}", param.name, dtype_name(param.value.dtype()),
        shape_string(param.value.shape()), dtype_name(param.grad.dtype()), shape_string(param.grad.shape()));
}

void adamw(Backend& backend, const AdamWStep& step, const Parameter& param, const Tensor& exp_avg,
           const Tensor& exp_avg_sq) {
  check_gradient(param);
  check(exp_avg.shape() == param.value.shape() && exp_avg_sq.shape() == param.value.shape(),
        "the AdamW moments of '{}' are {} and {}, not {}", param.name, shape_string(exp_avg.shape()),
        shape_string(exp_avg_sq.shape()), shape_string(param.value.shape()));
  backend.adamw(step, param.grad, param.value, exp_avg, exp_avg_sq);
}

}  // namespace flexchat
