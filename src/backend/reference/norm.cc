// RMSNorm (Zhang & Sennrich 2019) without a weight, the embedding that feeds it, and rotary position
// embedding (Su et al. 2021) with the QK norm behind it.
#include <cmath>

#include "backend/reference/reference_backend.h"

namespace flexchat {
namespace {

constexpr double kEps = 0x1p-23;  // the f32 machine epsilon, as the reference systems use for every dtype

double inverse_rms(const double* x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i] * x[i];
  return 1 / std::sqrt(sum / static_cast<double>(n) + kEps);
}

// dx = rstd * (dy - y * mean(dy * y))
void norm_gradient(const double* dy, const double* y, double rstd, int64_t n, double* dx) {
  double mean = 0;
  for (int64_t i = 0; i < n; ++i) mean += dy[i] * y[i];
  mean /= static_cast<double>(n);
  for (int64_t i = 0; i < n; ++i) dx[i] = rstd * (dy[i] - y[i] * mean);
}

}  // namespace

void ReferenceBackend::rms_norm(const Tensor& x, const Tensor& y, const Tensor& rstd) {
  const int64_t n = x.dim(0), c = x.dim(1);
  for (int64_t i = 0; i < n; ++i) {
    const double r = inverse_rms(x.as<double>() + i * c, c);
    rstd.as<double>()[i] = r;
    for (int64_t j = 0; j < c; ++j) y.as<double>()[i * c + j] = x.as<double>()[i * c + j] * r;
  }
}

void ReferenceBackend::rms_norm_backward(const Tensor& dy, const Tensor& y, const Tensor& rstd,
                                         bool accumulate, const Tensor& dx) {
  const int64_t n = y.dim(0), c = y.dim(1);
  std::vector<double> row(static_cast<size_t>(c));
  for (int64_t i = 0; i < n; ++i) {
    norm_gradient(dy.as<double>() + i * c, y.as<double>() + i * c, rstd.as<double>()[i], c, row.data());
    for (int64_t j = 0; j < c; ++j) {
      double& out = dx.as<double>()[i * c + j];
      out = row[static_cast<size_t>(j)] + (accumulate ? out : 0);
    }
  }
}

void ReferenceBackend::embed_norm(const Tensor& table, const Tensor& ids, const Tensor& y,
                                  const Tensor& rstd) {
  const int64_t c = table.dim(1);
  for (int64_t i = 0; i < ids.numel(); ++i) {
    const double* row = table.as<double>() + ids.as<int32_t>()[i] * c;
    const double r = inverse_rms(row, c);
    rstd.as<double>()[i] = r;
    for (int64_t j = 0; j < c; ++j) y.as<double>()[i * c + j] = row[j] * r;
  }
}

void ReferenceBackend::embed_norm_backward(const Tensor& dy, const Tensor& table, const Tensor& ids,
                                           const Tensor& rstd, const Tensor& dtable) {
  const int64_t c = table.dim(1);
  std::vector<double> y(static_cast<size_t>(c)), dx(static_cast<size_t>(c));
  for (int64_t i = 0; i < ids.numel(); ++i) {
    const int64_t id = ids.as<int32_t>()[i];
    const double r = rstd.as<double>()[i];
    for (int64_t j = 0; j < c; ++j) y[static_cast<size_t>(j)] = table.as<double>()[id * c + j] * r;
    norm_gradient(dy.as<double>() + i * c, y.data(), r, c, dx.data());
    for (int64_t j = 0; j < c; ++j) dtable.as<double>()[id * c + j] += dx[static_cast<size_t>(j)];
  }
}

void ReferenceBackend::rope_norm(const Tensor& x, const Tensor& cos_table, const Tensor& sin_table,
                                 int64_t n_heads, int64_t q_offset, double scale, const Tensor& rstd) {
  const int64_t tokens = x.dim(0) * x.dim(1), row = x.dim(2), half = cos_table.dim(1), d = 2 * half;
  for (int64_t n = 0; n < tokens; ++n) {
    const double* c = cos_table.as<double>() + (q_offset + n % x.dim(1)) * half;
    const double* s = sin_table.as<double>() + (q_offset + n % x.dim(1)) * half;
    for (int64_t h = 0; h < n_heads; ++h) {
      double* p = x.as<double>() + n * row + h * d;
      for (int64_t j = 0; j < half; ++j) {
        const double x1 = p[j], x2 = p[j + half];
        p[j] = x1 * c[j] + x2 * s[j];
        p[j + half] = -x1 * s[j] + x2 * c[j];
      }
      const double r = inverse_rms(p, d);
      rstd.as<double>()[n * n_heads + h] = r;
      for (int64_t j = 0; j < d; ++j) p[j] *= r * scale;
    }
  }
}

void ReferenceBackend::rope_norm_backward(const Tensor& y, const Tensor& cos_table, const Tensor& sin_table,
                                          int64_t n_heads, int64_t q_offset, double scale, const Tensor& rstd,
                                          const Tensor& dx) {
  const int64_t tokens = y.dim(0) * y.dim(1), row = y.dim(2), half = cos_table.dim(1), d = 2 * half;
  std::vector<double> unit(static_cast<size_t>(d)), dy(static_cast<size_t>(d)), g(static_cast<size_t>(d));
  for (int64_t n = 0; n < tokens; ++n) {
    const double* c = cos_table.as<double>() + (q_offset + n % y.dim(1)) * half;
    const double* s = sin_table.as<double>() + (q_offset + n % y.dim(1)) * half;
    for (int64_t h = 0; h < n_heads; ++h) {
      double* p = dx.as<double>() + n * row + h * d;
      for (int64_t j = 0; j < d; ++j) {
        unit[static_cast<size_t>(j)] = y.as<double>()[n * row + h * d + j] / scale;
        dy[static_cast<size_t>(j)] = p[j] * scale;
      }
      norm_gradient(dy.data(), unit.data(), rstd.as<double>()[n * n_heads + h], d, g.data());
      for (int64_t j = 0; j < half; ++j) {
        const double g1 = g[static_cast<size_t>(j)], g2 = g[static_cast<size_t>(j + half)];
        p[j] = g1 * c[j] - g2 * s[j];
        p[j + half] = g1 * s[j] + g2 * c[j];
      }
    }
  }
}

}  // namespace flexchat
