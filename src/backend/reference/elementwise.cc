#include <cmath>

#include "backend/reference/reference_backend.h"

namespace flexchat {
namespace {

double coefficient(const Coefficient& c) { return c.factor * (c.value ? c.value->get(c.index) : 1.0); }
double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

double gate_logit(const Tensor& weight, int64_t row, const double* x) {
  const int64_t channels = weight.dim(1);
  double sum = 0;
  for (int64_t j = 0; j < channels; ++j) sum += weight.as<double>()[row * channels + j] * x[j];
  return sum;
}

}  // namespace

void ReferenceBackend::value_gate(const Tensor& table, const Tensor& ids, const Tensor& h,
                                  const Tensor& gate_weight, const Tensor& qkv, const Tensor& gate) {
  const int64_t tokens = ids.numel(), c = h.dim(1), row = qkv.dim(1), g_heads = gate_weight.dim(0);
  const int64_t d = table.dim(1) / g_heads;
  for (int64_t n = 0; n < tokens; ++n) {
    for (int64_t g = 0; g < g_heads; ++g) {
      const double value = 3 * sigmoid(gate_logit(gate_weight, g, h.as<double>() + n * c));
      gate.as<double>()[n * g_heads + g] = value;
      const double* ve = table.as<double>() + (ids.as<int32_t>()[n] * g_heads + g) * d;
      double* v = qkv.as<double>() + (n + 1) * row - (g_heads - g) * d;
      for (int64_t x = 0; x < d; ++x) v[x] += value * ve[x];
    }
  }
}

void ReferenceBackend::value_gate_backward(const Tensor& dqkv, const Tensor& table, const Tensor& ids,
                                           const Tensor& h, const Tensor& gate_weight, const Tensor& gate,
                                           const Tensor& dtable, const Tensor& dgate_weight,
                                           const Tensor& dh) {
  const int64_t tokens = ids.numel(), c = h.dim(1), row = dqkv.dim(1), g_heads = gate_weight.dim(0);
  const int64_t d = table.dim(1) / g_heads, channels = gate_weight.dim(1);
  for (int64_t n = 0; n < tokens; ++n) {
    for (int64_t g = 0; g < g_heads; ++g) {
      const int64_t entry = (ids.as<int32_t>()[n] * g_heads + g) * d;
      const double* dv = dqkv.as<double>() + (n + 1) * row - (g_heads - g) * d;
      const double value = gate.as<double>()[n * g_heads + g];
      double dgate = 0;
      for (int64_t x = 0; x < d; ++x) {
        dgate += dv[x] * table.as<double>()[entry + x];
        dtable.as<double>()[entry + x] += value * dv[x];
      }
      const double dlogit = dgate * value * (1 - value / 3);  // d(3s)/dx = 3s(1-s)
      for (int64_t j = 0; j < channels; ++j) {
        dgate_weight.as<double>()[g * channels + j] += dlogit * h.as<double>()[n * c + j];
        dh.as<double>()[n * c + j] += dlogit * gate_weight.as<double>()[g * channels + j];
      }
    }
  }
}

void ReferenceBackend::relu_squared(const Tensor& u, const Tensor& y) {
  for (int64_t i = 0; i < u.numel(); ++i) {
    const double r = std::max(u.as<double>()[i], 0.0);
    y.as<double>()[i] = r * r;
  }
}

void ReferenceBackend::relu_squared_backward(const Tensor& u, const Tensor& dy) {
  for (int64_t i = 0; i < u.numel(); ++i) {
    const double r = std::max(u.as<double>()[i], 0.0);
    dy.as<double>()[i] *= 2 * r;
    u.as<double>()[i] = r * r;
  }
}

void ReferenceBackend::mix(const Coefficient& a, const Tensor& x, const Coefficient& b, const Tensor& y,
                           const Tensor& out) {
  const double ca = coefficient(a), cb = coefficient(b);
  for (int64_t i = 0; i < out.numel(); ++i) {
    out.as<double>()[i] = ca * x.as<double>()[i] + cb * y.as<double>()[i];
  }
}

void ReferenceBackend::mix_backward(const Tensor& dout, const Coefficient& a, const Tensor& x,
                                    const Coefficient& b, const Tensor& y, bool accumulate_dx,
                                    const Tensor& dx, bool accumulate_dy, const Tensor& dy, const Tensor* da,
                                    const Tensor* db) {
  const double ca = coefficient(a), cb = coefficient(b);
  double sum_a = 0, sum_b = 0;
  for (int64_t i = 0; i < dout.numel(); ++i) {
    const double d = dout.as<double>()[i];
    sum_a += d * x.as<double>()[i];
    sum_b += d * y.as<double>()[i];
    dx.as<double>()[i] = ca * d + (accumulate_dx ? dx.as<double>()[i] : 0);
    dy.as<double>()[i] = cb * d + (accumulate_dy ? dy.as<double>()[i] : 0);
  }
  if (da) da->as<double>()[a.index] += a.factor * sum_a;
  if (db) db->as<double>()[b.index] += b.factor * sum_b;
}

void ReferenceBackend::smear(const Tensor& e, const Tensor* previous, const Tensor& weight,
                             const Tensor& lambda, const Tensor& out, const Tensor& sigmoid_out) {
  const int64_t batch = e.dim(0), t_len = e.dim(1), c = e.dim(2);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t t = 0; t < t_len; ++t) {
      const double* now = e.as<double>() + (b * t_len + t) * c;
      const double* before = t > 0                    ? now - c
                             : previous && t_len == 1 ? previous->as<double>() + b * c
                                                      : nullptr;
      const double s = sigmoid(gate_logit(weight, 0, now));
      sigmoid_out.as<double>()[b * t_len + t] = s;
      const double gate = before ? lambda.as<double>()[0] * s : 0;
      for (int64_t j = 0; j < c; ++j) {
        out.as<double>()[(b * t_len + t) * c + j] = now[j] + (before ? gate * before[j] : 0);
      }
    }
  }
}

void ReferenceBackend::smear_backward(const Tensor& dout, const Tensor& e, const Tensor& weight,
                                      const Tensor& lambda, const Tensor& sigmoid_in, const Tensor& de,
                                      const Tensor& dweight, const Tensor& dlambda) {
  const int64_t batch = e.dim(0), t_len = e.dim(1), c = e.dim(2), channels = weight.dim(1);
  const double l = lambda.as<double>()[0];
  for (int64_t i = 0; i < e.numel(); ++i) de.as<double>()[i] = dout.as<double>()[i];
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t t = 1; t < t_len; ++t) {
      const int64_t row = (b * t_len + t) * c;
      const double s = sigmoid_in.as<double>()[b * t_len + t];
      double dgate = 0;
      for (int64_t j = 0; j < c; ++j) {
        dgate += dout.as<double>()[row + j] * e.as<double>()[row - c + j];
        de.as<double>()[row - c + j] += l * s * dout.as<double>()[row + j];
      }
      dlambda.as<double>()[0] += dgate * s;
      const double dlogit = dgate * l * s * (1 - s);
      for (int64_t j = 0; j < channels; ++j) {
        dweight.as<double>()[j] += dlogit * e.as<double>()[row + j];
        de.as<double>()[row + j] += dlogit * weight.as<double>()[j];
      }
    }
  }
}

}  // namespace flexchat
