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
  // The gradient comes from one linear product in a pass, or from one in each chunk of it: a fresh pass
  // (Tape::set_fresh) overwrites it, so that it need not be zeroed before.
  bool by_product = false;
};

}  // namespace flexchat
