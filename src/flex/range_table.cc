// Sparse table of chunk minima and maxima.
#include "flex/range_table.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace flexchat::flex {
namespace {

constexpr int64_t chunk = 64;
constexpr double infinity = std::numeric_limits<double>::infinity();

template <class T>
void copy_strided(const Tensor& tensor, int64_t offset, int64_t stride, std::vector<double>& out) {
  const T* const data = tensor.as<T>() + offset;
  if (stride == 1) {
    std::copy(data, data + out.size(), out.begin());
    return;
  }
  for (size_t i = 0; i < out.size(); ++i)
    out[i] = static_cast<double>(data[static_cast<int64_t>(i) * stride]);
}

}  // namespace

RangeTable::RangeTable(const Tensor& tensor, int64_t offset, int64_t stride, int64_t n)
    : values_(static_cast<size_t>(n)) {
  switch (tensor.dtype()) {
    case DType::i64:
      copy_strided<int64_t>(tensor, offset, stride, values_);
      break;
    case DType::i32:
      copy_strided<int32_t>(tensor, offset, stride, values_);
      break;
    case DType::u8:
      copy_strided<uint8_t>(tensor, offset, stride, values_);
      break;
    default:
      for (int64_t i = 0; i < n; ++i) values_[static_cast<size_t>(i)] = tensor.get(offset + i * stride);
      has_nan_ = std::any_of(values_.begin(), values_.end(), [](double x) { return std::isnan(x); });
  }
  std::vector<MinMax> level;
  for (int64_t begin = 0; begin < n; begin += chunk) level.push_back(scan(begin, std::min(n, begin + chunk)));
  runs_.push_back(std::move(level));
  for (size_t run = 2; run <= runs_[0].size(); run *= 2) {
    const std::vector<MinMax>& half = runs_.back();
    std::vector<MinMax> next(runs_[0].size() - run + 1);
    for (size_t c = 0; c < next.size(); ++c) next[c] = hull(half[c], half[c + run / 2]);
    runs_.push_back(std::move(next));
  }
}

RangeTable::MinMax RangeTable::hull(MinMax x, MinMax y) {
  return {std::min(x.lo, y.lo), std::max(x.hi, y.hi)};
}

RangeTable::MinMax RangeTable::scan(int64_t first, int64_t end) const {
  // Several at a time: one after the other each would wait for the last.
  constexpr int64_t lanes = 8;
  const double* const x = values_.data();
  MinMax result{infinity, -infinity};
  int64_t i = first;
  if (end - first >= lanes) {
    double lo[lanes], hi[lanes];
    for (int64_t k = 0; k < lanes; ++k) lo[k] = hi[k] = x[first + k];
    for (i = first + lanes; i + lanes <= end; i += lanes) {
      for (int64_t k = 0; k < lanes; ++k) {
        const double value = x[i + k];
        lo[k] = value < lo[k] ? value : lo[k];
        hi[k] = value > hi[k] ? value : hi[k];
      }
    }
    for (int64_t k = 0; k < lanes; ++k) result = hull(result, {lo[k], hi[k]});
  }
  for (; i < end; ++i) result = hull(result, {x[i], x[i]});
  return result;
}

Interval RangeTable::range(int64_t first, int64_t last) const {
  if (has_nan_) return {-infinity, infinity, true};
  const auto n = static_cast<int64_t>(values_.size());
  const int64_t end = last + 1;
  const int64_t from = (first + chunk - 1) / chunk;
  const int64_t to = end == n ? (n + chunk - 1) / chunk : end / chunk;  // the last chunk may be short
  if (from >= to) {
    const MinMax all = scan(first, end);
    return {all.lo, all.hi};
  }
  const auto level = static_cast<size_t>(std::bit_width(static_cast<uint64_t>(to - from)) - 1);
  const auto& runs = runs_[level];
  MinMax result = hull(runs[static_cast<size_t>(from)], runs[static_cast<size_t>(to) - (size_t{1} << level)]);
  if (first < from * chunk) result = hull(result, scan(first, from * chunk));
  if (to * chunk < end) result = hull(result, scan(to * chunk, end));
  return {result.lo, result.hi};
}

}  // namespace flexchat::flex
