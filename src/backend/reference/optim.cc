// AdamW (Loshchilov & Hutter 2019) and the parts of Muon (Jordan et al. 2024) around its products.
#include <algorithm>
#include <cmath>

#include "backend/reference/reference_backend.h"
#include "backend/update_rates.h"

namespace flexchat {
namespace {

const GradientRates& gradient_rates(const Tensor& rates) { return *rates.as<GradientRates>(); }

// Matrix k of a stack.
Tensor matrix(const Tensor& stack, int64_t k) {
  return stack.rows(k, 1).reshape({stack.dim(1), stack.dim(2)});
}

void set_value(const UpdateSlot& slot, int64_t i, double value) {
  slot.value.set(i, value);
  if (slot.compute.defined()) slot.compute.set(i, value);
}

double row_squares(const Tensor& x, int64_t row) {
  double sum = 0;
  for (int64_t j = 0; j < x.dim(1); ++j) sum += x.get(row * x.dim(1) + j) * x.get(row * x.dim(1) + j);
  return sum;
}

double sum_of(const Tensor& x) {
  double sum = 0;
  for (int64_t i = 0; i < x.numel(); ++i) sum += x.get(i);
  return sum;
}

}  // namespace

void ReferenceBackend::zero_grads(const UpdatePlan& plan) {
  for (const UpdateSlot& slot : plan.slots()) fill(slot.grad, 0);
}

void ReferenceBackend::grad_norm(const UpdatePlan& plan, const Tensor& rates) {
  double sum = 0;
  for (const UpdateSlot& slot : plan.slots()) {
    for (int64_t i = 0; i < slot.grad.numel(); ++i) sum += slot.grad.get(i) * slot.grad.get(i);
  }
  finish_gradient_rates(sum, *rates.as<GradientRates>());
}

void ReferenceBackend::adamw(const UpdatePlan& plan, const Tensor& rates) {
  if (gradient_rates(rates).skip != 0) return;
  for (const UpdateSlot& slot : plan.slots()) {
    const AdamWRates& r = rates.as<AdamWRates>()[slot.rates_row];
    for (int64_t i = 0; i < slot.value.numel(); ++i) {
      const double g = slot.grad.get(i) * gradient_rates(rates).factor;
      const double m = slot.first.get(i) + r.mean_weight * (g - slot.first.get(i));
      const double v = slot.second.get(i) + r.square_weight * (g * g - slot.second.get(i));
      slot.first.set(i, m);
      slot.second.set(i, v);
      set_value(slot, i, slot.value.get(i) * r.decay - r.rate * m / (std::sqrt(v) * r.unbias + r.eps));
    }
  }
}

void ReferenceBackend::muon_momentum(const UpdatePlan& plan, const Tensor& rates, const Tensor& x,
                                     const Tensor& squares) {
  const bool skip = gradient_rates(rates).skip != 0;
  for (int64_t k = 0; k < x.dim(0); ++k) {
    const UpdateSlot& slot = plan.slots()[static_cast<size_t>(k)];
    const double mu = rates.as<MuonRates>()[slot.rates_row].momentum;
    const Tensor out = matrix(x, k);
    for (int64_t i = 0; i < out.numel(); ++i) {
      const double g = skip ? 0 : slot.grad.get(i) * gradient_rates(rates).factor, b = slot.first.get(i);
      const double after = skip ? 0 : b + (1 - mu) * (g - b);
      if (!skip) slot.first.set(i, after);
      out.set(i, g + mu * (after - g));
    }
    for (int64_t i = 0; i < x.dim(1); ++i) squares.set(k * x.dim(1) + i, row_squares(out, i));
  }
}

void ReferenceBackend::muon_equalize(const Tensor& x, const Tensor& squares, const Tensor& squares_out) {
  const int64_t m = x.dim(1), n = x.dim(2);
  for (int64_t k = 0; k < x.dim(0); ++k) {
    const Tensor out = matrix(x, k);
    const double target = std::sqrt(sum_of(squares.rows(k, 1)) / static_cast<double>(m));
    for (int64_t i = 0; i < m; ++i) {
      const double factor = target / std::max(std::sqrt(squares.get(k * m + i)), 1e-6);
      for (int64_t j = 0; j < n; ++j) out.set(i * n + j, out.get(i * n + j) * factor);
      squares_out.set(k * m + i, row_squares(out, i));
    }
  }
}

void ReferenceBackend::muon_normalize(const Tensor& x, const Tensor& squares, double factor, double eps) {
  for (int64_t k = 0; k < x.dim(0); ++k) {
    const Tensor out = matrix(x, k);
    const double norm = factor * std::sqrt(sum_of(squares.rows(k, 1))) + eps;
    for (int64_t i = 0; i < out.numel(); ++i) out.set(i, out.get(i) / norm);
  }
}

void ReferenceBackend::add_product(double factor, const Tensor& x, const Tensor& out) {
  axpby(factor, x, 1, out);
}

void ReferenceBackend::muon_variance(const UpdatePlan& plan, const Tensor& rates, const Tensor& x,
                                     const Tensor& factors) {
  const int64_t m = x.dim(1), n = x.dim(2), length = std::max(m, n);
  const auto q = static_cast<double>(std::min(m, n));
  for (int64_t k = 0; k < x.dim(0); ++k) {
    const UpdateSlot& slot = plan.slots()[static_cast<size_t>(k)];
    const double beta2 = rates.as<MuonRates>()[slot.rates_row].beta2;
    const Tensor g = matrix(x, k), factor = factors.rows(k, 1), v = zeros({length}, DType::f64);
    for (int64_t i = 0; i < g.numel(); ++i) {
      const int64_t at = m >= n ? i / n : i % n;
      v.set(at, v.get(at) + g.get(i) * g.get(i) / q);
    }
    const double norm = std::sqrt(q * sum_of(v));
    const double plus = std::sqrt(q) / std::max(norm, 1e-6);
    double after = 0;
    for (int64_t i = 0; i < length; ++i) {
      const double before = slot.second.get(i);
      const double second = before + (1 - beta2) * (v.get(i) * plus * plus - before);
      if (gradient_rates(rates).skip == 0) slot.second.set(i, second);
      after += q * v.get(i) * plus * plus / std::max(second, 1e-10);
      factor.set(i, 1 / std::sqrt(std::max(second, 1e-10)));
    }
    const double keep = plus * (plus * norm) / std::max(std::sqrt(after), 1e-10);
    for (int64_t i = 0; i < length; ++i) factor.set(i, factor.get(i) * keep);
  }
}

void ReferenceBackend::muon_update(const UpdatePlan& plan, const Tensor& rates, const Tensor& x,
                                   const Tensor* factors) {
  if (gradient_rates(rates).skip != 0) return;
  const int64_t m = x.dim(1), n = x.dim(2), length = std::max(m, n);
  for (int64_t k = 0; k < x.dim(0); ++k) {
    const UpdateSlot& slot = plan.slots()[static_cast<size_t>(k)];
    const MuonRates& r = rates.as<MuonRates>()[slot.rates_row];
    const double lr = r.lr * std::sqrt(std::max(1.0, static_cast<double>(m) / static_cast<double>(n)));
    for (int64_t i = 0; i < m * n; ++i) {
      const double factor = factors == nullptr ? 1 : factors->get(k * length + (m >= n ? i / n : i % n));
      const double u = x.get(k * m * n + i) * factor, p = slot.value.get(i);
      set_value(slot, i, p - lr * u - (u * p >= 0 ? lr * r.weight_decay * p : 0));
    }
  }
}

void ReferenceBackend::axpby(double alpha, const Tensor& x, double beta, const Tensor& out) {
  for (int64_t i = 0; i < out.numel(); ++i) {
    out.set(i, alpha * x.get(i) + (beta == 0 ? 0 : beta * out.get(i)));
  }
}

int64_t ReferenceBackend::first_nonfinite(const Tensor& x) {
  for (int64_t i = 0; i < x.numel(); ++i) {
    if (!std::isfinite(x.get(i))) return i;
  }
  return -1;
}

}  // namespace flexchat
