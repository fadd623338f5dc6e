#include "base/parallel.h"

#include <atomic>
#include <thread>

namespace flexchat {
namespace {
std::atomic<int>& thread_count() {
  static std::atomic<int> n{std::max(1, static_cast<int>(std::thread::hardware_concurrency()))};
  return n;
}
}  // namespace

int num_threads() { return thread_count().load(std::memory_order_relaxed); }

void set_num_threads(int n) {
  thread_count().store(std::max(1, n), std::memory_order_relaxed);
#if !defined(__SANITIZE_THREAD__)
  omp_set_num_threads(num_threads());
#endif
}

}  // namespace flexchat
