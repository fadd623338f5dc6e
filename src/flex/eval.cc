// The reference evaluator.
#include "flex/eval.h"

#include <cmath>

#include "base/error.h"

namespace flexchat::flex {
namespace {

double variable_value(Var var, const Point& p) {
  switch (var) {
    case Var::score:
      return p.score;
    case Var::b:
      return static_cast<double>(p.b);
    case Var::h:
      return static_cast<double>(p.h);
    case Var::q:
      return static_cast<double>(p.q);
    case Var::kv:
      return static_cast<double>(p.kv);
    case Var::n_q:
      return static_cast<double>(p.n_q);
    case Var::n_kv:
      return static_cast<double>(p.n_kv);
  }
  fail("unknown variable");
}

double capture_value(const Capture& capture, const Tensor& tensor, const Instruction& in,
                     const std::vector<double>& values) {
  int64_t offset = 0;
  for (int axis = 0; axis < in.n_args; ++axis) {
    const double index = values[static_cast<size_t>(in.args[static_cast<size_t>(axis)])];
    if (!(index >= 0 && index < static_cast<double>(tensor.dim(axis)))) {
      fail("captured tensor {}: index {} of axis {} is outside [0, {})", capture.signature(), index, axis + 1,
           tensor.dim(axis));
    }
    offset = offset * tensor.dim(axis) + static_cast<int64_t>(index);
  }
  return tensor.get(offset);
}

}  // namespace

Evaluator::Evaluator(const std::vector<Expr>& expressions, const Bindings& bindings) : program_(expressions) {
  for (const Capture& capture : program_.captures) tensors_.push_back(bindings.at(capture));
  values_.resize(program_.code.size());
}

void Evaluator::run(const Point& point) {
  for (size_t i = 0; i < values_.size(); ++i) {
    const Instruction& in = program_.code[i];
    const auto arg = [&](size_t k) { return values_[static_cast<size_t>(in.args[k])]; };
    if (in.op == Op::constant) {
      values_[i] = in.value;
    } else if (in.op == Op::variable) {
      values_[i] = variable_value(in.var, point);
    } else if (in.op == Op::capture) {
      const auto c = static_cast<size_t>(in.capture);
      values_[i] = capture_value(program_.captures[c], tensors_[c], in, values_);
    } else {
      values_[i] = apply_op(in.op, arg(0), arg(1), arg(2));
    }
  }
}

double Evaluator::operator()(const Point& point) {
  run(point);
  return values_[static_cast<size_t>(program_.roots.front())];
}

std::vector<double> Evaluator::all(const Point& point) {
  run(point);
  std::vector<double> result;
  for (const int root : program_.roots) result.push_back(values_[static_cast<size_t>(root)]);
  return result;
}

double Evaluator::rounded_sizes(const Point& point) {
  run(point);
  double sum = 0;
  for (size_t i = 0; i < values_.size(); ++i) {
    const Instruction& in = program_.code[i];
    const bool exact = in.op == Op::constant || in.op == Op::variable || in.op == Op::capture ||
                       in.op == Op::neg || in.op == Op::abs || in.op == Op::min || in.op == Op::max ||
                       in.op == Op::where;
    if (in.type == Type::number && !exact && std::isfinite(values_[i])) sum += std::abs(values_[i]);
  }
  return sum;
}

double evaluate(const Expr& expr, const Point& point, const Bindings& bindings) {
  return Evaluator({expr}, bindings)(point);
}

}  // namespace flexchat::flex
