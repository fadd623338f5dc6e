// Kernels that are compiled at run time or ahead of time, loaded and ready to launch. How their code is found
// is backend/jit_compiler.h; here it meets a device.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <unordered_map>
#include <utility>

#include "backend/cuda/runtime.h"
#include "backend/jit_compiler.h"

namespace flexchat::cuda {

// A loaded kernel. Lives until the process ends.
struct JitKernel {
  std::string name;  // for launches and messages
  cudaKernel_t handle = nullptr;
  int registers = 0;         // a thread
  size_t static_shared = 0;  // bytes
  size_t max_shared = 0;     // bytes of dynamic shared memory that a launch may ask for; opted into already
  size_t local = 0;          // bytes of spilled memory a thread
};

// A kernel to be had.
struct JitEntry {
  JitSource source;
  std::string entry;     // extern "C"
  bool at_once = false;  // as a companion: compiled beside the kernel asked for, not after it
};

class Jit {
 public:
  // The one of a device. Never destroyed: the driver may be gone before static objects are.
  static Jit& of(const Context& context);

  // The kernel `entry` (extern "C") of a source: compiled and loaded on first use, looked up by the hash of
  // the source afterwards. Loading waits for the device, so that new kernels are an error while a graph is
  // captured. Thread-safe. Errors: as JitCompiler::cubin, no such entry, the driver's.
  // `companions` are kernels that calls to come may ask for. Those whose cubins are known are loaded, too;
  // the others are compiled while the caller goes on: two compilers at once slow each other down, which only
  // pays where the caller will wait for both (at_once).
  const JitKernel& get(const Context& context, const JitSource& source, const std::string& entry,
                       std::span<const JitEntry> companions = {});

 private:
  explicit Jit(const DeviceInfo& device);
  static std::string quick_key(const JitSource& source, const std::string& entry);
  const JitKernel& get_loaded(const JitSource& source, const std::string& entry);
  JitKernel load(const std::string& key, const std::string& cubin, const std::string& entry);

  const DeviceInfo device_;
  JitCompiler compiler_;
  std::mutex mutex_;
  std::map<std::string, cudaLibrary_t> libraries_;  // by key; kept for good, kernels in flight need them
  std::map<std::pair<std::string, std::string>, std::unique_ptr<JitKernel>> kernels_;  // by key and entry
  std::unordered_map<std::string, const JitKernel*> quick_;                            // by quick_key
};

// Launches with arguments as they lie in `arguments`, one pointer for each parameter.
void launch_jit(Context& context, const JitKernel& kernel, const Work& work, dim3 grid, dim3 block,
                size_t shared_bytes, void** arguments);

// launch(context, kernel, {bytes, flops}, grid, block, shared_bytes, parameters...). Parameters must have the
// kernel's own types: nothing converts them.
template <class... Parameters>
void launch(Context& context, const JitKernel& kernel, const Work& work, dim3 grid, dim3 block,
            size_t shared_bytes, const Parameters&... parameters) {
  void* arguments[] = {const_cast<void*>(static_cast<const void*>(&parameters))..., nullptr};
  launch_jit(context, kernel, work, grid, block, shared_bytes, arguments);
}

}  // namespace flexchat::cuda
