#include "optim/gradients.h"

#include <cmath>
#include <nlohmann/json.hpp>
#include <utility>

#include "backend/update_rates.h"
#include "base/error.h"
#include "checkpoint/state_json.h"

namespace flexchat {

namespace {

GradientRates measure(Backend& backend, const std::vector<Parameter*>& params, const GradientRates& limits) {
  std::vector<UpdateSlot> slots(params.size());
  for (size_t i = 0; i < params.size(); ++i) slots[i].grad = params[i]->grad;
  const Tensor host(host_arena(), {1, kRatesPerRow}, DType::f64);
  *host.as<GradientRates>() = limits;
  const Tensor rates = backend.clone(host);
  backend.grad_norm(*backend.plan_update(std::move(slots)), rates);
  backend.copy(rates, host);
  return *host.as<GradientRates>();
}

void multiply(Backend& backend, const std::vector<Parameter*>& params, double factor) {
  if (factor == 1) return;
  for (const Parameter* param : params) backend.axpby(factor, param->grad, 0, param->grad);
}

}  // namespace

double clip_gradient_norm(Backend& backend, const std::vector<Parameter*>& params, double max_norm) {
  const GradientRates found = measure(backend, params, {.max_norm = max_norm});
  if (found.skip == 0) multiply(backend, params, found.factor);
  return found.norm;
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
  const GradientRates found = measure(backend, params, {.unscale = 1 / scale_});
  if (found.skip == 0) multiply(backend, params, found.factor);
  return found.skip == 0;
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
