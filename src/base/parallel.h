// The one way to use several threads for data-parallel loops. OpenMP in ordinary builds; plain threads under
// ThreadSanitizer, which cannot see OpenMP's barriers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>

#if defined(__SANITIZE_THREAD__)
#include <thread>
#include <vector>
#else
#include <omp.h>
#endif

namespace flexchat {

int num_threads();            // threads a parallel loop may use
void set_num_threads(int n);  // n >= 1; also bounds oneDNN

// fn(begin, end) over [0, n) in num_threads() contiguous ranges, each a multiple of `grain` but the last.
// The split depends only on n, grain and num_threads(). fn must not throw.
template <class Fn>
void parallel_for(int64_t n, int64_t grain, const Fn& fn) {
  if (n <= 0) return;
  const int64_t units = (n + grain - 1) / grain;
  const int64_t parts = std::min<int64_t>(num_threads(), units);
  const auto range = [&](int64_t part) {
    const int64_t begin = units * part / parts * grain, end = std::min(n, units * (part + 1) / parts * grain);
    if (begin < end) fn(begin, end);
  };
  if (parts <= 1) {
    range(0);
    return;
  }
#if defined(__SANITIZE_THREAD__)
  std::vector<std::thread> workers;
  for (int64_t part = 1; part < parts; ++part) workers.emplace_back(range, part);
  range(0);
  for (auto& worker : workers) worker.join();
#else
#pragma omp parallel for num_threads(static_cast <int>(parts)) schedule(static, 1)
  for (int64_t part = 0; part < parts; ++part) range(part);
#endif
}

}  // namespace flexchat
