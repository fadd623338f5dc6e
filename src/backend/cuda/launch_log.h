// A record of every launch, for profiles and tests. How launches are timed is behind LaunchTimer: CUDA events
// here, CUPTI in cupti.h.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "backend/cuda/runtime.h"
#include "backend/profile.h"

namespace flexchat::cuda {

// What a timer found out about a launch.
struct LaunchTime {
  double seconds = 0;   // on the device
  std::string kernels;  // as the device calls what ran; empty when the timer cannot tell
};

struct LaunchRecord {
  std::string name;  // of the operation; a product's with its sizes
  Work work;
  LaunchTime time;  // 0 s when the log only counted
};

// Measures launches. Calls come in pairs, in stream order.
class LaunchTimer {
 public:
  virtual ~LaunchTimer() = default;
  virtual void begin(cudaStream_t stream) = 0;
  virtual void end(cudaStream_t stream) = 0;
  // Of every pair, in order. The stream is idle.
  virtual std::vector<LaunchTime> times() = 0;
};

// A pair of CUDA events a launch: good to about a microsecond, and launches no longer overlap.
std::unique_ptr<LaunchTimer> make_event_timer();

class LaunchLog {
 public:
  explicit LaunchLog(std::unique_ptr<LaunchTimer> timer) : timer_(std::move(timer)) {}
  void begin(const char* name, const Work& work, cudaStream_t stream);
  void end(cudaStream_t stream);
  std::vector<LaunchRecord> finish();  // the stream is idle

 private:
  std::unique_ptr<LaunchTimer> timer_;  // may be null
  std::vector<LaunchRecord> records_;
};

// Launches alike together, the longest time first.
std::vector<KernelTotal> totals(const std::vector<LaunchRecord>& records);

}  // namespace flexchat::cuda
