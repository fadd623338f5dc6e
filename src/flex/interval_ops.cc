// Each function returns bounds of op(x, y) over all values in x and y as apply_op (flex/expr.h) computes
// them.
#include "flex/interval_ops.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "base/error.h"

namespace flexchat::flex {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

bool contains(const Interval& x, double value) { return x.lo <= value && value <= x.hi; }
bool infinite(const Interval& x) { return std::isinf(x.lo) || std::isinf(x.hi); }

// For functions that the C library rounds almost, but not always, to nearest: outwards by a few ulps, within
// the function's own bounds.
Interval widened(double lo, double hi, bool nan, double least = -infinity, double most = infinity) {
  constexpr double slack = 8 * std::numeric_limits<double>::epsilon();
  constexpr double tiny = std::numeric_limits<double>::min();
  return {std::max(least, lo - std::abs(lo) * slack - tiny), std::min(most, hi + std::abs(hi) * slack + tiny),
          nan};
}

Interval corners(const std::array<double, 4>& v, bool nan) {
  Interval result{infinity, -infinity, nan};
  for (const double x : v) {
    if (std::isnan(x)) return unbounded(true);
    result.lo = std::min(result.lo, x);
    result.hi = std::max(result.hi, x);
  }
  return result;
}

Interval product(const Interval& x, const Interval& y, bool integers) {
  const bool nan = x.nan || y.nan;
  if (!integers && ((contains(x, 0) && infinite(y)) || (contains(y, 0) && infinite(x))))
    return unbounded(true);
  const auto times = [](double a, double b) { return a == 0 || b == 0 ? 0 : a * b; };
  return corners({times(x.lo, y.lo), times(x.lo, y.hi), times(x.hi, y.lo), times(x.hi, y.hi)}, nan);
}

Interval quotient(const Interval& x, const Interval& y) {
  if (contains(y, 0)) return unbounded(true);
  if (infinite(x) && infinite(y)) return unbounded(true);
  return corners({x.lo / y.lo, x.lo / y.hi, x.hi / y.lo, x.hi / y.hi}, x.nan || y.nan);
}

// The parts of an integer divisor on either side of zero, and zero itself.
struct Divisor {
  Interval negative, positive;
  bool has_negative, has_positive, has_zero;
  explicit Divisor(const Interval& y)
      : negative{y.lo, std::min(y.hi, -1.0)},
        positive{std::max(y.lo, 1.0), y.hi},
        has_negative(y.lo <= -1),
        has_positive(y.hi >= 1),
        has_zero(contains(y, 0)) {}
};

Interval floor_quotient(const Interval& x, const Interval& y) {
  if (infinite(x)) return unbounded(false);
  const Divisor d(y);
  Interval result{infinity, -infinity};
  const auto add = [&](const Interval& part) {
    const Interval q = corners({x.lo / part.lo, x.lo / part.hi, x.hi / part.lo, x.hi / part.hi}, false);
    result = hull(result, {std::floor(q.lo), std::floor(q.hi)});
    // x / -inf is -0 but the quotient of a large finite divisor floors to -1.
    if (infinite(part) && (x.lo < 0 || x.hi > 0)) result = hull(result, {-1, 0});
  };
  if (d.has_negative) add(d.negative);
  if (d.has_positive) add(d.positive);
  if (d.has_zero) result = hull(result, {0, 0});
  return result;
}

Interval remainder(const Interval& x, const Interval& y) {
  // One known divisor and one period: the remainder just shifts.
  if (y.lo == y.hi && y.lo != 0 && !infinite(x) && std::floor(x.lo / y.lo) == std::floor(x.hi / y.lo)) {
    const double shift = y.lo * std::floor(x.lo / y.lo);
    return {x.lo - shift, x.hi - shift};
  }
  const Divisor d(y);
  Interval result{infinity, -infinity};
  if (d.has_positive) {
    // Within [0, divisor) the remainder is x itself.
    const bool unchanged = x.lo >= 0 && x.hi < d.positive.lo;
    result = hull(result, unchanged ? x : Interval{0, d.positive.hi - 1});
  }
  if (d.has_negative) result = hull(result, {d.negative.lo + 1, 0});
  return d.has_zero ? hull(result, x) : result;
}

// fmin and fmax: a NaN operand yields the other one.
Interval extremum(const Interval& x, const Interval& y, double (*pick)(double, double)) {
  Interval result{pick(x.lo, y.lo), pick(x.hi, y.hi), x.nan && y.nan};
  if (x.nan) result = {std::min(result.lo, y.lo), std::max(result.hi, y.hi), result.nan};
  if (y.nan) result = {std::min(result.lo, x.lo), std::max(result.hi, x.hi), result.nan};
  return result;
}

Interval absolute(const Interval& x) {
  const double most = std::max(std::abs(x.lo), std::abs(x.hi));
  return {contains(x, 0) ? 0 : std::min(std::abs(x.lo), std::abs(x.hi)), most, x.nan};
}

// The part of x where log and sqrt are defined; NaN beyond it.
Interval rooted(Op op, const Interval& x) {
  if (x.hi < 0) return unbounded(true);
  const auto f = [op](double v) { return apply_op(op, std::max(v, 0.0), 0, 0); };
  return widened(f(x.lo), f(x.hi), x.nan || x.lo < 0, op == Op::sqrt ? 0 : -infinity);
}

Interval power(const Interval& x, const Interval& y) {
  const bool nan = x.nan || y.nan;
  // On a positive base pow is monotone in each operand, so its extremes are at the corners.
  const auto positive = [&](double lo, double hi) {
    const Interval c =
        corners({std::pow(lo, y.lo), std::pow(lo, y.hi), std::pow(hi, y.lo), std::pow(hi, y.hi)}, nan);
    return widened(c.lo, c.hi, c.nan, 0);
  };
  if (x.lo > 0 && !infinite(x) && !infinite(y)) return positive(x.lo, x.hi);
  const bool square = y.lo == 2 && y.hi == 2;
  if (square) {
    const Interval a = absolute(x);
    return widened(a.lo * a.lo, a.hi * a.hi, nan, 0);
  }
  return unbounded(true);
}

Interval increasing(Op op, const Interval& x, double least, double most) {
  return widened(apply_op(op, x.lo, 0, 0), apply_op(op, x.hi, 0, 0), x.nan, least, most);
}

}  // namespace

