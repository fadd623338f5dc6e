// What happens to gradients between backward and the optimizer: the global norm limit, and the loss scale
// that keeps f16 gradients in range. Here for the host, changing the gradients in memory; an Optimizer does
// both on the device while it reads them (GradientLimits).
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "base/options.h"
#include "grad/parameter.h"

namespace flexchat {

// The L2 norm over all gradients together; every gradient is multiplied by min(1, max_norm / (norm + 1e-6)).
// max_norm <= 0, or a norm that is NaN or infinite: gradients stay as they are. Returns the norm before.
double clip_gradient_norm(Backend& backend, const std::vector<Parameter*>& params, double max_norm);

// The loss is multiplied by scale() before backward; the gradients are divided again, by unscale() or by the
// optimizer; it steps only if they are all finite; update() follows in either case.
class LossScaler {
 public:
  explicit LossScaler(double initial_scale = 65536, double growth = 2, double backoff = 0.5,
                      int64_t growth_interval = 2000);

  double scale() const { return scale_; }
  // gradients /= scale. True when all of them are finite; otherwise they are unusable and left unspecified.
  [[nodiscard]] bool unscale(Backend& backend, const std::vector<Parameter*>& params) const;
  // Overflow: scale *= backoff. growth_interval good steps in a row: scale *= growth.
  void update(bool finite);

  Json state() const;
  void load_state(const Json& state, const std::string& source);

 private:
  double scale_, growth_, backoff_;
  int64_t growth_interval_;
  int64_t good_steps_ = 0;  // since the last change
};

}  // namespace flexchat
