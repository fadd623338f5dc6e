// The meaning of an expression: its value at one point, in double. Slow and obvious; everything faster is
// checked against it.
#pragma once

#include <cstdint>
#include <vector>

#include "base/tensor.h"
#include "flex/bindings.h"
#include "flex/program.h"

namespace flexchat::flex {

struct Point {
  double score = 0;
  int64_t b = 0, h = 0, q = 0, kv = 0, n_q = 0, n_kv = 0;
};

// Evaluates one or several expressions that share captured tensors; keep it to evaluate at many points.
class Evaluator {
 public:
  Evaluator(const std::vector<Expr>& expressions, const Bindings& bindings);

  // The value of the first expression, or of all in order; booleans are 0 and 1. Errors: an index outside a
  // captured tensor. Not thread-safe: one Evaluator per thread.
  double operator()(const Point& point);
  std::vector<double> all(const Point& point);
  // The sum of the sizes of all results that a float rounds: numbers that arithmetic or a function gives,
  // infinities aside.
  double rounded_sizes(const Point& point);

 private:
  void run(const Point& point);

  Program program_;
  std::vector<Tensor> tensors_;  // of program_.captures
  std::vector<double> values_;   // of program_.code
};

// One value. Builds an Evaluator each time.
double evaluate(const Expr& expr, const Point& point, const Bindings& bindings = {});

}  // namespace flexchat::flex
