// Which kernels can run on this machine, found by asking the libraries rather than by listing processors.
#pragma once

#include <string>
#include <vector>

#include "base/options.h"

namespace flexchat {

struct KernelRow {
  std::string device;  // "cpu", "reference", "cuda"
  std::string kernel;  // "matrix products"
  std::string dtype;   // "bf16"
  std::string needs;   // the feature it stands on
  bool runs = false;
  std::string how;  // which implementation was picked, or what is missing
};
std::vector<KernelRow> kernel_table();

// {"device": "cuda:0", "name": "NVIDIA H200", "description": the line of cuda_devices()} for each CUDA
// device; for capture_environment(). Opens the CUDA library.
std::vector<Json> cuda_accelerators();

}  // namespace flexchat
