// Interval arithmetic: for each operator, bounds of its value given bounds of its operands, NaN included.
#pragma once

#include "flex/expr.h"
#include "flex/range_table.h"

namespace flexchat::flex {

Interval unbounded(bool nan);
Interval hull(const Interval& x, const Interval& y);

// Every operator but comparisons, boolean ones and `where`. With `integers`, operands are integers: an
// infinite bound then means "unknown", never the value infinity.
Interval apply_interval(Op op, const Interval& x, const Interval& y, bool integers);

}  // namespace flexchat::flex