Interval unbounded(bool nan) { return {-infinity, infinity, nan}; }

Interval hull(const Interval& x, const Interval& y) {
  return {std::min(x.lo, y.lo), std::max(x.hi, y.hi), x.nan || y.nan};
}

Interval apply_interval(Op op, const Interval& x, const Interval& y, bool integers) {
  const auto sum = [&](double lo, double hi) {
    if (std::isnan(lo) || std::isnan(hi)) return unbounded(!integers);
    // Numbers: inf - inf may happen inside the box even when the bounds do not show it.
    return Interval{lo, hi, x.nan || y.nan || (!integers && infinite(x) && infinite(y))};
  };
  switch (op) {
    case Op::add:
      return sum(x.lo + y.lo, x.hi + y.hi);
    case Op::sub:
      return sum(x.lo - y.hi, x.hi - y.lo);
    case Op::mul:
      return product(x, y, integers);
    case Op::div:
      return quotient(x, y);
    case Op::floor_div:
      return floor_quotient(x, y);
    case Op::mod:
      return remainder(x, y);
    case Op::neg:
      return {-x.hi, -x.lo, x.nan};
    case Op::min:
      return extremum(x, y, std::fmin);
    case Op::max:
      return extremum(x, y, std::fmax);
    case Op::abs:
      return absolute(x);
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
      fail("'{}' has no interval rule of its own", op_name(op));
  }
}

}  // namespace flexchat::flex
