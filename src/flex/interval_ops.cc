// Each function returns bounds of op(x, y) over all values in x and y as apply_op (flex/expr.h) computes
// them.
#include "flex/interval_ops.h"

#include "base/error.h"

namespace flexchat::flex {
namespace {

using bounds::infinity;

// For functions that the C library rounds almost, but not always, to nearest: outwards by a few ulps, within
// the function's own bounds.
Interval widened(double lo, double hi, bool nan, double least = -infinity, double most = infinity) {
  constexpr double slack = 8 * std::numeric_limits<double>::epsilon();
  constexpr double tiny = std::numeric_limits<double>::min();
  return {std::max(least, lo - std::abs(lo) * slack - tiny), std::min(most, hi + std::abs(hi) * slack + tiny),
          nan};
}

// The part of x where log and sqrt are defined; NaN beyond it.
Interval rooted(Op op, const Interval& x) {
  if (x.hi < 0) return bounds::unbounded(true);
  const auto f = [op](double v) { return apply_op(op, std::max(v, 0.0), 0, 0); };
  return widened(f(x.lo), f(x.hi), x.nan || x.lo < 0, op == Op::sqrt ? 0 : -infinity);
}

Interval power(const Interval& x, const Interval& y) {
  const bool nan = x.nan || y.nan;
  // On a positive base pow is monotone in each operand, so its extremes are at the corners.
  if (x.lo > 0 && !bounds::infinite(x) && !bounds::infinite(y)) {
    const Interval c = bounds::corners(std::pow(x.lo, y.lo), std::pow(x.lo, y.hi), std::pow(x.hi, y.lo),
                                       std::pow(x.hi, y.hi), nan);
    return widened(c.lo, c.hi, c.nan, 0);
  }
  const bool square = y.lo == 2 && y.hi == 2;
  if (square) {
    const Interval a = bounds::absolute(x);
    return widened(a.lo * a.lo, a.hi * a.hi, nan, 0);
  }
  return bounds::unbounded(true);
}

Interval increasing(Op op, const Interval& x, double least, double most) {
  return widened(apply_op(op, x.lo, 0, 0), apply_op(op, x.hi, 0, 0), x.nan, least, most);
}

}  // namespace

Interval apply_interval(Op op, const Interval& x, const Interval& y, bool integers) {
  switch (op) {
    case Op::exp:
      return increasing(op, x, 0, infinity);
    case Op::tanh:
      return increasing(op, x, -1, 1);
    case Op::sigmoid:
      return increasing(op, x, 0, 1);
    case Op::softplus:
      return increasing(op, x, 0, infinity);
    case Op::log:
    case Op::sqrt:
      return rooted(op, x);
    case Op::pow:
      return power(x, y);
    default:
      return bounds::arithmetic(op, x, y, integers);
  }
}

}  // namespace flexchat::flex
