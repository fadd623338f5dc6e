// A trainable tensor and its gradient.
#pragma once

#include <string>

#include "base/tensor.h"

namespace flexchat {

struct Parameter {
  std::string name;  // state-dict name, e.g. "transformer.h.0.attn.c_q.weight"
  Tensor value;      // master dtype
  Tensor grad;       // master dtype, same shape
  // The value in the compute dtype where that is another: optimizers refresh it together with the value.
  Tensor compute = {};
};

}  // namespace flexchat
