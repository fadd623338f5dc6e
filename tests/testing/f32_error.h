// Running error analysis of a score mod: how far a value computed in f32 may be from that in double.
#pragma once

#include <cmath>
#include <vector>

#include "flex/attention.h"
#include "flex/derivative.h"
#include "flex/eval.h"
#include "flex/program.h"

namespace flexchat {

// Errors at the worst of the visible points; `ambiguous`: a condition that rounding may turn decides the
// mask.
struct F32Error {
  double value = 0, derivative = 0, magnitude = 0;
  bool ambiguous = false;
};

// Evaluates a program at a point together with a first-order bound on the error of every value, in units of
// f32's rounding: each operation adds a few of them to what its operands bring.
class RunningError {
 public:
  RunningError(const std::vector<flex::Expr>& roots, const flex::Bindings& bindings) : program_(roots) {
    for (const flex::Capture& c : program_.captures) tensors_.push_back(bindings.at(c));
    value_.resize(program_.code.size());
    error_.resize(program_.code.size());
  }
  void run(const flex::Point& p, double score_error) {
    for (size_t i = 0; i < program_.code.size(); ++i) step(i, p, score_error);
  }
  double value(size_t root) const { return value_[static_cast<size_t>(program_.roots[root])]; }
  double error(size_t root) const { return error_[static_cast<size_t>(program_.roots[root])]; }

 private:
  static constexpr double u = 0x1p-24;

  static double variable(flex::Var var, const flex::Point& p) {
    switch (var) {
      case flex::Var::score:
        return p.score;
      case flex::Var::b:
        return static_cast<double>(p.b);
      case flex::Var::h:
        return static_cast<double>(p.h);
      case flex::Var::q:
        return static_cast<double>(p.q);
      case flex::Var::kv:
        return static_cast<double>(p.kv);
      case flex::Var::n_q:
        return static_cast<double>(p.n_q);
      default:
        return static_cast<double>(p.n_kv);
    }
  }

  void step(size_t i, const flex::Point& p, double score_error) {
    using flex::Op;
    const flex::Instruction& in = program_.code[i];
    double &v = value_[i], &e = error_[i];
    e = 0;
    if (in.op == Op::constant) {
      v = in.value;
      if (in.type == flex::Type::number) e = u * std::abs(v);
      return;
    }
    if (in.op == Op::variable) {
      v = variable(in.var, p);
      if (in.var == flex::Var::score) e = score_error;
      return;
    }
    if (in.op == Op::capture) {
      const auto c = static_cast<size_t>(in.capture);
      int64_t at = 0;
      for (int k = 0; k < in.n_args; ++k) {
        at = at * tensors_[c].dim(k) +
             static_cast<int64_t>(value_[static_cast<size_t>(in.args[static_cast<size_t>(k)])]);
      }
      v = tensors_[c].get(at);
      return;
    }
    double a[3] = {0, 0, 0}, ea[3] = {0, 0, 0};
    for (size_t k = 0; k < static_cast<size_t>(in.n_args); ++k) {
      a[k] = value_[static_cast<size_t>(in.args[k])];
      ea[k] = error_[static_cast<size_t>(in.args[k])];
    }
    v = flex::apply_op(in.op, a[0], a[1], a[2]);
    e = propagate(in.op, a, ea, v);
    if (in.type == flex::Type::number) e += 4 * u * std::abs(v);
  }

  static double propagate(flex::Op op, const double* a, const double* e, double v) {
    using flex::Op;
    switch (op) {
      case Op::add:
      case Op::sub:
        return e[0] + e[1];
      case Op::mul:
        return std::abs(a[0]) * e[1] + std::abs(a[1]) * e[0];
      case Op::div:
        return (e[0] + std::abs(v) * e[1]) / std::abs(a[1]);
      case Op::lt:
      case Op::le:
      case Op::eq:
      case Op::ne:  // 1: may be the other way round
        return e[0] + e[1] > 0 && std::abs(a[0] - a[1]) <= e[0] + e[1] ? 1 : 0;
      case Op::logical_and:
      case Op::logical_or:
        return std::max(e[0], e[1]);
      case Op::where:
        return std::max(e[1], e[2]) + (e[0] > 0 ? std::abs(a[1] - a[2]) : 0);
      case Op::min:
      case Op::max:
        return std::max(e[0], e[1]);
      case Op::exp:
        return v * e[0];
      case Op::log:
        return e[0] / std::abs(a[0]) + 2 * u;
      case Op::tanh:
        return (1 - v * v) * e[0];
      case Op::sigmoid:
        return v * (1 - v) * e[0];
      case Op::softplus:
        return e[0];
      case Op::pow:
        return std::abs(v) * (std::abs(a[1] / a[0]) * e[0] + std::abs(std::log(a[0])) * e[1]);
      case Op::sqrt:
        return e[0] / (2 * v);
      default:
        return e[0] + e[1];
    }
  }

  flex::Program program_;
  std::vector<Tensor> tensors_;
  std::vector<double> value_, error_;
};

// Over the points of a shape, for scores of a few units.
inline F32Error f32_error(const AttentionShape& shape, const AttentionSpec& spec) {
  constexpr double kScores[] = {-3, -0.7, 0.9, 3}, kScoreError = 5e-7;
  std::vector<flex::Expr> roots = {spec.score_mod ? *spec.score_mod : flex::variables().score,
                                   spec.mask ? *spec.mask : flex::Expr(true)};
  roots.push_back(flex::score_derivative(roots[0]));
  for (const auto& d : flex::capture_derivatives(roots[0])) roots.push_back(d.derivative);
  RunningError running(roots, spec.bindings);
  const flex::Extent extent = shape.extent();
  F32Error worst;
  const auto take = [](double& largest, double x) {
    if (!(x <= largest)) largest = std::isnan(x) ? HUGE_VAL : x;
  };
  for (int64_t b = 0; b < shape.batch; ++b) {
    for (int64_t h = 0; h < shape.n_head; ++h) {
      for (int64_t r = 0; r < extent.q_len(b); ++r) {
        for (int64_t j = 0; j < extent.kv_len(b); ++j) {
          const double score = kScores[static_cast<uint64_t>(r * 7 + j * 3 + h) % 4];
          running.run({score, b, h, extent.q_offset(b) + r, j, extent.q_len(b), extent.kv_len(b)},
                      kScoreError);
          worst.ambiguous = worst.ambiguous || running.error(1) > 0;
          if (running.value(1) == 0) continue;
          take(worst.value, running.error(0));
          take(worst.magnitude, std::abs(running.value(0)));
          for (size_t i = 2; i < roots.size(); ++i) {
            take(worst.derivative, running.error(i));
            take(worst.magnitude, std::abs(running.value(i)));
          }
        }
      }
    }
  }
  return worst;
}

}  // namespace flexchat
