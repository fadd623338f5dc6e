// A record of every launch, for profiles and tests. How launches are timed is behind LaunchTimer: CUDA events
// here, whatever a profiling library offers elsewhere.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "backend/cuda/runtime.h"

namespace flexchat::cuda {

struct LaunchRecord {
  std::string kernel;
  Work work;
  double seconds = 0;  // on the device; 0 when the log only counted
};

// Measures launches. Calls come in pairs, in stream order.
class LaunchTimer {
 public:
  virtual ~LaunchTimer() = default;
  virtual void begin(cudaStream_t stream) = 0;
  virtual void end(cudaStream_t stream) = 0;
  // Of every pair, in order. The stream is idle.
  virtual std::vector<double> seconds() = 0;
};

// A pair of CUDA events a launch: good to about a microsecond, and launches no longer overlap.
std::unique_ptr<LaunchTimer> make_event_timer();

class LaunchLog {
 public:
  explicit LaunchLog(std::unique_ptr<LaunchTimer> timer) : timer_(std::move(timer)) {}
  void begin(const char* kernel, const Work& work, cudaStream_t stream);
  void end(cudaStream_t stream);
  std::vector<LaunchRecord> finish();  // the stream is idle

 private:
  std::unique_ptr<LaunchTimer> timer_;  // may be null
  std::vector<LaunchRecord> records_;
};

// Launches of the same name together, the longest time first.
struct LaunchTotal {
  std::string kernel;
  int64_t launches = 0;
  Work work;
  double seconds = 0;
};
std::vector<LaunchTotal> totals(const std::vector<LaunchRecord>& records);

}  // namespace flexchat::cuda
