// Timing work on any device.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
#include <vector>

#include "backend/backend.h"

namespace flexchat {

// Median seconds of one call of each of `works` over `repeats` samples, after warming up. They are sampled in
// turn, so that a drift of the device's speed meets all alike. Calls too short for the clock and for the
// device's launch queue are timed several in a row, so that a sample lasts at least `least_seconds`.
inline std::vector<double> median_seconds_in_turn(Backend& backend,
                                                  const std::vector<std::function<void()>>& works,
                                                  int repeats = 15, double least_seconds = 5e-3) {
  const auto sample = [&](const std::function<void()>& work, int64_t calls) {
    backend.synchronize();
    const auto start = std::chrono::steady_clock::now();
    for (int64_t i = 0; i < calls; ++i) work();
    backend.synchronize();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() /
           static_cast<double>(calls);
  };
  std::vector<int64_t> calls;
  for (const auto& work : works) {
    work();  // first use may compile, allocate, choose an algorithm
    const double once = sample(work, 2);
    calls.push_back(std::clamp<int64_t>(std::llround(least_seconds / std::max(once, 1e-9)), 1, 1000));
    sample(work, calls.back());
  }
  std::vector<std::vector<double>> seconds(works.size());
  for (int i = 0; i < repeats; ++i) {
    for (size_t w = 0; w < works.size(); ++w) seconds[w].push_back(sample(works[w], calls[w]));
  }
  std::vector<double> medians;
  for (std::vector<double>& of : seconds) {
    std::nth_element(of.begin(), of.begin() + repeats / 2, of.end());
    medians.push_back(of[static_cast<size_t>(repeats / 2)]);
  }
  return medians;
}

// The same of one piece of work.
inline double median_seconds(Backend& backend, const std::function<void()>& work, int repeats = 15,
                             double least_seconds = 5e-3) {
  return median_seconds_in_turn(backend, {work}, repeats, least_seconds)[0];
}

}  // namespace flexchat
