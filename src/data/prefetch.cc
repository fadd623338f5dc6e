#include "data/prefetch.h"

#include <utility>

#include "base/error.h"

namespace flexchat {

Prefetcher::Prefetcher(std::unique_ptr<BatchLoader> loader, int depth)
    : loader_(std::move(loader)), depth_(static_cast<size_t>(depth)), state_(loader_->state()) {
  check(depth >= 1, "prefetch depth {} must be at least 1", depth);
  thread_ = std::thread([this] { produce(); });
}

Prefetcher::~Prefetcher() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  room_.notify_one();
  thread_.join();
}

void Prefetcher::produce() {
  for (;;) {
    {
      std::unique_lock lock(mutex_);
      room_.wait(lock, [this] { return stop_ || batches_.size() < depth_; });
      if (stop_) return;
    }
    Batch batch;
    std::exception_ptr error;
    try {
      batch = loader_->next();
    } catch (...) {
      error = std::current_exception();
    }
    const bool failed = error != nullptr;
    {
      const std::lock_guard lock(mutex_);
      if (failed) {
        error_ = std::move(error);
      } else {
        batches_.push_back(std::move(batch));
      }
    }
    ready_.notify_one();
    if (failed) return;
  }
}

Batch Prefetcher::next() {
  Batch batch;
  {
    std::unique_lock lock(mutex_);
    ready_.wait(lock, [this] { return !batches_.empty() || error_; });
    if (batches_.empty()) std::rethrow_exception(error_);
    batch = std::move(batches_.front());
    batches_.pop_front();
  }
  room_.notify_one();
  state_ = batch.state;
  return batch;
}

}  // namespace flexchat
