// The tape's gradients against central differences in double, on the reference backend.
#pragma once

#include <fmt/core.h>
#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "grad/tape.h"
#include "ops/ops.h"
#include "testing/tensors.h"

namespace flexchat {

// A loss of step h = 1e-5 around x: the third derivative adds h^2/6 = 2e-11 times itself, the rounding of a
// loss of size 10 adds 1e-15 / h = 1e-10. A wrong formula is off by far more than these bounds.
inline constexpr double kStep = 1e-5, kRelative = 1e-6, kOfScale = 1e-7, kFloor = 1e-8;

// Compares `gradient` with differences of `loss` at up to `limit` elements of `value`: all of them, or a
// random sample of which half are elements with a gradient.
inline void expect_gradient(const std::string& name, const Tensor& value, const Tensor& gradient,
                            const std::function<double()>& loss, int64_t limit = 1 << 30) {
  ASSERT_TRUE(gradient.defined()) << name << " got no gradient";
  ASSERT_EQ(gradient.shape(), value.shape()) << name;
  std::vector<int64_t> all(static_cast<size_t>(value.numel())), chosen, live;
  for (int64_t i = 0; i < value.numel(); ++i) {
    all[static_cast<size_t>(i)] = i;
    if (gradient.get(i) != 0) live.push_back(i);
  }
  if (value.numel() <= limit) {
    chosen = all;
  } else {
    Rng rng(99);
    for (int64_t i = 0; i < limit; ++i) {
      const auto& from = i % 2 == 0 || live.empty() ? all : live;
      chosen.push_back(from[rng.below(from.size())]);
    }
  }
  const double scale = max_abs(gradient);
  for (const int64_t i : chosen) {
    const double x = value.get(i);
    value.set(i, x + kStep);
    const double above = loss();
    value.set(i, x - kStep);
    const double below = loss();
    value.set(i, x);
    const double expected = (above - below) / (2 * kStep), got = gradient.get(i);
    ASSERT_NEAR(got, expected, kRelative * std::abs(expected) + kOfScale * scale + kFloor)
        << name << " " << shape_string(value.shape()) << ", element " << i;
  }
}

// One graph of ops. It gets its inputs as variables, may change them in place, and returns its loss by
// weighted_sum() or, on a recording tape, has the gradients formed another way.
using Graph = std::function<double(Tape&, const std::vector<Var>&)>;

// sum(w * out) with fixed random w; on a recording tape also the start of backward.
inline double weighted_sum(Tape& tape, const Var& out, uint64_t seed = 1) {
  Rng rng(seed, 77);
  const Tensor w = random_tensor(rng, out->value.shape(), DType::f64);
  double sum = 0;
  for (int64_t i = 0; i < w.numel(); ++i) sum += w.get(i) * out->value.get(i);
  if (tape.recording()) out->grad = w;
  return sum;
}

inline Weight random_weight(Rng& rng, const Shape& shape, double scale = 1) {
  const Tensor value = random_tensor(rng, shape, DType::f64, scale);
  return {value, filled_tensor(shape, DType::f64, 0), value};
}

// Every element of every input and weight, or a sample of `limit` of each. Weight gradients must be added to
// what is there.
inline void check_gradients(const std::string& where, const std::vector<Tensor>& inputs,
                            const std::vector<Weight*>& weights, const Graph& graph,
                            int64_t limit = 1 << 30) {
  SCOPED_TRACE(where);
  constexpr double kBefore = 0.25;
  const auto backend = make_reference_backend();
  const auto run = [&](bool recording) {
    std::vector<Var> vars;
    for (const Tensor& t : inputs) vars.push_back(Tape::leaf(duplicate(t)));
    Tape tape(*backend, recording);
    const double loss = graph(tape, vars);
    tape.backward();
    return std::pair{loss, vars};
  };
  for (Weight* w : weights) backend->fill(w->grad, kBefore);
  const auto [recorded_loss, vars] = run(true);
  const auto loss = [&] { return run(false).first; };
  EXPECT_EQ(recorded_loss, loss()) << "recording changes the result";
  for (size_t i = 0; i < inputs.size(); ++i) {
    expect_gradient(fmt::format("input {}", i), inputs[i], vars[i]->grad, loss, limit);
  }
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor gradient = duplicate(weights[i]->grad);
    for (int64_t j = 0; j < gradient.numel(); ++j) gradient.set(j, gradient.get(j) - kBefore);
    expect_gradient(fmt::format("weight {}", i), weights[i]->value, gradient, loss, limit);
  }
}

}  // namespace flexchat
