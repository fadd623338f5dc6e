// Minimum and maximum of any contiguous stretch of an array, in constant time: how a captured tensor takes
// part in interval analysis.
//
// The array is cut into chunks of 64; a sparse table holds the range of every power-of-two run of chunks. A
// stretch is two overlapping runs plus at most two partial chunks, and none when it is aligned to 64.
// Building reads each element once: O(n) time, n + n/64*log2(n/64) numbers.
#pragma once

#include <cstdint>
#include <vector>

#include "base/tensor.h"

namespace flexchat::flex {

// All values x with lo <= x <= hi; with `nan`, possibly also NaN.
struct Interval {
  double lo, hi;
  bool nan = false;
};

class RangeTable {
 public:
  // Elements offset + i*stride of `tensor`, 0 <= i < n.
  RangeTable(const Tensor& tensor, int64_t offset, int64_t stride, int64_t n);

  // Of elements first..last, both included; 0 <= first <= last < n.
  Interval range(int64_t first, int64_t last) const;

 private:
  struct MinMax {
    double lo, hi;
  };
  static MinMax hull(MinMax x, MinMax y);
  MinMax scan(int64_t first, int64_t end) const;

  std::vector<double> values_;
  std::vector<std::vector<MinMax>> runs_;  // runs_[k][c]: chunks c .. c + 2^k - 1
  bool has_nan_ = false;
};

}  // namespace flexchat::flex
