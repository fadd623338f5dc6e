// Plain double arithmetic and random parameters, shared by the optimizer tests.
#pragma once

#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "base/rng.h"
#include "grad/parameter.h"

namespace flexchat {

struct Matrix {
  int64_t m = 0, n = 0;
  std::vector<double> v;  // row-major
  Matrix(int64_t rows, int64_t cols) : m(rows), n(cols), v(static_cast<size_t>(rows * cols)) {}
  double& at(int64_t i, int64_t j) { return v[static_cast<size_t>(i * n + j)]; }
  double at(int64_t i, int64_t j) const { return v[static_cast<size_t>(i * n + j)]; }
};

inline Matrix transposed(const Matrix& a) {
  Matrix t(a.n, a.m);
  for (int64_t i = 0; i < a.m; ++i) {
    for (int64_t j = 0; j < a.n; ++j) t.at(j, i) = a.at(i, j);
  }
  return t;
}

inline Matrix product(const Matrix& a, const Matrix& b) {
  Matrix c(a.m, b.n);
  for (int64_t i = 0; i < a.m; ++i) {
    for (int64_t j = 0; j < b.n; ++j) {
      for (int64_t k = 0; k < a.n; ++k) c.at(i, j) += a.at(i, k) * b.at(k, j);
    }
  }
  return c;
}

inline double norm(const std::vector<double>& v) {
  double s = 0;
  for (double x : v) s += x * x;
  return std::sqrt(s);
}

inline std::vector<double> values(const Tensor& t) {
  std::vector<double> v(static_cast<size_t>(t.numel()));
  for (int64_t i = 0; i < t.numel(); ++i) v[static_cast<size_t>(i)] = t.get(i);
  return v;
}

// |a - b| / |b|
inline double relative_error(const std::vector<double>& a, const std::vector<double>& b) {
  std::vector<double> d(a.size());
  for (size_t i = 0; i < a.size(); ++i) d[i] = a[i] - b[i];
  return norm(d) / norm(b);
}

// Numbers that every dtype from f32 up holds exactly, so that backends start from the same values.
inline void fill_normal(const Tensor& t, uint64_t seed, double scale = 1) {
  Rng rng(seed);
  for (int64_t i = 0; i < t.numel(); ++i)
    t.set(i, static_cast<double>(static_cast<float>(scale * rng.normal())));
}

inline Parameter random_parameter(Backend& backend, std::string name, const Shape& shape, uint64_t seed) {
  Parameter p{std::move(name), backend.zeros(shape, backend.master_dtype()),
              backend.zeros(shape, backend.master_dtype())};
  fill_normal(p.value, seed, 0.5);
  fill_normal(p.grad, seed + 1000);
  return p;
}

}  // namespace flexchat
