// Muon (Jordan et al. 2024) for matrices of one shape: Nesterov momentum, then the nearest orthogonal matrix
// of the result by a few quintic iterations, then the step. Two forms:
//   classic  Newton-Schulz with one coefficient triple
//   modern   row equalisation (MuonEq), Polar Express coefficients, Muon+ scale, variance reduction over the
//            shorter axis, cautious weight decay
// Matrices are stacked, so that every operation is one launch for all of them. The iterations run in `dtype`:
// bf16, rounded after every operation as a tensor library without fusion rounds, or the backend's master
// dtype. Everything else is in the master dtype.
#pragma once

#include <memory>
#include <vector>

#include "backend/backend.h"
#include "backend/update_rates.h"
#include "grad/parameter.h"
#include "models/config.h"

namespace flexchat {

// The slot of one matrix. momentum: the parameter's shape; second_momentum: see second_momentum_shape, or
// undefined for the classic form. States are zero before the first step. Errors name the parameter.
UpdateSlot muon_slot(Arch arch, const Parameter& param, const Tensor& momentum, const Tensor& second_momentum,
                     int64_t rates_row);

// (m, 1) for m >= n, else (1, n): running mean squares of the update over its shorter axis.
Shape second_momentum_shape(const Shape& matrix);

class Muon {
 public:
  // Temporaries of about `stack_bytes` at most: longer stacks are worked through in parts, of one matrix at
  // least.
  Muon(Backend& backend, Arch arch, DType dtype, std::vector<UpdateSlot> slots, int64_t stack_bytes);
  // One update of every matrix, from the MuonRates of its slot. Kernels only.
  void update(const Tensor& rates) const;

 private:
  void update_part(const UpdatePlan& plan, const Tensor& rates) const;

  Backend& backend_;
  Arch arch_;
  DType dtype_;
  std::vector<std::shared_ptr<const UpdatePlan>> parts_;
};

// The orthogonal factors of the matrices x (n, rows, cols), approximately; x is used up. squares: as
// Backend::muon_momentum leaves them. The dtype of x is that of the iterations.
Tensor newton_schulz(Backend& backend, Tensor x, const Tensor& squares);
Tensor polar_express(Backend& backend, Tensor x, const Tensor& squares);

}  // namespace flexchat
