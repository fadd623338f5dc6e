// What interval analysis (flex/interval.h) knows of a node over a box of positions, and how operators combine
// it. For host and device: a block is classified alike by both.
//
// An integer node is a*q + c*kv + rest, rest in [lo, hi]: comparisons subtract such forms, so that the
// diagonals of causal and window masks come out exactly. Numbers have their range alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "flex/expr.h"

#ifdef __CUDACC__
#define FLEXCHAT_HOST_DEVICE __host__ __device__
#else
#define FLEXCHAT_HOST_DEVICE
#endif

namespace flexchat::flex {

// All values x with lo <= x <= hi; with `nan`, possibly also NaN.
struct Interval {
  double lo, hi;
  bool nan = false;
};

// Positions first..last, both included.
struct Box {
  int64_t q_first, q_last, kv_first, kv_last;
};

// The linear form of a node over a box, with its range.
struct Bound {
  double q = 0, kv = 0;  // coefficients; zero unless the node is an integer
  Interval rest;
  Interval range;
};

enum class Truth : uint8_t { never, always, mixed };

namespace bounds {

constexpr double infinity = std::numeric_limits<double>::infinity();

// ---- intervals ------------------------------------------------------------------------------------------

FLEXCHAT_HOST_DEVICE inline Interval unbounded(bool nan) { return {-infinity, infinity, nan}; }
FLEXCHAT_HOST_DEVICE inline Interval exactly(double x) { return {x, x}; }
FLEXCHAT_HOST_DEVICE inline Interval hull(const Interval& x, const Interval& y) {
  return {std::min(x.lo, y.lo), std::max(x.hi, y.hi), x.nan || y.nan};
}
FLEXCHAT_HOST_DEVICE inline bool contains(const Interval& x, double value) {
  return x.lo <= value && value <= x.hi;
}
FLEXCHAT_HOST_DEVICE inline bool infinite(const Interval& x) {
  return std::abs(x.lo) == infinity || std::abs(x.hi) == infinity;
}
FLEXCHAT_HOST_DEVICE inline Interval truths(bool can_be_false, bool can_be_true) {
  return {can_be_false ? 0.0 : 1.0, can_be_true ? 1.0 : 0.0};
}

FLEXCHAT_HOST_DEVICE inline Interval corners(double a, double b, double c, double d, bool nan) {
  if (a != a || b != b || c != c || d != d) return unbounded(true);
  return {std::min(std::min(a, b), std::min(c, d)), std::max(std::max(a, b), std::max(c, d)), nan};
}

FLEXCHAT_HOST_DEVICE inline Interval sum(double lo, double hi, const Interval& x, const Interval& y,
                                         bool integers) {
  if (lo != lo || hi != hi) return unbounded(!integers);
  // Numbers: inf - inf may happen inside the box even when the bounds do not show it.
  return {lo, hi, x.nan || y.nan || (!integers && infinite(x) && infinite(y))};
}

FLEXCHAT_HOST_DEVICE inline double times(double a, double b) { return a == 0 || b == 0 ? 0 : a * b; }
FLEXCHAT_HOST_DEVICE inline Interval product(const Interval& x, const Interval& y, bool integers) {
  if (!integers && ((contains(x, 0) && infinite(y)) || (contains(y, 0) && infinite(x))))
    return unbounded(true);
  return corners(times(x.lo, y.lo), times(x.lo, y.hi), times(x.hi, y.lo), times(x.hi, y.hi), x.nan || y.nan);
}

FLEXCHAT_HOST_DEVICE inline Interval quotient(const Interval& x, const Interval& y) {
  if (contains(y, 0) || (infinite(x) && infinite(y))) return unbounded(true);
  return corners(x.lo / y.lo, x.lo / y.hi, x.hi / y.lo, x.hi / y.hi, x.nan || y.nan);
}

// Integer division by a divisor of one sign.
FLEXCHAT_HOST_DEVICE inline Interval floor_quotient_by(const Interval& x, const Interval& y) {
  const Interval q = corners(x.lo / y.lo, x.lo / y.hi, x.hi / y.lo, x.hi / y.hi, false);
  const Interval whole = {std::floor(q.lo), std::floor(q.hi)};
  // x / -inf is -0 but the quotient of a large finite divisor floors to -1.
  return infinite(y) && (x.lo < 0 || x.hi > 0) ? hull(whole, {-1, 0}) : whole;
}

// The parts of an integer divisor on either side of zero are taken one by one; by zero the quotient is 0.
FLEXCHAT_HOST_DEVICE inline Interval floor_quotient(const Interval& x, const Interval& y) {
  if (infinite(x)) return unbounded(false);
  Interval result{infinity, -infinity};
  if (y.lo <= -1) result = hull(result, floor_quotient_by(x, {y.lo, std::min(y.hi, -1.0)}));
  if (y.hi >= 1) result = hull(result, floor_quotient_by(x, {std::max(y.lo, 1.0), y.hi}));
  return contains(y, 0) ? hull(result, {0, 0}) : result;
}

FLEXCHAT_HOST_DEVICE inline Interval remainder(const Interval& x, const Interval& y) {
  // One known divisor and one period: the remainder just shifts.
  if (y.lo == y.hi && y.lo != 0 && !infinite(x) && std::floor(x.lo / y.lo) == std::floor(x.hi / y.lo)) {
    const double shift = y.lo * std::floor(x.lo / y.lo);
    return {x.lo - shift, x.hi - shift};
  }
  Interval result{infinity, -infinity};
  if (y.hi >= 1) {
    // Within [0, divisor) the remainder is x itself.
    const bool unchanged = x.lo >= 0 && x.hi < std::max(y.lo, 1.0);
    result = hull(result, unchanged ? x : Interval{0, y.hi - 1});
  }
  if (y.lo <= -1) result = hull(result, {y.lo + 1, 0});
  return contains(y, 0) ? hull(result, x) : result;  // x % 0 is x
}

// fmin and fmax: a NaN operand yields the other one.
FLEXCHAT_HOST_DEVICE inline Interval extremum(bool least, const Interval& x, const Interval& y) {
  Interval r = least ? Interval{std::fmin(x.lo, y.lo), std::fmin(x.hi, y.hi), x.nan && y.nan}
                     : Interval{std::fmax(x.lo, y.lo), std::fmax(x.hi, y.hi), x.nan && y.nan};
  if (x.nan) r = {std::min(r.lo, y.lo), std::max(r.hi, y.hi), r.nan};
  if (y.nan) r = {std::min(r.lo, x.lo), std::max(r.hi, x.hi), r.nan};
  return r;
}

FLEXCHAT_HOST_DEVICE inline Interval absolute(const Interval& x) {
  const double a = std::abs(x.lo), b = std::abs(x.hi);
  return {contains(x, 0) ? 0 : std::min(a, b), std::max(a, b), x.nan};
}

// Does `x op 0` hold for some, and fail for some, value of x?
FLEXCHAT_HOST_DEVICE inline Interval compare_with_zero(Op op, const Interval& x) {
  if (op == Op::lt) return truths(x.hi >= 0 || x.nan, x.lo < 0);
  if (op == Op::le) return truths(x.hi > 0 || x.nan, x.lo <= 0);
  const bool can_be_zero = contains(x, 0), can_be_other = x.lo != 0 || x.hi != 0 || x.nan;
  return op == Op::eq ? truths(can_be_other, can_be_zero) : truths(can_be_zero, can_be_other);
}

// The same for two numbers, which need not be finite.
FLEXCHAT_HOST_DEVICE inline Interval compare_numbers(Op op, const Interval& x, const Interval& y) {
  const bool nan = x.nan || y.nan;
  if (op == Op::lt) return truths(x.hi >= y.lo || nan, x.lo < y.hi);
  if (op == Op::le) return truths(x.hi > y.lo || nan, x.lo <= y.hi);
  const bool can_be_equal = x.lo <= y.hi && y.lo <= x.hi;
  const bool can_differ = !(x.lo == x.hi && y.lo == y.hi && x.lo == y.lo) || nan;
  return op == Op::eq ? truths(can_differ, can_be_equal) : truths(can_be_equal, can_differ);
}

// Every arithmetic operator that needs no function of the C library. With `integers`, operands are integers:
// an infinite bound then means "unknown", never the value infinity.
FLEXCHAT_HOST_DEVICE inline Interval arithmetic(Op op, const Interval& x, const Interval& y, bool integers) {
  switch (op) {
    case Op::add:
      return sum(x.lo + y.lo, x.hi + y.hi, x, y, integers);
    case Op::sub:
      return sum(x.lo - y.hi, x.hi - y.lo, x, y, integers);
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
    case Op::max:
      return extremum(op == Op::min, x, y);
    case Op::abs:
      return absolute(x);
    default:
      return unbounded(true);
  }
}

// ---- linear forms ---------------------------------------------------------------------------------------

// coefficient * position over first..last
FLEXCHAT_HOST_DEVICE inline Interval scaled(double coefficient, int64_t first, int64_t last) {
  const double x = coefficient * static_cast<double>(first), y = coefficient * static_cast<double>(last);
  return {std::min(x, y), std::max(x, y)};
}

// Sums of integers cannot meet inf - inf: an unknown lower bound is -inf, an upper one inf.
FLEXCHAT_HOST_DEVICE inline Interval plus(const Interval& x, const Interval& y) {
  return {x.lo + y.lo, x.hi + y.hi};
}
FLEXCHAT_HOST_DEVICE inline Interval minus(const Interval& x, const Interval& y) {
  return {x.lo - y.hi, x.hi - y.lo};
}

FLEXCHAT_HOST_DEVICE inline Bound ranged(const Interval& range) { return {0, 0, range, range}; }
FLEXCHAT_HOST_DEVICE inline Bound linear(const Box& box, double q, double kv, const Interval& rest) {
  if (q == 0 && kv == 0) return ranged(rest);
  const Interval by_q = scaled(q, box.q_first, box.q_last), by_kv = scaled(kv, box.kv_first, box.kv_last);
  return {q, kv, rest, {rest.lo + by_q.lo + by_kv.lo, rest.hi + by_q.hi + by_kv.hi, rest.nan}};
}
FLEXCHAT_HOST_DEVICE inline Bound difference(const Box& box, const Bound& x, const Bound& y) {
  return linear(box, x.q - y.q, x.kv - y.kv, minus(x.rest, y.rest));
}

FLEXCHAT_HOST_DEVICE inline bool single(const Bound& v) {
  return v.range.lo == v.range.hi && std::abs(v.range.lo) != infinity;
}
// A product stays linear when one factor has a single value over the box.
FLEXCHAT_HOST_DEVICE inline Bound integer_product(const Box& box, const Bound& x, const Bound& y) {
  if (!single(x) && !single(y)) return ranged(product(x.range, y.range, true));
  const Bound& form = single(y) ? x : y;
  const double factor = single(y) ? y.range.lo : x.range.lo;
  return linear(box, factor * form.q, factor * form.kv, product(form.rest, exactly(factor), true));
}

FLEXCHAT_HOST_DEVICE inline Bound choose(const Box& box, bool integers, const Bound& c, const Bound& x,
                                         const Bound& y) {
  if (c.range.lo == c.range.hi) {
    const Bound& chosen = c.range.lo == 1 ? x : y;
    // An integer branch of a number-valued choice gives up its linear form: numbers may round.
    return integers ? chosen : ranged(chosen.range);
  }
  if (integers && x.q == y.q && x.kv == y.kv) return linear(box, x.q, x.kv, hull(x.rest, y.rest));
  return ranged(hull(x.range, y.range));
}

// Every operator on bounds but leaves and functions of the C library. `integers`: the node is an integer;
// `of_integers`: so are both operands.
FLEXCHAT_HOST_DEVICE inline Bound combine(const Box& box, Op op, bool integers, bool of_integers,
                                          const Bound& x, const Bound& y, const Bound& z) {
  switch (op) {
    case Op::lt:
    case Op::le:
    case Op::eq:
    case Op::ne:
      return ranged(of_integers ? compare_with_zero(op, difference(box, x, y).range)
                                : compare_numbers(op, x.range, y.range));
    case Op::logical_and:
      return ranged({std::min(x.range.lo, y.range.lo), std::min(x.range.hi, y.range.hi)});
    case Op::logical_or:
      return ranged({std::max(x.range.lo, y.range.lo), std::max(x.range.hi, y.range.hi)});
    case Op::logical_not:
      return ranged({1 - x.range.hi, 1 - x.range.lo});
    case Op::where:
      return choose(box, integers, x, y, z);
    case Op::add:
      if (integers) return linear(box, x.q + y.q, x.kv + y.kv, plus(x.rest, y.rest));
      break;
    case Op::sub:
      if (integers) return difference(box, x, y);
      break;
    case Op::neg:
      if (integers) return linear(box, -x.q, -x.kv, minus(exactly(0), x.rest));
      break;
    case Op::mul:
      if (integers) return integer_product(box, x, y);
      break;
    default:
      break;
  }
  return ranged(arithmetic(op, x.range, y.range, integers));
}

FLEXCHAT_HOST_DEVICE inline Truth truth(const Interval& x) {
  return x.hi == 0 ? Truth::never : x.lo == 1 ? Truth::always : Truth::mixed;
}

}  // namespace bounds

// Has the operator's rule a place in `combine`, or does it need the C library (flex/interval_ops.h)?
FLEXCHAT_HOST_DEVICE constexpr bool needs_library(Op op) { return op >= Op::exp; }

}  // namespace flexchat::flex
