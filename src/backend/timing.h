// Timing work on any device.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
#include <vector>

#include "backend/backend.h"

namespace flexchat {

// Median seconds of one call of `work` over `repeats` samples, after warming up. Calls too short for the
// clock and for the device's launch queue are timed several in a row, so that a sample lasts at least
// `least_seconds`.
inline double median_seconds(Backend& backend, const std::function<void()>& work, int repeats = 15,
                             double least_seconds = 5e-3) {
  const auto sample = [&](int64_t calls) {
    backend.synchronize();
    const auto start = std::chrono::steady_clock::now();
    for (int64_t i = 0; i < calls; ++i) work();
    backend.synchronize();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() /
           static_cast<double>(calls);
  };
  work();  // first use may compile, allocate, choose an algorithm
  const double once = sample(2);
  const int64_t calls = std::clamp<int64_t>(std::llround(least_seconds / std::max(once, 1e-9)), 1, 1000);
  sample(calls);
  std::vector<double> seconds;
  for (int i = 0; i < repeats; ++i) seconds.push_back(sample(calls));
  std::nth_element(seconds.begin(), seconds.begin() + repeats / 2, seconds.end());
  return seconds[static_cast<size_t>(repeats / 2)];
}

}  // namespace flexchat
