// Plain double arithmetic, random parameters and single updates, shared by the optimizer tests. Tensors may
// be in a device's memory: their numbers pass through the host.
#pragma once

#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "backend/cuda_loader.h"
#include "base/rng.h"
#include "grad/parameter.h"
#include "optim/adamw.h"
#include "optim/muon.h"

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

inline std::vector<double> values(Backend& backend, const Tensor& t) {
  const Tensor host = backend.to_host(t);
  std::vector<double> v(static_cast<size_t>(host.numel()));
  for (int64_t i = 0; i < host.numel(); ++i) v[static_cast<size_t>(i)] = host.get(i);
  return v;
}

// |a - b| / |b|
inline double relative_error(const std::vector<double>& a, const std::vector<double>& b) {
  std::vector<double> d(a.size());
  for (size_t i = 0; i < a.size(); ++i) d[i] = a[i] - b[i];
  return norm(d) / norm(b);
}

// Numbers that every dtype from f32 up holds exactly, so that backends start from the same values.
inline void fill_normal(Backend& backend, const Tensor& t, uint64_t seed, double scale = 1) {
  Rng rng(seed);
  const Tensor host(host_arena(), t.shape(), DType::f32);
  for (int64_t i = 0; i < host.numel(); ++i) host.set(i, scale * rng.normal());
  backend.copy(host, t);
}

// Element i, wherever the tensor is.
inline void set_element(Backend& backend, const Tensor& t, int64_t i, double value) {
  const Tensor host(host_arena(), t.shape(), t.dtype());
  backend.copy(t, host);
  host.set(i, value);
  backend.copy(host, t);
}

inline Parameter random_parameter(Backend& backend, std::string name, const Shape& shape, uint64_t seed) {
  Parameter p{std::move(name), backend.zeros(shape, backend.master_dtype()),
              backend.zeros(shape, backend.master_dtype())};
  fill_normal(backend, p.value, seed, 0.5);
  fill_normal(backend, p.grad, seed + 1000);
  return p;
}

// Every backend of this machine: reference, cpu, and cuda where there is a device.
inline std::vector<std::string> backend_names() {
  std::vector<std::string> names = {"reference", "cpu"};
  if (cuda_available()) names.push_back("cuda");
  return names;
}
inline std::vector<std::unique_ptr<Backend>> all_backends() {
  std::vector<std::unique_ptr<Backend>> backends;
  for (const std::string& name : backend_names()) backends.push_back(make_backend(name));
  return backends;
}

// Rates whose row 0 multiplies gradients by `factor` (or skips them) and whose row 1 is `group`.
template <class Rates>
Tensor make_rates(Backend& backend, const Rates& group, double factor = 1, bool skip = false) {
  const Tensor host(host_arena(), {2, kRatesPerRow}, DType::f64);
  *host.as<GradientRates>() = {.factor = factor, .skip = skip ? 1.0 : 0.0};
  host.as<Rates>()[1] = group;
  return backend.clone(host);
}

// One AdamW update of one parameter.
inline void adamw(Backend& backend, const AdamWStep& step, const Parameter& param, const Tensor& m,
                  const Tensor& v) {
  backend.adamw(*backend.plan_update({adamw_slot(param, m, v, 1)}), make_rates(backend, adamw_rates(step)));
}

// One Muon update of one matrix.
struct MuonStep {
  double lr = 0, momentum = 0.95, beta2 = 0.9, weight_decay = 0;
  DType dtype = DType::bf16;
  MuonRates rates() const { return {lr, momentum, beta2, weight_decay}; }
};
inline void classic_muon(Backend& backend, const MuonStep& step, const Parameter& param,
                         const Tensor& momentum) {
  Muon(backend, Arch::classic, step.dtype, {muon_slot(Arch::classic, param, momentum, Tensor(), 1)}, 0)
      .update(make_rates(backend, step.rates()));
}
inline void modern_muon(Backend& backend, const MuonStep& step, const Parameter& param,
                        const Tensor& momentum, const Tensor& second) {
  Muon(backend, Arch::modern, step.dtype, {muon_slot(Arch::modern, param, momentum, second, 1)}, 0)
      .update(make_rates(backend, step.rates()));
}

}  // namespace flexchat
