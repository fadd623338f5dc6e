// Timing the element-wise, norm and loss kernels of a backend against what its memory can do.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "backend/backend.h"

namespace flexchat {

struct OpTiming {
  std::string op;
  double seconds = 0;           // of one call, the median
  double bytes = 0;             // that it must move: each operand read once, each result written once
  double gb_per_s = 0;          // bytes / seconds / 1e9
  double fraction_of_copy = 0;  // gb_per_s over that of the first entry, a copy of (N, C)
};

// Activations (N, C) of `dtype`, tables and logits of V entries (logits of so few rows that they take at most
// 1 GiB). N is cut to whole rows of up to 2048 tokens, and C to heads of 128 where that divides it. Operands
// are random and rotate through 4 GiB on a device, 32 MiB in host memory; each of the `repeats` samples runs
// over all of them once, between two Backend::synchronize(). Errors: sizes below 1, C odd, a dtype that the
// backend does not compute in.
std::vector<OpTiming> time_ops(Backend& backend, int64_t n, int64_t c, int64_t v, DType dtype, int repeats);

}  // namespace flexchat
