// Symbolic derivatives, for the backward pass of a score mod.
//
// With s' = mod(s, captures), the backward needs ds'/ds at every (q, kv), and ds'/dc for every element c that
// a differentiable captured tensor contributes. Both are expressions again, share subexpressions with the
// mod, and are computed by the same kernels.
//
// Conventions where no derivative exists: abs has slope 0 at 0; min and max at a tie follow the first
// operand; comparisons, //, % and integer operands are constant. A term whose derivative is identically zero
// vanishes even where another factor is infinite.
#pragma once

#include <vector>

#include "flex/expr.h"

namespace flexchat::flex {

// d expr / d leaf, where leaf is `score` or one access of a captured tensor, such as slope(h).
Expr derivative(const Expr& expr, const Expr& leaf);

// d expr / d score.
Expr score_derivative(const Expr& expr);

// One access of a differentiable captured tensor, and the derivative with respect to that element. The
// gradient of entry e of the tensor is the sum of `derivative` over all points and accesses that read e.
struct CaptureDerivative {
  Expr access;
  Expr derivative;
};
std::vector<CaptureDerivative> capture_derivatives(const Expr& expr);

}  // namespace flexchat::flex
