#include "optim/muon.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "base/error.h"
#include "optim/adamw.h"

namespace flexchat {
namespace {

struct Quintic {
  double a, b, c;
};
constexpr Quintic kNewtonSchulz = {3.4445, -4.7750, 2.0315};
constexpr int kNewtonSchulzSteps = 5;
constexpr std::array<Quintic, 5> kPolarExpress = {{
    {8.156554524902461, -22.48329292557795, 15.878769915207462},
    {4.042929935166739, -2.808917465908714, 0.5000178451051316},
    {3.8916678022926607, -2.772484153217685, 0.5060648178503393},
    {3.285753657755655, -2.3681294933425376, 0.46449024233003106},
    {2.3465413258596377, -1.7097828382687081, 0.42323551169305323},
}};

// A scalar as a tensor of `dtype` would hold it.
double rounded(DType dtype, double x) {
  if (dtype == DType::bf16) return static_cast<double>(to_float(to_bf16(static_cast<float>(x))));
  return dtype == DType::f32 ? static_cast<double>(static_cast<float>(x)) : x;
}

// Vectors of m or n elements pass through the host: between two products their cost does not show.
std::vector<double> read_vector(Backend& backend, const Tensor& x) {
  const Tensor host(host_arena(), x.shape(), x.dtype());
  backend.copy(x, host);
  std::vector<double> values(static_cast<size_t>(host.numel()));
  for (int64_t i = 0; i < host.numel(); ++i) values[static_cast<size_t>(i)] = host.get(i);
  return values;
}

void write_vector(Backend& backend, const std::vector<double>& values, const Tensor& out) {
  backend.copy(Tensor::from<double>(values, out.shape(), out.dtype()), out);
}

// out += factor * x, rounding the product first where the dtype is bf16; x is used up.
void add_product(Backend& backend, double factor, const Tensor& x, const Tensor& out) {
  if (x.dtype() == DType::bf16) {
    backend.axpby(factor, x, 0, x);
    factor = 1;
  }
  backend.axpby(factor, x, 1, out);
}

// a*X + (b*A + c*A*A) X with A = X X^T, or for a tall X the same of its transpose; x is used up. The order
// (c*A)*A is classic nanochat's: in bf16 it decides the last bits, and small singular values amplify those.
Tensor quintic(Backend& backend, const Quintic& q, const Tensor& x) {
  const bool tall = x.dim(0) > x.dim(1);
  const int64_t k = std::min(x.dim(0), x.dim(1));
  const Tensor gram = backend.empty({k, k}, x.dtype()), scaled = backend.empty({k, k}, x.dtype());
  const Tensor polynomial = backend.empty({k, k}, x.dtype()), out = backend.empty(x.shape(), x.dtype());
  backend.matmul(x, tall ? Trans::yes : Trans::no, x, tall ? Trans::no : Trans::yes, 0, gram);
  backend.axpby(q.c, gram, 0, scaled);
  backend.matmul(scaled, Trans::no, gram, Trans::no, 0, polynomial);
  add_product(backend, q.b, gram, polynomial);
  if (tall) {
    backend.matmul(x, Trans::no, polynomial, Trans::yes, 0, out);
  } else {
    backend.matmul(polynomial, Trans::no, x, Trans::no, 0, out);
  }
  add_product(backend, q.a, x, out);
  return out;
}

// x /= factor*|x| + eps (Frobenius), so that no singular value exceeds 1.
void scale_to_unit(Backend& backend, const Tensor& x, double factor, double eps) {
  const DType dtype = x.dtype();
  const double norm = rounded(dtype, std::sqrt(backend.sum_squares(x)));
  backend.axpby(1 / rounded(dtype, rounded(dtype, factor * norm) + eps), x, 0, x);
}

// MuonEq: every row gets the root mean square row norm.
void equalize_rows(Backend& backend, const Tensor& x) {
  const int64_t m = x.dim(0);
  const Tensor squares = backend.empty({m}, backend.master_dtype());
  backend.axis_sum_squares(x, 1, squares);
  std::vector<double> values = read_vector(backend, squares);
  double total = 0;
  for (double v : values) total += v;
  const double target = std::sqrt(total / static_cast<double>(m));
  for (double& v : values) v = rounded(x.dtype(), target / std::max(std::sqrt(v), 1e-6));
  write_vector(backend, values, squares);
  backend.axis_scale(x, 1, squares);
}

// Muon+ and the variance reduction, both factors of g applied in one pass. Muon+ gives g the norm
// sqrt(min(m, n)). Then, with v the mean squares of g over its shorter axis (length q), one for each index of
// the longer: second = lerp(second, v, 1-beta2), and g *= second^(-1/2) times what keeps the norm of g.
void reduce_variance(Backend& backend, double beta2, const Tensor& g, const Tensor& second_momentum) {
  const int64_t m = g.dim(0), n = g.dim(1);
  const int axis = m >= n ? 1 : 0;
  const auto q = static_cast<double>(std::min(m, n));
  const Tensor squares = backend.empty(second_momentum.shape(), backend.master_dtype());
  backend.axis_sum_squares(g, axis, squares);
  std::vector<double> sums = read_vector(backend, squares), second = read_vector(backend, second_momentum);
  double total = 0;
  for (double s : sums) total += s;
  const double plus = std::sqrt(q) / std::max(std::sqrt(total), 1e-6);
  double after = 0;
  for (size_t i = 0; i < sums.size(); ++i) {
    sums[i] *= plus * plus;
    second[i] += (1 - beta2) * (sums[i] / q - second[i]);
    after += sums[i] / std::max(second[i], 1e-10);
  }
  write_vector(backend, second, second_momentum);
  const double keep = plus * plus * std::sqrt(total) / std::max(std::sqrt(after), 1e-10);
  for (double& s : second) s = keep / std::sqrt(std::max(s, 1e-10));
  write_vector(backend, second, squares);
  backend.axis_scale(g, axis, squares);
}

double shape_factor(const Tensor& x) {
  return std::sqrt(std::max(1.0, static_cast<double>(x.dim(0)) / static_cast<double>(x.dim(1))));
}

// The momentum step, its result in the dtype of the iterations.
Tensor nesterov(Backend& backend, const MuonStep& step, const Parameter& param, const Tensor& momentum) {
  check_gradient(param);
  check(param.value.rank() == 2 && param.value.numel() > 0, "Muon updates matrices; parameter '{}' is {}",
        param.name, shape_string(param.value.shape()));
  check(momentum.shape() == param.value.shape(), "the momentum of '{}' is {}, not {}", param.name,
        shape_string(momentum.shape()), shape_string(param.value.shape()));
  const Tensor x = backend.empty(param.value.shape(), step.dtype);
  backend.nesterov(step.momentum, param.grad, momentum, x);
  return x;
}

}  // namespace

Shape second_momentum_shape(const Shape& matrix) {
  return matrix[0] >= matrix[1] ? Shape{matrix[0], 1} : Shape{1, matrix[1]};
}

Tensor newton_schulz(Backend& backend, Tensor x) {
  scale_to_unit(backend, x, 1, 1e-7);
  for (int i = 0; i < kNewtonSchulzSteps; ++i) x = quintic(backend, kNewtonSchulz, x);
  return x;
}

Tensor polar_express(Backend& backend, Tensor x) {
  scale_to_unit(backend, x, 1.01, 1e-6);
  for (const Quintic& q : kPolarExpress) x = quintic(backend, q, x);
  return x;
}

void classic_muon(Backend& backend, const MuonStep& step, const Parameter& param, const Tensor& momentum) {
  const Tensor update = newton_schulz(backend, nesterov(backend, step, param, momentum));
  backend.axpby(-step.lr * shape_factor(update), update, 1, param.value);
}

void modern_muon(Backend& backend, const MuonStep& step, const Parameter& param, const Tensor& momentum,
                 const Tensor& second_momentum) {
  check(param.value.rank() == 2 && second_momentum.shape() == second_momentum_shape(param.value.shape()),
        "the second momentum {} does not fit parameter '{}' {}", shape_string(second_momentum.shape()),
        param.name, shape_string(param.value.shape()));
  Tensor update = nesterov(backend, step, param, momentum);
  equalize_rows(backend, update);
  update = polar_express(backend, update);
  if (update.dtype() != backend.master_dtype()) {
    const Tensor wide = backend.empty(update.shape(), backend.master_dtype());
    backend.copy(update, wide);
    update = wide;
  }
  reduce_variance(backend, step.beta2, update, second_momentum);
  backend.cautious_update(step.lr * shape_factor(update), step.weight_decay, update, param.value);
}

}  // namespace flexchat
