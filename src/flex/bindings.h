// The values of captured tensors, by name: runtime data, so that one expression serves every batch.
#pragma once

#include <map>
#include <string>

#include "base/tensor.h"
#include "flex/expr.h"

namespace flexchat::flex {

class Bindings {
 public:
  // Host memory; one dimension for each axis of the capture. A later value replaces an earlier one.
  Bindings& set(const std::string& name, Tensor values);

  // Errors: no tensor of that name, wrong rank, an integer capture bound to floats or the reverse.
  const Tensor& at(const Capture& capture) const;

 private:
  std::map<std::string, Tensor> tensors_;
};

}  // namespace flexchat::flex
