#include "optim/gradients.h"

#include <cmath>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "checkpoint/state_json.h"

namespace flexchat {

double clip_gradient_norm(Backend& backend, const std::vector<Parameter*>& params, double max_norm) {
  double squares = 0;
  for (const Parameter* param : params) squares += backend.sum_squares(param->grad);
  const double norm = std::sqrt(squares);
  const double factor = max_norm / (norm + 1e-6);
  if (max_norm <= 0 || !std::isfinite(norm) || factor >= 1) return norm;
  for (const Parameter* param : params) backend.axpby(factor, param->grad, 0, param->grad);
  return norm;
}

LossScaler::LossScaler(double initial_scale, double growth, double backoff, int64_t growth_interval)
    : scale_(initial_scale), growth_(growth), backoff_(backoff), growth_interval_(growth_interval) {
  check(std::isfinite(initial_scale) && initial_scale > 0, "the loss scale is {}; it must be above 0",
        initial_scale);
  check(growth > 1 && backoff > 0 && backoff < 1 && growth_interval >= 1,
        "the loss scale cannot grow by {} and back off by {} every {} steps; allowed: above 1, between 0 and "
        "1, at "
        "least 1",
        growth, backoff, growth_interval);
}

bool LossScaler::unscale(Backend& backend, const std::vector<Parameter*>& params) const {
  for (const Parameter* param : params) {
    if (backend.first_nonfinite(param->grad) >= 0) return false;
    backend.axpby(1 / scale_, param->grad, 0, param->grad);
  }
  return true;
}

void LossScaler::update(bool finite) {
  if (!finite) {
    scale_ *= backoff_;
    good_steps_ = 0;
    return;
  }
  if (++good_steps_ < growth_interval_) return;
  good_steps_ = 0;
  // The scale multiplies f32 losses, so it must stay an f32.
  if (std::isfinite(static_cast<float>(scale_ * growth_))) scale_ *= growth_;
}

Json LossScaler::state() const { return Json{{"scale", scale_}, {"good_steps", good_steps_}}; }

void LossScaler::load_state(const Json& state, const std::string& source) {
  const StateReader reader(state, source);
  const double scale = reader.number("scale");
  const int64_t good_steps = reader.integer("good_steps");
  check(scale > 0, "{}: the loss scale is {}; it must be above 0", source, scale);
  check(good_steps >= 0 && good_steps < growth_interval_, "{}: good_steps is {}; allowed: 0 to {}", source,
        good_steps, growth_interval_ - 1);
  scale_ = scale;
  good_steps_ = good_steps;
}

}  // namespace flexchat
