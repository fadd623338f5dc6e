// Bounds of every node over a box, one pass over the straight-line program.
#include "flex/interval.h"

#include <cmath>
#include <limits>

#include "base/error.h"
#include "flex/interval_ops.h"

namespace flexchat::flex {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr int64_t max_scan = 65536;  // elements of a captured tensor looked at for one box
constexpr size_t max_slices = 16;

Interval truth_interval(bool can_be_false, bool can_be_true) {
  return {can_be_false ? 0.0 : 1.0, can_be_true ? 1.0 : 0.0};
}

// coefficient * position over first..last
Interval scaled(double coefficient, int64_t first, int64_t last) {
  const double x = coefficient * static_cast<double>(first), y = coefficient * static_cast<double>(last);
  return {std::min(x, y), std::max(x, y)};
}

// Sums of integers cannot meet inf - inf: an unknown lower bound is -inf, an upper one inf.
Interval plus(const Interval& x, const Interval& y) { return {x.lo + y.lo, x.hi + y.hi}; }
Interval minus(const Interval& x, const Interval& y) { return {x.lo - y.hi, x.hi - y.lo}; }

// Does `x op 0` hold for some, and fail for some, value of x?
Interval compare_with_zero(Op op, const Interval& x) {
  switch (op) {
    case Op::lt:
      return truth_interval(x.hi >= 0 || x.nan, x.lo < 0);
    case Op::le:
      return truth_interval(x.hi > 0 || x.nan, x.lo <= 0);
    case Op::eq:
      return truth_interval(x.lo != 0 || x.hi != 0 || x.nan, x.lo <= 0 && 0 <= x.hi);
    case Op::ne:
      return truth_interval(x.lo <= 0 && 0 <= x.hi, x.lo != 0 || x.hi != 0 || x.nan);
    default:
      fail("'{}' is no comparison", op_name(op));
  }
}

// The same for two numbers, which need not be finite.
Interval compare_numbers(Op op, const Interval& x, const Interval& y) {
  const bool nan = x.nan || y.nan;
  const bool overlap = x.lo <= y.hi && y.lo <= x.hi;
  const bool one_value = x.lo == x.hi && y.lo == y.hi && x.lo == y.lo;
  switch (op) {
    case Op::lt:
      return truth_interval(x.hi >= y.lo || nan, x.lo < y.hi);
    case Op::le:
      return truth_interval(x.hi > y.lo || nan, x.lo <= y.hi);
    case Op::eq:
      return truth_interval(!one_value || nan, overlap);
    default:
      return truth_interval(overlap, !one_value || nan);
  }
}

}  // namespace

IntervalAnalysis::IntervalAnalysis(const Expr& expr, const Bindings& bindings) : program_({expr}) {
  for (const Capture& capture : program_.captures) tensors_.push_back(bindings.at(capture));
  const size_t n = program_.code.size();
  bounds_.resize(n);
  std::vector<bool> moves(n);
  for (size_t i = 0; i < n; ++i) {
    const Instruction& in = program_.code[i];
    moves[i] = in.op == Op::variable && (in.var == Var::q || in.var == Var::kv);
    for (size_t k = 0; k < static_cast<size_t>(in.n_args); ++k) {
      if (moves[static_cast<size_t>(in.args[k])]) moves[i] = true;
    }
    (moves[i] ? moving_ : still_).push_back(i);
  }
}

void IntervalAnalysis::set_row(int64_t b, int64_t h, int64_t n_q, int64_t n_kv) {
  b_ = b;
  h_ = h;
  n_q_ = n_q;
  n_kv_ = n_kv;
  for (const size_t i : still_) update(i);
}

void IntervalAnalysis::update(size_t i) {
  const Instruction& in = program_.code[i];
  bounds_[i] = in.op == Op::capture ? linear(0, 0, capture(in)) : bound(in);
}

Interval IntervalAnalysis::range(const Box& box) {
  box_ = box;
  for (const size_t i : moving_) update(i);
  return bounds_[static_cast<size_t>(program_.roots.front())].range;
}

