// Host tensors for numeric tests: random values, copies, bit and value comparisons, thread counts.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/parallel.h"
#include "base/rng.h"
#include "base/tensor.h"

namespace flexchat {

// Normal values times `scale`, rounded to dtype.
inline Tensor random_tensor(Rng& rng, Shape shape, DType dtype, double scale = 1) {
  const Tensor t(host_arena(), std::move(shape), dtype);
  for (int64_t i = 0; i < t.numel(); ++i) t.set(i, scale * rng.normal());
  return t;
}

// Values in [low, high), rounded to dtype.
inline Tensor uniform_tensor(Rng& rng, Shape shape, DType dtype, double low, double high) {
  const Tensor t(host_arena(), std::move(shape), dtype);
  for (int64_t i = 0; i < t.numel(); ++i) t.set(i, low + (high - low) * rng.uniform());
  return t;
}

// i32 in [0, bound).
inline Tensor random_ids(Rng& rng, Shape shape, int64_t bound) {
  const Tensor t(host_arena(), std::move(shape), DType::i32);
  for (int64_t i = 0; i < t.numel(); ++i) {
    t.as<int32_t>()[i] = static_cast<int32_t>(rng.below(static_cast<uint64_t>(bound)));
  }
  return t;
}

inline Tensor filled_tensor(Shape shape, DType dtype, double value) {
  const Tensor t(host_arena(), std::move(shape), dtype);
  for (int64_t i = 0; i < t.numel(); ++i) t.set(i, value);
  return t;
}

inline Tensor converted(const Tensor& x, DType dtype) {
  const Tensor t(host_arena(), x.shape(), dtype);
  for (int64_t i = 0; i < t.numel(); ++i) t.set(i, x.get(i));
  return t;
}
inline Tensor duplicate(const Tensor& x) {
  const Tensor t(host_arena(), x.shape(), x.dtype());
  std::memcpy(t.data(), x.data(), static_cast<size_t>(x.bytes()));
  return t;
}

inline bool same_bits(const Tensor& a, const Tensor& b) {
  return a.dtype() == b.dtype() && a.shape() == b.shape() &&
         std::memcmp(a.data(), b.data(), static_cast<size_t>(a.bytes())) == 0;
}

inline double max_abs(const Tensor& x) {
  double largest = 0;
  for (int64_t i = 0; i < x.numel(); ++i) largest = std::max(largest, std::abs(x.get(i)));
  return largest;
}

// The largest |a - b|; infinite when a NaN is among the differences.
inline double max_difference(const Tensor& a, const Tensor& b) {
  double largest = 0;
  for (int64_t i = 0; i < a.numel(); ++i) {
    const double difference = std::abs(a.get(i) - b.get(i));
    if (std::isnan(difference)) return HUGE_VAL;
    largest = std::max(largest, difference);
  }
  return largest;
}

// Sets the number of threads for as long as it lives.
class Threads {
 public:
  explicit Threads(int n) : before_(num_threads()) { set_num_threads(n); }
  ~Threads() { set_num_threads(before_); }
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

 private:
  int before_;
};

}  // namespace flexchat
