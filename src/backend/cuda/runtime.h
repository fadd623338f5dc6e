// What every file of the CUDA backend stands on: the device and its stream, checked calls, and the one way to
// launch a kernel. Includes nothing heavy, for nvcc reads it in every .cu file.
//
// One backend object owns one Context; all its work goes to one stream, in order. Kernels never allocate;
// temporary memory comes from the arena, which reuses addresses, so that a step can be captured in a graph.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/arena.h"

namespace flexchat::cuda {

class DeviceArena;
class LaunchLog;
class LaunchTimer;
struct LaunchRecord;

// Throws RunError: "what: CUDA error name (description)". An out-of-memory says what is free.
void check_cuda(cudaError_t status, const char* what);

// Is an environment variable there, and neither empty nor 0?
bool switched_on(const char* variable);

// What one launch moves and computes at least, for GB/s and TFLOP/s in profiles.
struct Work {
  double bytes = 0, flops = 0;
};

// The grid of one launch, in blocks of `threads`, for error messages. Nothing where the name tells the size.
struct LaunchShape {
  int64_t x = 0, y = 0, z = 0;
  int64_t threads = 0;
};

struct DeviceInfo {
  int ordinal = 0;
  std::string name;
  int major = 0, minor = 0;  // compute capability
  int sm_count = 0;
  size_t memory = 0, l2 = 0, shared_per_block = 0;  // bytes; shared: with the opt-in
};

class Context {
 public:
  // Makes the device current in the calling thread, which is the one that must use the context. Errors: no
  // such device, one before sm_80, an unknown FLEXCHAT_ALLOC.
  explicit Context(int ordinal);
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  const DeviceInfo& device() const { return device_; }
  cudaStream_t stream() const { return stream_; }
  Arena& arena();
  DeviceArena& device_arena() { return *arena_; }
  void synchronize();  // throws what an earlier kernel did wrong, naming the last launches
  // Like check_cuda, and names the last launches, for one of them may be what went wrong.
  void check(cudaError_t status, const char* what) const;

  // Called around every launch: `begin` opens an NVTX range and notes the launch for error messages and the
  // log, `end` checks it; with FLEXCHAT_CUDA_SYNC=1 it also waits, so that a kernel at fault is named. Both
  // are cheap when nothing listens. `kernel` must live as long as the context.
  void begin_launch(const char* kernel, const Work& work, const LaunchShape& shape = {}) {
    recent_[launches_++ % recent_.size()] = {kernel, shape};
    if (observed_) begin_observed(kernel, work);
  }
  void end_launch(const char* kernel) {
    const cudaError_t status = cudaPeekAtLastError();
    if (status != cudaSuccess || observed_) end_observed(kernel, status);
  }

  // Records every launch from here on; `timer` measures them, or null: they are only counted. (launch_log.h)
  void start_log(std::unique_ptr<LaunchTimer> timer);
  std::vector<LaunchRecord> stop_log();  // waits for the device; empty when no log was started
  bool logging() const { return log_ != nullptr; }

  // Capture of the stream in a graph. While it lasts nothing runs, and what would wait for the device or read
  // host memory is an error.
  void begin_capture();
  cudaGraph_t end_capture(Work* total);  // the graph and what its launches move and compute together
  void abort_capture() noexcept;
  bool capturing() const { return capturing_; }
  void forbid_in_capture(const char* what) const;  // throws when capturing: "what inside a captured step ..."

 private:
  struct Launch {
    const char* kernel = nullptr;
    LaunchShape shape;
  };
  void begin_observed(const char* kernel, const Work& work);
  void end_observed(const char* kernel, cudaError_t status);
  void update_observed();
  std::string last_launches() const;

  DeviceInfo device_;
  cudaStream_t stream_ = nullptr;
  std::unique_ptr<DeviceArena> arena_;
  std::unique_ptr<LaunchLog> log_;
  std::array<Launch, 8> recent_;
  uint64_t launches_ = 0;
  Work captured_;
  bool capturing_ = false;
  bool sync_ = false, nvtx_ = false;
  bool observed_ = false;  // does anything beyond the ring listen to launches?
};

#ifdef __CUDACC__
// launch(context, "rms_norm", {bytes, flops}, kernel, grid, block, shared_bytes, arguments...)
template <class... Parameters, class... Arguments>
void launch(Context& context, const char* name, const Work& work, void (*kernel)(Parameters...), dim3 grid,
            dim3 block, size_t shared_bytes, Arguments&&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;  // nothing to do
  context.begin_launch(name, work, {grid.x, grid.y, grid.z, int64_t{1} * block.x * block.y * block.z});
  kernel<<<grid, block, shared_bytes, context.stream()>>>(static_cast<Parameters>(arguments)...);
  context.end_launch(name);
}
#endif

}  // namespace flexchat::cuda
