// Bounds of every node over a box, one pass over the straight-line program.
#include "flex/interval.h"

#include <cmath>
#include <limits>

#include "base/error.h"
#include "flex/interval_ops.h"

namespace flexchat::flex {
namespace {

constexpr int64_t max_scan = 65536;  // elements of a captured tensor looked at for one box
constexpr size_t max_slices = 16;

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
  bounds_[i] = in.op == Op::capture ? bounds::ranged(capture(in)) : bound(in);
}

Interval IntervalAnalysis::range(const Box& box) {
  box_ = box;
  for (const size_t i : moving_) update(i);
  return bounds_[static_cast<size_t>(program_.roots.front())].range;
}

Truth IntervalAnalysis::truth(const Box& box) { return bounds::truth(range(box)); }

Bound IntervalAnalysis::bound(const Instruction& in) const {
  const auto at = [&](size_t i) { return static_cast<size_t>(in.args[i]); };
  const auto arg = [&](size_t i) -> const Bound& {  // the first in place of those there are not
    return bounds_[at(i < static_cast<size_t>(in.n_args) ? i : 0)];
  };
  if (in.op == Op::constant) return bounds::ranged(bounds::exactly(in.value));
  if (in.op == Op::variable) {
    if (in.var == Var::q) return bounds::linear(box_, 1, 0, {0, 0});
    if (in.var == Var::kv) return bounds::linear(box_, 0, 1, {0, 0});
    return bounds::ranged(variable(in.var));
  }
  const bool integers = in.type == Type::integer;
  if (needs_library(in.op))
    return bounds::ranged(apply_interval(in.op, arg(0).range, arg(1).range, integers));
  bool of_integers = true;
  for (size_t i = 0; i < static_cast<size_t>(in.n_args); ++i)
    of_integers = of_integers && program_.code[at(i)].type == Type::integer;
  return bounds::combine(box_, in.op, integers, of_integers, arg(0), arg(1), arg(2));
}

Interval IntervalAnalysis::variable(Var var) const {
  const auto exactly = [](int64_t x) { return bounds::exactly(static_cast<double>(x)); };
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
      return bounds::unbounded(true);
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
  const auto single = [](double x) { return std::isnan(x) ? bounds::unbounded(true) : bounds::exactly(x); };
  if (n_varying == 0) return single(tensor.get(offset));
  const auto v = static_cast<size_t>(varying);
  if (n_varying == 1) return table(in, varying, offset, stride[v]).range(first[v], first[v] + count[v] - 1);
  if (elements > max_scan) return bounds::unbounded(in.type == Type::number);
  // Several axes vary, as in bias[q,kv]: look at the elements, like an odometer.
  Interval result{bounds::infinity, -bounds::infinity};
  std::array<int64_t, 4> at{};
  for (int64_t i = 0; i < elements; ++i) {
    int64_t place = 0;
    for (size_t a = 0; a < 4; ++a) place += (first[a] + at[a]) * stride[a];
    result = bounds::hull(result, single(tensor.get(place)));
    for (size_t a = 4; a-- > 0;) {
      if (++at[a] < count[a]) break;
      at[a] = 0;
    }
  }
  return result;
}

}  // namespace flexchat::flex
