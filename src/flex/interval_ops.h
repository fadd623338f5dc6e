// Interval arithmetic: for each operator, bounds of its value given bounds of its operands, NaN included.
#pragma once

#include "flex/bound.h"

namespace flexchat::flex {

// Every arithmetic operator and function. With `integers`, operands are integers: an infinite bound then means
// "unknown", never the value infinity.
Interval apply_interval(Op op, const Interval& x, const Interval& y, bool integers);

}  // namespace flexchat::flex
