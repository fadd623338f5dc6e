// Which kernels can run on this machine, found by asking the libraries rather than by listing processors.
#pragma once

#include <string>
#include <vector>

#include "backend/attention_support.h"
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

// Are the device of an attention kernel (backend/attention_support.h) and the library it stands on here?
bool runs_here(const AttentionSupport& support);

// Version and path of cuDNN, or what is missing.
std::string cudnn_line();

// Which masks and score mods GPU kernels can be made for: "any expression (NVRTC 13.0, its path)", or only
// those compiled ahead of time and why.
struct RuntimeCompiler {
  bool available = false;
  std::string how;
};
RuntimeCompiler runtime_compiler();

// {"device": "cuda:0", "name": "NVIDIA H200", "description": the line of cuda_devices()} for each CUDA
// device; for capture_environment(). Opens the CUDA library.
std::vector<Json> cuda_accelerators();

}  // namespace flexchat
