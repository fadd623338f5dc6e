// Profiles of whole commands. While profiling is on, a backend that can measure its kernels does so from its
// making to its end, and then leaves what it found here.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace flexchat {

// Launches alike: the same operation by the same kernels on the device.
struct KernelTotal {
  std::string name;     // of the operation; a product's with its batch x M x N x K
  std::string kernels;  // as the device calls what ran; empty when its tools cannot tell
  int64_t launches = 0;
  double seconds = 0;           // on the device
  double bytes = 0, flops = 0;  // at least moved and computed
};

struct DeviceProfile {
  std::string device;       // "NVIDIA H200"
  std::string timer;        // what measured: "CUPTI", or "CUDA events" with the reason
  double copy_rate = 0;     // bytes/s read and written by a copy within the device's memory, measured
  double product_rate = 0;  // FLOP/s of a bf16 product of 8192 x 8192 x 8192, measured
  double seconds = 0;       // from the backend's making to its end
  std::vector<KernelTotal> kernels;  // the longest time first
};

// For one thread: the one that makes backends.
void set_profiling(bool on);
bool profiling();
void add_profile(DeviceProfile profile);
std::vector<DeviceProfile> take_profiles();  // all since the last call, in the order of the backends' ends

}  // namespace flexchat
