#include "optim/muon.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "base/error.h"
#include "optim/adamw.h"

namespace flexchat {
namespace {

constexpr Quintic kNewtonSchulzStep = {3.4445, -4.7750, 2.0315};
constexpr std::array<Quintic, 5> kNewtonSchulz = {kNewtonSchulzStep, kNewtonSchulzStep, kNewtonSchulzStep,
                                                  kNewtonSchulzStep, kNewtonSchulzStep};
constexpr std::array<Quintic, 5> kPolarExpress = {{
    {8.156554524902461, -22.48329292557795, 15.878769915207462},
    {4.042929935166739, -2.808917465908714, 0.5000178451051316},
    {3.8916678022926607, -2.772484153217685, 0.5060648178503393},
    {3.285753657755655, -2.3681294933425376, 0.46449024233003106},
    {2.3465413258596377, -1.7097828382687081, 0.42323551169305323},
}};

// All steps; x is used up.
Tensor iterate(Backend& backend, const std::array<Quintic, 5>& steps, Tensor x) {
  const int64_t side = std::min(x.dim(1), x.dim(2));
  const Tensor gram = backend.empty({x.dim(0), side, side}, x.dtype());
  const Tensor polynomial = backend.empty({x.dim(0), side, side}, x.dtype());
  Tensor out = backend.empty(x.shape(), x.dtype());
  for (const Quintic& q : steps) {
    backend.muon_step(q, x, gram, polynomial, out);
    std::swap(x, out);
  }
  return x;
}

// Bytes of temporaries for one (m, n) matrix at most: two of its shape and three square ones of its shorter
// side.
int64_t temporary_bytes(const Shape& matrix, DType dtype) {
  const int64_t side = std::min(matrix[0], matrix[1]);
  return (2 * matrix[0] * matrix[1] + 3 * side * side) * dtype_size(dtype);
}

}  // namespace

Shape second_momentum_shape(const Shape& matrix) {
  return matrix[0] >= matrix[1] ? Shape{matrix[0], 1} : Shape{1, matrix[1]};
}

UpdateSlot muon_slot(Arch arch, const Parameter& param, const Tensor& momentum, const Tensor& second_momentum,
                     int64_t rates_row) {
  check_gradient(param);
  check(param.value.rank() == 2 && param.value.numel() > 0, "Muon updates matrices; parameter '{}' is {}",
        param.name, shape_string(param.value.shape()));
  check(momentum.shape() == param.value.shape(), "the momentum of '{}' is {}, not {}", param.name,
        shape_string(momentum.shape()), shape_string(param.value.shape()));
  check(arch == Arch::classic || second_momentum.shape() == second_momentum_shape(param.value.shape()),
        "the second momentum {} does not fit parameter '{}' {}", shape_string(second_momentum.shape()),
        param.name, shape_string(param.value.shape()));
  return {param.grad, param.value, momentum, second_momentum, param.compute, rates_row};
}

Tensor newton_schulz(Backend& backend, Tensor x, const Tensor& squares) {
  backend.muon_normalize(x, squares, 1, 1e-7);
  return iterate(backend, kNewtonSchulz, std::move(x));
}

Tensor polar_express(Backend& backend, Tensor x, const Tensor& squares) {
  backend.muon_normalize(x, squares, 1.01, 1e-6);
  return iterate(backend, kPolarExpress, std::move(x));
}

Muon::Muon(Backend& backend, Arch arch, DType dtype, std::vector<UpdateSlot> slots, int64_t stack_bytes)
    : backend_(backend), arch_(arch), dtype_(dtype) {
  check(!slots.empty(), "Muon needs at least one matrix");
  const Shape& shape = slots[0].value.shape();
  const auto room = static_cast<size_t>(std::max<int64_t>(stack_bytes / temporary_bytes(shape, dtype), 1));
  for (size_t begin = 0; begin < slots.size(); begin += room) {
    const size_t end = std::min(slots.size(), begin + room);
    std::vector<UpdateSlot> part(slots.begin() + static_cast<std::ptrdiff_t>(begin),
                                 slots.begin() + static_cast<std::ptrdiff_t>(end));
    for (const UpdateSlot& slot : part) {
      check(slot.value.shape() == shape, "one Muon stack cannot hold {} and {}", shape_string(shape),
            shape_string(slot.value.shape()));
    }
    parts_.push_back(backend.plan_update(std::move(part)));
  }
}

void Muon::update(const Tensor& rates) const {
  for (const auto& part : parts_) update_part(*part, rates);
}

void Muon::update_part(const UpdatePlan& plan, const Tensor& rates) const {
  const DType master = backend_.master_dtype();
  const auto n = static_cast<int64_t>(plan.slots().size());
  const int64_t rows = plan.slots()[0].value.dim(0), cols = plan.slots()[0].value.dim(1);
  Tensor x = backend_.empty({n, rows, cols}, dtype_);
  Tensor squares = backend_.empty({n, rows}, master);
  backend_.muon_momentum(plan, rates, x, squares);
  if (arch_ == Arch::classic) {
    backend_.muon_update(plan, rates, newton_schulz(backend_, std::move(x), squares), nullptr);
    return;
  }
  const Tensor equalized = backend_.empty({n, rows}, master);
  backend_.muon_equalize(x, squares, equalized);
  x = polar_express(backend_, std::move(x), equalized);
  const Tensor factors = backend_.empty({n, std::max(rows, cols)}, master);
  backend_.muon_variance(plan, rates, x, factors);
  backend_.muon_update(plan, rates, x, &factors);
}

}  // namespace flexchat
