// Muon (Jordan et al. 2024) for one matrix: Nesterov momentum, then the nearest orthogonal matrix of the
// result by a few quintic iterations, then the step. Two forms:
//   classic  Newton-Schulz with one coefficient triple
//   modern   row equalisation (MuonEq), Polar Express coefficients, Muon+ scale, variance reduction over the
//            shorter axis, cautious weight decay
// The iterations run in `dtype`: bf16, rounded after every operation as a tensor library without fusion
// rounds, or the backend's master dtype. Everything else is in the master dtype.
#pragma once

#include "backend/backend.h"
#include "grad/parameter.h"

namespace flexchat {

struct MuonStep {
  double lr = 0;  // before the shape factor sqrt(max(1, rows/cols))
  double momentum = 0.95;
  double beta2 = 0.9;       // modern: decay of the second momentum
  double weight_decay = 0;  // modern: cautious decay, scaled by lr
  DType dtype = DType::bf16;
};

// Both update param.value from param.grad. momentum: the parameter's shape; second_momentum: see
// second_momentum_shape. States are zero before the first step.
void classic_muon(Backend& backend, const MuonStep& step, const Parameter& param, const Tensor& momentum);
void modern_muon(Backend& backend, const MuonStep& step, const Parameter& param, const Tensor& momentum,
                 const Tensor& second_momentum);

// (m, 1) for m >= n, else (1, n): running mean squares of the update over its shorter axis.
Shape second_momentum_shape(const Shape& matrix);

// The orthogonal factor of x (m, n), approximately; x is used up. The dtype of x is that of the iterations.
Tensor newton_schulz(Backend& backend, Tensor x);
Tensor polar_express(Backend& backend, Tensor x);

}  // namespace flexchat
