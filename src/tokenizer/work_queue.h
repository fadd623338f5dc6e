// Items of uneven cost shared out over the threads of parallel_for. Which worker gets which item varies from
// run to run, so results must not depend on it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>

#include "base/parallel.h"

namespace flexchat {

// fn(worker, item) for every item in [0, n); worker in [0, num_threads()), one thread to a worker. The first
// exception stops the handing out of items and is thrown again here.
template <class Fn>
void for_each_item(int64_t n, const Fn& fn) {
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::exception_ptr error;
  parallel_for(std::min<int64_t>(num_threads(), n), 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      try {
        for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < n;) fn(worker, item);
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (!error) error = std::current_exception();
        next.store(n, std::memory_order_relaxed);
      }
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace flexchat
