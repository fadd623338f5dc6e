// A loader that prepares batches ahead on one background thread. Same batches in the same order as the loader
// it wraps; the state of a batch is the one the wrapped loader had right after producing it, so a checkpoint
// taken after batch k resumes at batch k + 1 however far ahead the thread has run.
#pragma once

#include <condition_variable>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

#include "data/packing.h"

namespace flexchat {

class Prefetcher final : public BatchLoader {
 public:
  // Up to `depth` (>= 1) finished batches wait. The thread starts at once and owns `loader`.
  Prefetcher(std::unique_ptr<BatchLoader> loader, int depth);
  // Waits for the batch in preparation.
  ~Prefetcher() override;
  Prefetcher(const Prefetcher&) = delete;
  Prefetcher& operator=(const Prefetcher&) = delete;

  // Rethrows what the wrapped loader threw, after the batches produced before it and on every later call.
  Batch next() override;
  LoaderState state() const override { return state_; }

 private:
  void produce();

  std::unique_ptr<BatchLoader> loader_;  // the thread's alone while it runs
  const size_t depth_;
  LoaderState state_;  // the consumer's
  std::mutex mutex_;   // guards what follows
  std::condition_variable ready_, room_;
  std::deque<Batch> batches_;
  std::exception_ptr error_;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace flexchat