Truth IntervalAnalysis::truth(const Box& box) {
  const Interval r = range(box);
  if (r.hi == 0) return Truth::never;
  return r.lo == 1 ? Truth::always : Truth::mixed;
}

IntervalAnalysis::Bound IntervalAnalysis::linear(double q, double kv, Interval rest) const {
  if (q == 0 && kv == 0) return {0, 0, rest, rest};
  const Interval by_q = scaled(q, box_.q_first, box_.q_last), by_kv = scaled(kv, box_.kv_first, box_.kv_last);
  return {q, kv, rest, {rest.lo + by_q.lo + by_kv.lo, rest.hi + by_q.hi + by_kv.hi, rest.nan}};
}

IntervalAnalysis::Bound IntervalAnalysis::difference(const Bound& x, const Bound& y) const {
  return linear(x.q - y.q, x.kv - y.kv, minus(x.rest, y.rest));
}

// A product stays linear when one factor has a single value over the box.
IntervalAnalysis::Bound IntervalAnalysis::integer_product(const Bound& x, const Bound& y) const {
  const auto single = [](const Bound& v) { return v.range.lo == v.range.hi && std::isfinite(v.range.lo); };
  if (!single(x) && !single(y)) return linear(0, 0, apply_interval(Op::mul, x.range, y.range, true));
  const Bound& form = single(y) ? x : y;
  const double factor = single(y) ? y.range.lo : x.range.lo;
  return linear(factor * form.q, factor * form.kv,
                apply_interval(Op::mul, form.rest, {factor, factor}, true));
}

IntervalAnalysis::Bound IntervalAnalysis::compare(const Instruction& in, const Bound& x,
                                                  const Bound& y) const {
  const bool integers = program_.code[static_cast<size_t>(in.args[0])].type == Type::integer &&
                        program_.code[static_cast<size_t>(in.args[1])].type == Type::integer;
  return linear(
      0, 0,
      integers ? compare_with_zero(in.op, difference(x, y).range) : compare_numbers(in.op, x.range, y.range));
}

IntervalAnalysis::Bound IntervalAnalysis::choose(const Instruction& in, const Bound& c, const Bound& x,
                                                 const Bound& y) const {
  const bool decided = c.range.lo == c.range.hi;
  if (decided) {
    const Bound& chosen = c.range.lo == 1 ? x : y;
    // An integer branch of a number-valued choice gives up its linear form: numbers may round.
    return in.type == Type::integer ? chosen : linear(0, 0, chosen.range);
  }
  if (in.type == Type::integer && x.q == y.q && x.kv == y.kv) return linear(x.q, x.kv, hull(x.rest, y.rest));
  return linear(0, 0, hull(x.range, y.range));
}

IntervalAnalysis::Bound IntervalAnalysis::bound(const Instruction& in) const {
  const auto arg = [&](size_t i) -> const Bound& { return bounds_[static_cast<size_t>(in.args[i])]; };
  switch (in.op) {
    case Op::constant:
      return linear(0, 0, {in.value, in.value});
    case Op::variable:
      if (in.var == Var::q) return linear(1, 0, {0, 0});
      if (in.var == Var::kv) return linear(0, 1, {0, 0});
      return linear(0, 0, variable(in.var));
    case Op::lt:
    case Op::le:
    case Op::eq:
    case Op::ne:
      return compare(in, arg(0), arg(1));
    case Op::logical_and:
      return linear(0, 0,
                    {std::min(arg(0).range.lo, arg(1).range.lo), std::min(arg(0).range.hi, arg(1).range.hi)});
    case Op::logical_or:
      return linear(0, 0,
                    {std::max(arg(0).range.lo, arg(1).range.lo), std::max(arg(0).range.hi, arg(1).range.hi)});
    case Op::logical_not:
      return linear(0, 0, {1 - arg(0).range.hi, 1 - arg(0).range.lo});
    case Op::where:
      return choose(in, arg(0), arg(1), arg(2));
    default:
      break;
  }
  const bool integers = in.type == Type::integer;
  if (integers && in.op == Op::add) {
    const Bound &x = arg(0), &y = arg(1);
    return linear(x.q + y.q, x.kv + y.kv, plus(x.rest, y.rest));
  }
  if (integers && in.op == Op::sub) return difference(arg(0), arg(1));
  if (integers && in.op == Op::neg) {
    return linear(-arg(0).q, -arg(0).kv, minus({0, 0}, arg(0).rest));
  }
  if (integers && in.op == Op::mul) return integer_product(arg(0), arg(1));
  return linear(0, 0,
                apply_interval(in.op, arg(0).range, in.n_args > 1 ? arg(1).range : Interval{}, integers));
}

