// Which kernels can run on this machine, found by asking the libraries rather than by listing processors.
#pragma once

#include <string>
#include <vector>

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

}  // namespace flexchat
