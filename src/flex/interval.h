// Interval analysis: what values can an expression take over a whole box of positions?
//
// A box is one batch row b, one head h, and ranges of q and kv. For every node the analysis computes an
// interval that contains each value the node takes in the box. For a mask this answers, without looking at
// a single element: always false (skip the block), always true (attend without evaluating the mask) or mixed.
//
// Plain intervals forget that the two q in `q - kv < w && kv <= q` are the same. So an integer node is
//   a*q + c*kv + rest,   rest in [lo, hi],
// and its range is taken only when a nonlinear operator needs it. Comparisons subtract the two linear forms
// first, so the diagonals of causal and window masks come out exactly. Captured tensors contribute their
// minimum and maximum over the box (flex/range_table.h).
//
// Sound, always: a verdict of false or true is right for every element. (Rounding is monotone, so bounds
// computed in double hold for values computed in double; bounds of exp, log and the like are widened by a few
// ulps. A kernel that evaluates floating-point conditions in f32 may round a tie the other way; conditions on
// integers are the same everywhere.) The verdict `mixed` may be too cautious, since operands of && and || are
// bounded one at a time. It is exact for causal, window, document with sorted ids, prefix-LM, padding, and
// causal with any of the others.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "flex/bindings.h"
#include "flex/program.h"
#include "flex/range_table.h"

namespace flexchat::flex {

enum class Truth : uint8_t { never, always, mixed };

// Positions first..last, both included.
struct Box {
  int64_t q_first, q_last, kv_first, kv_last;
};

class IntervalAnalysis {
 public:
  IntervalAnalysis(const Expr& expr, const Bindings& bindings);

  // The row that following calls are about; to be called before them. Errors: as range().
  void set_row(int64_t b, int64_t h, int64_t n_q, int64_t n_kv);

  // Bounds of the expression over the box; booleans are 0 and 1. `score` is unbounded. Errors: an index that
  // may leave its captured tensor somewhere in the box.
  Interval range(const Box& box);
  Truth truth(const Box& box);

 private:
  // The linear form of a node over the present box, with its range.
  struct Bound {
    double q = 0, kv = 0;  // coefficients; zero unless the node is an integer
    Interval rest;
    Interval range;
  };
  // The range table of one 1-D slice of a captured tensor.
  struct Slice {
    int capture, axis;
    int64_t offset;
    RangeTable table;
  };

  void update(size_t i);  // bounds_[i]
  Bound bound(const Instruction& in) const;
  Bound linear(double q, double kv, Interval rest) const;
  Bound difference(const Bound& x, const Bound& y) const;
  Bound compare(const Instruction& in, const Bound& x, const Bound& y) const;
  Bound choose(const Instruction& in, const Bound& c, const Bound& x, const Bound& y) const;
  Bound integer_product(const Bound& x, const Bound& y) const;
  Interval variable(Var var) const;
  Interval capture(const Instruction& in);
  const RangeTable& table(const Instruction& in, int axis, int64_t offset, int64_t stride);

  Program program_;
  std::vector<Tensor> tensors_;  // of program_.captures
  std::vector<Bound> bounds_;    // of program_.code
  // Instructions that depend on q or kv, evaluated for each box, and the others, evaluated once a row.
  std::vector<size_t> moving_, still_;
  std::deque<Slice> slices_;  // recently used tables
  Box box_{};
  int64_t b_ = 0, h_ = 0, n_q_ = 0, n_kv_ = 0;
};

}  // namespace flexchat::flex