Interval IntervalAnalysis::variable(Var var) const {
  const auto exactly = [](int64_t x) { return Interval{static_cast<double>(x), static_cast<double>(x)}; };
  switch (var) {
    case Var::b:
      return exactly(b_);
    case Var::h:
      return exactly(h_);
    case Var::n_q:
      return exactly(n_q_);
    case Var::n_kv:
      return exactly(n_kv_);
    default:
      return unbounded(true);
  }
}

const RangeTable& IntervalAnalysis::table(const Instruction& in, int axis, int64_t offset, int64_t stride) {
  for (const Slice& slice : slices_) {
    if (slice.capture == in.capture && slice.axis == axis && slice.offset == offset) return slice.table;
  }
  if (slices_.size() == max_slices) slices_.pop_front();
  const Tensor& tensor = tensors_[static_cast<size_t>(in.capture)];
  slices_.push_back({in.capture, axis, offset, RangeTable(tensor, offset, stride, tensor.dim(axis))});
  return slices_.back().table;
}

Interval IntervalAnalysis::capture(const Instruction& in) {
  const Tensor& tensor = tensors_[static_cast<size_t>(in.capture)];
  std::array<int64_t, 4> first{}, count{}, stride{};
  int64_t elements = 1, offset = 0, step = 1;
  int varying = -1, n_varying = 0;
  for (int axis = in.n_args - 1; axis >= 0; --axis) {
    const auto a = static_cast<size_t>(axis);
    const Interval& index = bounds_[static_cast<size_t>(in.args[a])].range;
    if (!(index.lo >= 0 && index.hi < static_cast<double>(tensor.dim(axis)))) {
      fail("captured tensor {}: the index of axis {} may be {} to {}, outside [0, {})",
           program_.captures[static_cast<size_t>(in.capture)].signature(), axis + 1, index.lo, index.hi,
           tensor.dim(axis));
    }
    first[a] = static_cast<int64_t>(index.lo);
    count[a] = static_cast<int64_t>(index.hi) - first[a] + 1;
    stride[a] = step;
    if (count[a] > 1) {
      varying = axis;
      ++n_varying;
    } else {
      offset += first[a] * step;
    }
    elements *= count[a];
    step *= tensor.dim(axis);
  }
  const auto single = [](double x) { return std::isnan(x) ? unbounded(true) : Interval{x, x}; };
  if (n_varying == 0) return single(tensor.get(offset));
  const auto v = static_cast<size_t>(varying);
  if (n_varying == 1) return table(in, varying, offset, stride[v]).range(first[v], first[v] + count[v] - 1);
  if (elements > max_scan) return unbounded(in.type == Type::number);
  // Several axes vary, as in bias[q,kv]: look at the elements, like an odometer.
  Interval result{infinity, -infinity};
  std::array<int64_t, 4> at{};
  for (int64_t i = 0; i < elements; ++i) {
    int64_t place = 0;
    for (size_t a = 0; a < 4; ++a) place += (first[a] + at[a]) * stride[a];
    result = hull(result, single(tensor.get(place)));
    for (size_t a = 4; a-- > 0;) {
      if (++at[a] < count[a]) break;
      at[a] = 0;
    }
  }
  return result;
}

}  // namespace flexchat::flex
