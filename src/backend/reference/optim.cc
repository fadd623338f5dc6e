// AdamW (Loshchilov & Hutter 2019) and the element-wise parts of Muon (Jordan et al. 2024).
#include <cmath>

#include "backend/reference/reference_backend.h"

namespace flexchat {

void ReferenceBackend::adamw(const AdamWStep& s, const Tensor& grad, const Tensor& param, const Tensor& m,
                             const Tensor& v) {
  const double bias1 = 1 - std::pow(s.beta1, static_cast<double>(s.step));
  const double bias2 = 1 - std::pow(s.beta2, static_cast<double>(s.step));
  for (int64_t i = 0; i < param.numel(); ++i) {
    const double g = grad.as<double>()[i];
    double &p = param.as<double>()[i], &mi = m.as<double>()[i], &vi = v.as<double>()[i];
    p *= 1 - s.lr * s.weight_decay;
    mi += (1 - s.beta1) * (g - mi);
    vi += (1 - s.beta2) * (g * g - vi);
    p -= s.lr / bias1 * mi / (std::sqrt(vi / bias2) + s.eps);
  }
}

void ReferenceBackend::nesterov(double momentum, const Tensor& grad, const Tensor& buffer,
                                const Tensor& out) {
  for (int64_t i = 0; i < grad.numel(); ++i) {
    const double g = grad.get(i), b = buffer.get(i) + (1 - momentum) * (g - buffer.get(i));
    buffer.set(i, b);
    out.set(i, g + momentum * (b - g));
  }
}

void ReferenceBackend::axis_sum_squares(const Tensor& x, int axis, const Tensor& out) {
  const int64_t m = x.dim(0), n = x.dim(1);
  for (int64_t i = 0; i < out.numel(); ++i) out.set(i, 0);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      const int64_t k = axis == 1 ? i : j;
      out.set(k, out.get(k) + x.get(i * n + j) * x.get(i * n + j));
    }
  }
}

void ReferenceBackend::axis_scale(const Tensor& x, int axis, const Tensor& factor) {
  const int64_t m = x.dim(0), n = x.dim(1);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) x.set(i * n + j, x.get(i * n + j) * factor.get(axis == 1 ? i : j));
  }
}

void ReferenceBackend::axpby(double alpha, const Tensor& x, double beta, const Tensor& out) {
  for (int64_t i = 0; i < out.numel(); ++i) {
    out.set(i, alpha * x.get(i) + (beta == 0 ? 0 : beta * out.get(i)));
  }
}

void ReferenceBackend::cautious_update(double lr, double weight_decay, const Tensor& g, const Tensor& param) {
  for (int64_t i = 0; i < param.numel(); ++i) {
    const double p = param.get(i), u = g.get(i);
    param.set(i, p - lr * u - (u * p >= 0 ? lr * weight_decay * p : 0));
  }
}

double ReferenceBackend::sum_squares(const Tensor& x) {
  double sum = 0;
  for (int64_t i = 0; i < x.numel(); ++i) sum += x.get(i) * x.get(i);
  return sum;
}

int64_t ReferenceBackend::first_nonfinite(const Tensor& x) {
  for (int64_t i = 0; i < x.numel(); ++i) {
    if (!std::isfinite(x.get(i))) return i;
  }
  return -1;
}

}  // namespace flexchat
